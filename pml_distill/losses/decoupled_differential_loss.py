import torch

from .base_distillation_loss import set_not_negative
from .base_gallery_loss import BaseGalleryLoss


class DecoupledDifferentialLoss(BaseGalleryLoss):
    r"""Differences of similarities among the teacher's neighbours, wrong signs apart from right ones (D3still).

    .. math:: L = \frac{\alpha}{B} \|t_1 - s_1\|_2 + \frac{1}{k - 1} \Big( \beta \, \|E^{hard}\|_F +
        \gamma \, \|E^{simple}\|_F \Big), \quad
        E_{ij} = \frac{(s_j - s_i) - (t_j - t_i)}{0.1 + |t_j - t_i|}, \quad i, j \ge 2

    t are the teacher's similarities of a query to its k nearest gallery rows, nearest first, s the student's to the
    same rows. E hard holds the pairs that the student orders the other way round, E simple the others. The norm of the
    first term runs over the batch. The sub-losses ``feature``, ``hard`` and ``simple`` are reduced one by one and
    added.

    Source: Xie et al., "D3still: Decoupled Differential Distillation for Asymmetric Image Retrieval", CVPR 2024,
    whose code has this scale, with the batch as the gallery: ``topk=10`` and alpha, beta, gamma of 100, 5, 1 (CUB,
    ResNet-18) or 200, 10, 2 (CUB, MobileNetV3).

    Args:
        topk: k, how many of the teacher's nearest count, at least 2; all of a smaller gallery.
        alpha: weight of the nearest one.
        beta: weight of the wrongly ordered pairs.
        gamma: weight of the rightly ordered pairs.
        **kwargs: as in ``BaseGalleryLoss``.

    Shapes: embeddings and ref_emb (B, D). ``feature``: a scalar (``already_reduced``); the others: one value per query
    (``element``).
    """

    def __init__(self, topk: int = 10, alpha: float = 100, beta: float = 5, gamma: float = 1, **kwargs):
        super().__init__(**kwargs)
        if topk < 2:
            raise ValueError(f"topk must be at least 2, but is {topk}.")
        set_not_negative(self, topk=topk, alpha=alpha, beta=beta, gamma=gamma)

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
        return {
            "feature": {"losses": self.alpha * feature, "indices": None, "reduction_type": "already_reduced"},
            **self.query_losses(hard, None, embeddings, "hard"),
            **self.query_losses(simple, None, embeddings, "simple"),
        }

    def _sub_loss_names(self):
        return ["feature", "hard", "simple"]
