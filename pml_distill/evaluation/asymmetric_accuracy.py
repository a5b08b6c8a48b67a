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
    check_finite(embeddings=embeddings, ref_emb=ref_emb)
    metrics = ("mean_average_precision_at_r", "precision_at_1")
    return retrieval_accuracy(embeddings, labels, ref_emb, metrics=metrics, batch_size=batch_size)
