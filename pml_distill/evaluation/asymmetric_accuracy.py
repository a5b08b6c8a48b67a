from collections.abc import Callable
from typing import Any

import torch

from ..utils.tensors import check_finite
from .retrieval_metrics import retrieval_accuracy


def asymmetric_accuracy(
    embeddings: torch.Tensor, ref_emb: torch.Tensor, labels: torch.Tensor, batch_size: int | None = None
) -> dict[str, float]:
    """Retrieval of a gallery indexed by the teacher with queries of the student, by cosine similarity.

    Every sample is a query, and its own row of the gallery is left out. Losses that teach relations alone do not
    bring the two spaces together and end near zero here; ``losses.catalogue()`` tells which do.

    Args:
        embeddings: (N, D), the student's: the queries.
        ref_emb: (N, D), the teacher's, row for row: the gallery.
        labels: (N,).
        batch_size: as in ``retrieval_accuracy``, which has more metrics.

    Returns:
        ``precision_at_1`` and ``mean_average_precision_at_r``, means over the queries whose class has another sample.

    Raises:
        ValueError: the shapes do not fit, values are not finite, or no class has two samples.

    Example:
        >>> teacher, labels = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)
        >>> asymmetric_accuracy(teacher, teacher, labels)
        {'mean_average_precision_at_r': 1.0, 'precision_at_1': 1.0}
    """
    if embeddings.shape != ref_emb.shape or embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            "embeddings and ref_emb must have the same shape (N, D) and labels (N,), but have "
            f"{tuple(embeddings.shape)}, {tuple(ref_emb.shape)} and {tuple(labels.shape)}; where widths differ, "
            "project the student's embeddings."
        )
    check_finite(embeddings=embeddings, ref_emb=ref_emb)
    if labels.unique(return_counts=True)[1].max() < 2:
        raise ValueError("labels has no class with two samples, so that there is nothing to retrieve.")
    metrics = ("mean_average_precision_at_r", "precision_at_1")
    return retrieval_accuracy(embeddings, labels, ref_emb, metrics=metrics, batch_size=batch_size)


def asked_by(queries: torch.Tensor, knn_func: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``knn_func`` that searches for these queries, whatever a calculator gives as such.

    PML's calculator wants the gallery to begin with the queries, and is told that they are the teacher's.
    """
    return lambda _, k, gallery, ref_includes_query: knn_func(queries.to(gallery), k, gallery, ref_includes_query)
