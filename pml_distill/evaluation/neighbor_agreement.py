import torch
from torch.nn import functional as F

from ..utils.tensors import check_finite


def neighbor_agreement(embeddings: torch.Tensor, ref_emb: torch.Tensor, k: int = 10) -> float:
    r"""The share of k nearest neighbours that student and teacher have in common, averaged over samples.

    .. math:: \frac{1}{N k} \sum_i |kNN_s(i) \cap kNN_t(i)|

    Neighbours are found among the same samples, the sample itself left out, by cosine similarity.

    Args:
        embeddings: (N, Ds), the student's.
        ref_emb: (N, Dt), the teacher's, row for row.
        k: how many neighbours; below N.

    Returns:
        A number in [0, 1]; two unrelated embeddings reach about k / N.
    """
    if len(embeddings) != len(ref_emb):
        raise ValueError(f"embeddings has {len(embeddings)} rows and ref_emb {len(ref_emb)}; they must be aligned.")
    if not 1 <= k < len(embeddings):
        raise ValueError(f"k must be from 1 to {len(embeddings) - 1}, one less than the rows, but is {k}.")
    check_finite(embeddings=embeddings, ref_emb=ref_emb)
    student, teacher = F.normalize(embeddings.float()), F.normalize(ref_emb.float())
    common = 0.0
    for rows in torch.arange(len(student), device=student.device).split(1024):
        found = []
        for space in (student, teacher):
            similarity = (space[rows] @ space.t()).scatter_(1, rows[:, None], -torch.inf)
            found.append(torch.zeros_like(similarity).scatter_(1, similarity.topk(k).indices, 1))
        common += (found[0] * found[1]).sum().item()
    return common / (len(student) * k)
