import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from .base_learned_feature_loss import BaseLearnedFeatureLoss

MIN_VARIANCE = 1e-5
FIRST_VARIANCE = 5.0


class VariationalInformationLoss(BaseLearnedFeatureLoss):
    r"""Minus the log-likelihood of the teacher's maps under a Gaussian that the student's maps predict (VID).

    .. math:: L_i = \sum_l \frac{1}{C_l H_l W_l} \sum_{c, h, w} \frac{1}{2} \left(
        \log \sigma_{l, c}^2 + \frac{(F_t^l - \mu_l(F_s^l))_{c, h, w}^2}{\sigma_{l, c}^2} \right),
        \qquad \sigma_{l, c}^2 = \mathrm{softplus}(\alpha_{l, c}) + 10^{-5}

    The mean is a learned 1x1 convolution, the variance a learned number per channel of the teacher; train both as those
    of ``HintLoss``. The loss may be negative: reducers that drop such values (``AvgNonZeroReducer``) do not suit it.
    Arguments: see ``BaseLearnedFeatureLoss``. Source: Ahn et al., "Variational Information Distillation for Knowledge
    Transfer", CVPR 2019, with the first variance of their code, 5, and its mean over the map, without log(2 pi) / 2.
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int], **kwargs):
        super().__init__(student_channels, teacher_channels, **kwargs)
        first = math.log(math.expm1(FIRST_VARIANCE - MIN_VARIANCE))
        variances = {f"map_{i}": torch.full((channels,), first) for i, channels in enumerate(teacher_channels)}
        self.raw_variances = torch.nn.ParameterDict(variances)

    def map_loss(self, name, found, expected):
        variance = F.softplus(self.raw_variances[name])[:, None, None] + MIN_VARIANCE
        return (variance.log() + (expected - found).square() / variance).mean(dim=(1, 2, 3)) / 2
