from .base_learned_feature_loss import BaseLearnedFeatureLoss


class HintLoss(BaseLearnedFeatureLoss):
    r"""The squared error of the teacher's feature maps, predicted by a learned 1x1 convolution (FitNet hints).

    .. math:: L_i = \sum_l \frac{1}{C_l H_l W_l} \left\| r_l(F_s^l(x_i)) - F_t^l(x_i) \right\|^2

    The regressors r are parameters of the loss: train them with the student (in a trainer, by
    ``optimizers["feature_distillation_loss_optimizer"]``). They are saved in checkpoints, apart from the student.
    Arguments: see ``BaseLearnedFeatureLoss``. Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015,
    section 2.2. Multiply by C H W / 2 for their sum; a weight of 100 is common.
    """

    def map_loss(self, name, found, expected):
        return (found - expected).square().mean(dim=(1, 2, 3))
