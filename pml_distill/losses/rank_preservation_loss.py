import math

import torch

from .base_distillation_loss import ABSENT, entry, set_numbers
from .base_gallery_loss import BaseGalleryLoss

# So sharp that the teacher's comparisons are 0 or 1, and 1/2 for ties.
TEACHER_TEMPERATURE = 1e-6


class RankPreservationLoss(BaseGalleryLoss):
    r"""The teacher's order of its nearest gallery rows, kept by the student's queries (rank-order preservation, ROP).

    .. math:: L = \frac{1}{k} \sum_{i,j} w_i \Big( \sigma\big((t_j - t_i) / 10^{-6}\big) -
        \sigma\big((s_j - t_i) / \tau\big) \Big)^2, \quad w_i = i \cdot \frac{e^{\rho t_i}}{\sum_m e^{\rho t_m}}

    t are the teacher's similarities of a query to its k = ``topk`` nearest gallery rows, nearest first, s the student's
    to the same rows, sigma is the logistic function, tau the ``temperature``, and rho, the ``rank_weight``, says how
    much more the near ones weigh. Time and memory grow with B topk^2. Shapes: embeddings and ref_emb (B, D); one value
    per query. Other arguments are those of ``BaseGalleryLoss``. Source: Wu et al., "A General Rank Preserving Framework
    for Asymmetric Image Retrieval", ICLR 2023, equations 8 to 10, with all training data as the gallery.
    """

    def __init__(self, topk: int = 32, temperature: float = 0.1, rank_weight: float = 0.2, **kwargs):
        super().__init__(**kwargs)
        set_numbers(self, 1, topk=topk)
        set_numbers(self, temperature=temperature)
        if not math.isfinite(rank_weight):
            raise ValueError(f"rank_weight must be a finite number, but is {rank_weight}.")
        self.rank_weight = rank_weight
        self.add_to_recordable_attributes(name="rank_weight", is_stat=False)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        student, teacher, filled = self.nearest(embeddings, ref_emb, self.topk)
        ranks = torch.arange(1, len(filled) + 1, device=filled.device)
        weights = ranks * torch.softmax((self.rank_weight * teacher).masked_fill(~filled, ABSENT), dim=1)
        expected = torch.sigmoid((teacher[:, None, :] - teacher[:, :, None]) / TEACHER_TEMPERATURE)
        found = torch.sigmoid((student[:, None, :] - teacher[:, :, None]) / self.temperature)
        misses = (expected - found).square() * (filled[:, None] & filled)
        return {"loss": entry((weights * misses.sum(dim=2)).sum(dim=1) / filled.sum().clamp(min=1))}
