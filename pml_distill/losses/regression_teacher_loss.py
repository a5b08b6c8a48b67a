from collections.abc import Callable

import torch
from torch.nn import functional as F

from .base_distillation_loss import BaseDistillationLoss

PENALTIES: dict[str, Callable[..., torch.Tensor]] = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


class RegressionTeacherLoss(BaseDistillationLoss):
    r"""Plain regression of the teacher's embedding, coordinate by coordinate (the FitNet loss on embeddings).

    .. math:: L_i = \frac{1}{D} \sum_c \ell\big(f_s(x_i)_c - f_t(x_i)_c\big), \quad
        \ell(u) = u^2 \;\text{(mse)} \;\text{or smooth L1}

    Embeddings are compared as they come, not normalised, and the distance is not used.

    Source: Budnik and Avrithis, "Asymmetric metric learning for knowledge transfer", CVPR 2021; stage one of Reddy et
    al., "Context Unaware Knowledge Distillation for Image Retrieval", 2022, whose scale this is.

    Args:
        penalty: ``"mse"`` or ``"smooth_l1"``, with its turn at 1.

    Shapes: embeddings and ref_emb (B, D). One value per sample (``element``).
    """

    equal_widths = True
    takes_pairs = False

    def __init__(self, penalty: str = "mse", **kwargs):
        super().__init__(**kwargs)
        if penalty not in PENALTIES:
            raise ValueError(f'penalty must be "mse" or "smooth_l1", but is {penalty!r}.')
        self.penalty = penalty

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        losses = PENALTIES[self.penalty](embeddings, ref_emb, reduction="none").mean(dim=1)
        return self.query_losses(losses, None, embeddings)
