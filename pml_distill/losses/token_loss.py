from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from .base_distillation_loss import cut_zero_rows, set_numbers
from .base_learned_feature_loss import BaseLearnedFeatureLoss


class TokenLoss(BaseLearnedFeatureLoss):
    r"""The spatial tokens of a vision transformer such as DINO, predicted by a learned linear map (AM-RADIO).

    .. math:: L_i = \sum_l \frac{1}{P_l} \sum_p \Big( \alpha \, \big(1 - \cos(\hat t_p, \tilde t_p)\big) +
        \frac{\beta}{C_l} \sum_c \ell(\hat t_{p, c} - \tilde t_{p, c}) \Big), \quad
        \tilde t_p = \frac{t_p - \mathrm{mean}(t_p)}{\mathrm{std}(t_p)}

    t_p are the teacher's C channels at one of P places, their prediction from the student's is learned, l is the smooth
    L1 loss, alpha ``cosine_weight`` and beta ``smooth_l1_weight``. The student may be a convolutional network. Train
    the linear maps as those of ``HintLoss``; other arguments: see ``BaseLearnedFeatureLoss``. Source: Ranzinger et al.,
    "AM-RADIO: Agglomerative Vision Foundation Model", CVPR 2024, for both terms and their weights; the target is that
    of Wei et al., "Contrastive Learning Rivals Masked Image Modeling in Fine-tuning via Feature Distillation", 2022.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        cosine_weight: float = 0.9,
        smooth_l1_weight: float = 0.1,
        **kwargs: Any,
    ):
        super().__init__(student_channels, teacher_channels, **kwargs)
        set_numbers(self, 0, cosine_weight=cosine_weight, smooth_l1_weight=smooth_l1_weight)

    def map_loss(self, name, found, expected):
        variance, mean = torch.var_mean(expected, dim=1, correction=0, keepdim=True)
        expected = (expected - mean) * (variance + 1e-5).rsqrt()
        lengths = torch.linalg.vector_norm(found, dim=1) * torch.linalg.vector_norm(expected, dim=1)
        cosine = 1 - (cut_zero_rows(found) * expected).sum(dim=1) / lengths.clamp(min=1e-12)
        penalty = F.smooth_l1_loss(found, expected, reduction="none").mean(dim=1)
        return (self.cosine_weight * cosine + self.smooth_l1_weight * penalty).mean(dim=(1, 2))
