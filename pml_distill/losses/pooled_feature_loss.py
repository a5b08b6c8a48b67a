import torch

from .base_feature_loss import BaseFeatureLoss, Maps


class PooledFeatureLoss(BaseFeatureLoss):
    r"""The distance of the spatial means of the student's and the teacher's feature maps (CDD's feature term).

    .. math:: L_i = \sum_l \Big\| \frac{1}{H_l W_l} \sum_{h, w} (F_s^l)_{h, w} - (F_t^l)_{h, w} \Big\|_2

    Channels must be equal; nothing is learned. Equal maps get gradient zero. Source: Xie et al., "Towards a Smaller
    Student: Capacity Dynamic Distillation for Efficient Image Retrieval", CVPR 2023, with weight 0.5. They take the
    normalisation of each block's 3x3 convolution: with compactors inserted, ``"layer1.0.bn2.0"`` of the student and
    ``"layer1.0.bn2"`` of the teacher.
    """

    def compute_loss(self, student_maps: Maps, teacher_maps: Maps) -> torch.Tensor:
        pairs = list(zip(student_maps, teacher_maps))
        channels = [(s.shape[1], t.shape[1]) for s, t in pairs]
        if any(own != other for own, other in channels):
            raise ValueError(f"PooledFeatureLoss needs equal channels in each pair of maps, but they are {channels}.")
        return sum(torch.linalg.vector_norm(s.mean(dim=(2, 3)) - t.mean(dim=(2, 3)), dim=1) for s, t in pairs)
