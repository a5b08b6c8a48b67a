import torch

from .base_distillation_loss import unit_rows
from .base_feature_loss import BaseFeatureLoss, Maps


class AttentionTransferLoss(BaseFeatureLoss):
    r"""The squared difference between where student and teacher maps are strong (attention transfer, AT).

    .. math:: Q^l = \mathrm{vec} \sum_c (F^l_c)^2, \qquad
        L_i = \sum_l \frac{1}{H_l W_l} \left\| \frac{Q_s^l}{\|Q_s^l\|} - \frac{Q_t^l}{\|Q_t^l\|} \right\|^2

    Channels may differ and nothing is learned. A map of zeros gets no gradient; one of a single place is refused.
    Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, equation 2, squared and averaged as
    in their code; often with weight 1000.
    """

    def compute_loss(self, student_maps: Maps, teacher_maps: Maps) -> torch.Tensor:
        if any(m.shape[2:].numel() == 1 for m in student_maps):
            raise ValueError(
                "AttentionTransferLoss compares the places of a map, but the pairs have the heights and widths "
                f"{[tuple(m.shape[2:]) for m in student_maps]}: one place is always alike. A cached teacher's features "
                "are such maps; use PooledFeatureLoss or HintLoss, or a FrozenTeacher."
            )
        students, teachers = (
            [unit_rows(m.square().sum(dim=1).flatten(1)) for m in maps] for maps in (student_maps, teacher_maps)
        )
        return torch.stack([(s - t).square().mean(dim=1) for s, t in zip(students, teachers)]).sum(dim=0)
