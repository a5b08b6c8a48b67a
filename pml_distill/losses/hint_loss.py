from collections.abc import Sequence

import torch

from .base_feature_loss import BaseFeatureLoss, Maps
from .channel_regressors import ChannelRegressors


class HintLoss(BaseFeatureLoss):
    r"""The squared error of the teacher's feature maps, predicted from the student's by a learned 1x1 convolution.

    .. math:: L_i = \sum_l \frac{1}{C_l H_l W_l} \left\| r_l(F_s^l(x_i)) - F_t^l(x_i) \right\|^2

    The regressors r are parameters of the loss: train them with the student (in a trainer, by
    ``optimizers["feature_distillation_loss_optimizer"]``). They are saved in checkpoints and are no part of the
    student.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, section 2.2. They sum where we take the mean
    over an image's map (factor C H W / 2 to their scale), and use a convolution large enough to bring the student to
    the teacher's height and width, where we pool. Their hint is one middle layer, trained before all others; a weight
    of 100 is common where it is one term of several.

    Args:
        student_channels: channels of the student's maps.
        teacher_channels: channels of the teacher's maps.
        **kwargs: ``reducer`` as in every PML loss.

    Shapes:
        student_maps and teacher_maps: lists of (B, C, H, W). Reducer input: ``loss``, one value per sample
        (``element``).

    Raises:
        ValueError: the channels do not go in pairs or are not those of the maps; the maps do not go in pairs.

    Example:
        >>> import torch
        >>> loss = HintLoss(student_channels=[8], teacher_channels=[32])
        >>> loss([torch.rand(4, 8, 7, 7)], [torch.rand(4, 32, 14, 14)]).shape
        torch.Size([])
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int], **kwargs):
        super().__init__(**kwargs)
        self.regressors = ChannelRegressors(student_channels, teacher_channels)

    def compute_loss(self, student_maps: Maps, teacher_maps: Maps) -> torch.Tensor:
        pairs = zip(self.regressors(student_maps, teacher_maps), teacher_maps)
        return torch.stack([(prediction - t).square().mean(dim=(1, 2, 3)) for prediction, t in pairs]).sum(dim=0)
