import torch

from .base_distillation_loss import already_reduced, entry, set_numbers
from .base_gallery_loss import BaseGalleryLoss


class DecoupledDifferentialLoss(BaseGalleryLoss):
    r"""Differences of similarities among the teacher's neighbours, wrong signs apart from right ones (D3still).

    .. math:: L = \frac{\alpha}{B} \|t_1 - s_1\|_2 + \frac{1}{k - 1} \Big( \beta \, \|E^{hard}\|_F +
        \gamma \, \|E^{simple}\|_F \Big), \quad
        E_{ij} = \frac{(s_j - s_i) - (t_j - t_i)}{0.1 + |t_j - t_i|}, \quad i, j \ge 2

    t are the teacher's similarities of a query to its k = ``topk`` (at least 2) nearest gallery rows, nearest first, s
    the student's to the same rows. E hard holds the pairs that the student orders the other way round, E simple the
    others. ``feature`` is a scalar; ``hard`` and ``simple`` have one value per query; all are reduced one by one and
    added. Other arguments and shapes are those of ``BaseGalleryLoss``. Source: Xie et al., "D3still: Decoupled
    Differential Distillation for Asymmetric Image Retrieval", CVPR 2024, whose code has this scale, with the batch as
    the gallery: alpha, beta, gamma of 100, 5, 1 (CUB, ResNet-18) or 200, 10, 2 (MobileNetV3).
    """

    part_names = "feature", "hard", "simple"

    def __init__(self, topk: int = 10, alpha: float = 100, beta: float = 5, gamma: float = 1, **kwargs):
        super().__init__(**kwargs)
        set_numbers(self, 2, topk=topk)
        set_numbers(self, 0, alpha=alpha, beta=beta, gamma=gamma)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        student, teacher, filled = self.nearest(embeddings, ref_emb, self.topk)
        feature = torch.linalg.vector_norm((teacher[:, 0] - student[:, 0]) * filled[0]) / len(embeddings)
        student, teacher, filled = student[:, 1:], teacher[:, 1:], filled[1:]
        found, expected = (rows[:, None, :] - rows[:, :, None] for rows in (student, teacher))
        expected = expected.masked_fill(expected == 0, 1)
        errors = (found - expected) / (0.1 + expected.abs()) * (filled[:, None] & filled)
        agreement = (found.sign() * expected.sign()).flatten(1)
        hard, simple = (
            weight * torch.linalg.vector_norm(errors.flatten(1) * chosen, dim=1) / (self.topk - 1)
            for weight, chosen in ((self.beta, agreement < 0), (self.gamma, agreement > 0))
        )
        return {"feature": already_reduced(self.alpha * feature), "hard": entry(hard), "simple": entry(simple)}
