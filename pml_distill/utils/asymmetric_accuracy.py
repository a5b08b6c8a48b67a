import torch
from torch.nn import functional as F


@torch.no_grad()
def asymmetric_accuracy(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, batch_size: int = 1024
) -> dict[str, float]:
    """Retrieval of a gallery indexed by the teacher with queries of the student, by cosine similarity.

    Every sample is a query; its own row of the gallery is left out by its place, where PML's ``AccuracyCalculator``
    can leave out only a row that equals the query. With the same embeddings on both sides the figures are PML's.
    Losses that teach relations alone do not bring the two spaces together and end near zero here;
    ``losses.catalogue()`` tells which do.

    Args:
        student: (N, D) embeddings of the queries.
        teacher: (N, D) embeddings of the same samples in the same order.
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
        {'precision_at_1': 1.0, 'mean_average_precision_at_r': 1.0}
        >>> asymmetric_accuracy(teacher.roll(1, dims=1), teacher, labels)["precision_at_1"]
        0.0
    """
    if student.shape != teacher.shape or student.ndim != 2 or labels.shape != student.shape[:1]:
        raise ValueError(
            "student and teacher must have the same shape (N, D) and labels (N,), but have "
            f"{tuple(student.shape)}, {tuple(teacher.shape)} and {tuple(labels.shape)}; where widths differ, project "
            "the student's embeddings."
        )
    student, teacher = F.normalize(student.float()), F.normalize(teacher.float())
    labels = labels.to(student.device)
    _, classes, counts = labels.unique(return_inverse=True, return_counts=True)
    relevant = counts[classes] - 1
    longest = int(relevant.max())
    if longest < 1:
        raise ValueError("labels has no class with two samples, so that there is nothing to retrieve.")
    ranks = torch.arange(1, longest + 1, device=student.device)
    first, average = [], []
    for rows in torch.arange(len(student), device=student.device).split(batch_size):
        similarities = student[rows] @ teacher.t()
        similarities[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
        found = labels[similarities.topk(longest, dim=1).indices] == labels[rows, None]
        first.append(found[:, 0].float())
        hits = found & (ranks <= relevant[rows, None])
        precision = hits.cumsum(dim=1) / ranks
        average.append((precision * hits).sum(dim=1) / relevant[rows].clamp(min=1))
    counted = relevant > 0
    return {
        "precision_at_1": torch.cat(first)[counted].mean().item(),
        "mean_average_precision_at_r": torch.cat(average)[counted].mean().item(),
    }
