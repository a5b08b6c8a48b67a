import torch

from .base_distillation_loss import entry, set_numbers
from .base_gallery_loss import BaseGalleryLoss


class CollaborativeRankLoss(BaseGalleryLoss):
    r"""Similarity to the teacher's nearest gallery row, and smooth ranks of the next ones (ACRD).

    .. math:: L = \alpha \, |s_1 - t_1| + \frac{\beta}{k - 1} \|r(t_{2..k}) - r(s_{2..k})\|_2, \quad
        r_j(x) = \sum_i \max(0, x_i - x_j)

    t are the teacher's similarities of a query to its k = ``topk`` (at least 2) nearest gallery rows, nearest first, s
    the student's to the same rows; of a distance the negative. Shapes: embeddings and ref_emb (B, D); ``nearest`` and
    ``ranks``, reduced one by one and added: one value per query. Other arguments are those of ``BaseGalleryLoss``.
    Source: the code of Xie et al., "Capacity Dynamic Distillation", CVPR 2023, there on pooled feature maps with all
    training data as the gallery: make ``queue_size`` large. Its settings are not published.
    """

    part_names = "nearest", "ranks"

    def __init__(self, topk: int = 10, alpha: float = 1.0, beta: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        set_numbers(self, 2, topk=topk)
        set_numbers(self, 0, alpha=alpha, beta=beta)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        student, teacher, filled = self.nearest(embeddings, ref_emb, self.topk)
        nearest = self.alpha * (student[:, 0] - teacher[:, 0]).abs() * filled[0]
        filled = filled[1:]
        both = filled[:, None] & filled
        ranks = [((x[:, :, None] - x[:, None, :]).relu() * both).sum(dim=1) for x in (student[:, 1:], teacher[:, 1:])]
        errors = torch.linalg.vector_norm(ranks[1] - ranks[0], dim=1)
        return {"nearest": entry(nearest), "ranks": entry(self.beta * errors / filled.sum().clamp(min=1))}
