from torch.nn import functional as F

from .base_distillation_loss import BaseDistillationLoss, entry


class RegressionTeacherLoss(BaseDistillationLoss):
    r"""Plain regression of the teacher's embedding, coordinate by coordinate (the FitNet loss on embeddings).

    .. math:: L_i = \frac{1}{D} \sum_c \ell\big(f_s(x_i)_c - f_t(x_i)_c\big), \quad
        \ell(u) = u^2 \;\text{(mse)} \;\text{or smooth L1}

    Embeddings are compared as they come, not normalised, and the distance is not used; ``penalty`` is ``"mse"`` or
    ``"smooth_l1"``, with its turn at 1. Shapes: embeddings and ref_emb (B, D); one value per sample. Source: Budnik and
    Avrithis, "Asymmetric metric learning for knowledge transfer", CVPR 2021; stage one of Reddy et al., "Context
    Unaware Knowledge Distillation for Image Retrieval", 2022, whose scale this is.
    """

    equal_widths = True
    takes_pairs = False

    def __init__(self, penalty: str = "mse", **kwargs):
        super().__init__(**kwargs)
        if penalty not in ("mse", "smooth_l1"):
            raise ValueError(f'penalty must be "mse" or "smooth_l1", but is {penalty!r}.')
        self.penalty = penalty

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        penalty = F.mse_loss if self.penalty == "mse" else F.smooth_l1_loss
        return {"loss": entry(penalty(embeddings, ref_emb, reduction="none").mean(dim=1))}
