from .multiple_distillation_losses import MultipleDistillationLosses
from .rkd_angle_loss import RKDAngleLoss
from .rkd_distance_loss import RKDDistanceLoss


class RKDLoss(MultipleDistillationLosses):
    """Relational knowledge distillation (RKD): ``distance_weight * RKDDistanceLoss + angle_weight * RKDAngleLoss``.

    ``distance`` is that of the first, ``reducer`` that of both. Source: Park et al., "Relational Knowledge
    Distillation", CVPR 2019, with their weights for metric learning; for classification they use 25 and 50.
    """

    def __init__(self, distance_weight: float = 1.0, angle_weight: float = 2.0, distance=None, reducer=None):
        losses = RKDDistanceLoss(distance=distance, reducer=reducer), RKDAngleLoss(reducer=reducer)
        super().__init__(losses, weights=(distance_weight, angle_weight))
