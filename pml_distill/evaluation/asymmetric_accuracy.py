from collections.abc import Callable
from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity


@torch.no_grad()
def asymmetric_accuracy(
    embeddings: torch.Tensor, ref_emb: torch.Tensor, labels: torch.Tensor, batch_size: int = 1024
) -> dict[str, float]:
    """Retrieval of a gallery indexed by the teacher with queries of the student, by cosine similarity.

    Every sample is a query, and its own row of the gallery is left out. The figures are those of PML's
    ``AccuracyCalculator``, which by itself leaves out a query's own row only in a gallery that begins with the queries.
    Losses that teach relations alone do not bring the two spaces together and end near zero here;
    ``losses.catalogue()`` tells which do.

    Args:
        embeddings: (N, D), the student's: the queries.
        ref_emb: (N, D), the teacher's, row for row: the gallery.
        labels: (N,).
        batch_size: how many queries are compared at a time.

    Returns:
        ``precision_at_1`` and ``mean_average_precision_at_r`` (Musgrave et al., "A Metric Learning Reality Check",
        ECCV 2020), means over the queries whose class has another sample.

    Raises:
        ValueError: the shapes do not fit, or no class has two samples.

    Example:
        >>> teacher, labels = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)
        >>> asymmetric_accuracy(teacher, teacher, labels)
        {'mean_average_precision_at_r': 1.0, 'precision_at_1': 1.0}
        >>> asymmetric_accuracy(teacher.roll(1, dims=1), teacher, labels)["precision_at_1"]
        0.0
    """
    if embeddings.shape != ref_emb.shape or embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            "embeddings and ref_emb must have the same shape (N, D) and labels (N,), but have "
            f"{tuple(embeddings.shape)}, {tuple(ref_emb.shape)} and {tuple(labels.shape)}; where widths differ, "
            "project the student's embeddings."
        )
    # Numbered anew, because the calculator turns them into float32.
    _, classes, counts = labels.unique(return_inverse=True, return_counts=True)
    if counts.max() < 2:
        raise ValueError("labels has no class with two samples, so that there is nothing to retrieve.")
    # It imports scikit-learn, which costs more than all that trainers and teachers need.
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=embeddings.device,
        knn_func=asked_by(embeddings.float(), CustomKNN(CosineSimilarity(), batch_size)),
    )
    return calculator.get_accuracy(ref_emb.float(), classes)


def asked_by(queries: torch.Tensor, knn_func: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``knn_func`` that searches for these queries, whatever a calculator gives as such.

    PML's calculator wants the gallery to begin with the queries, and is told that they are the teacher's.
    """
    return lambda _, k, gallery, ref_includes_query: knn_func(queries.to(gallery), k, gallery, ref_includes_query)
