from collections.abc import Callable

import torch
from torch.nn import functional as F

from .base_distillation_loss import BaseDistillationLoss

PENALTIES: dict[str, Callable[..., torch.Tensor]] = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


class RegressionTeacherLoss(BaseDistillationLoss):
    r"""Plain regression of the teacher's embedding, coordinate by coordinate.

    .. math:: L_i = \frac{1}{D} \sum_c \ell\big(f_s(x_i)_c - f_t(x_i)_c\big), \quad
        \ell(u) = u^2 \;\text{(mse)} \;\text{or smooth L1}

    Embeddings are compared as they come, not normalised, and the distance is not used; ``indices_tuple`` has no
    meaning for single samples and is ignored. Student and teacher spaces end up aligned.

    Source: the regression that Budnik and Avrithis, "Asymmetric metric learning for knowledge transfer", CVPR
    2021, found hard to beat; stage one of Reddy et al., "Context Unaware Knowledge Distillation for Image
    Retrieval", 2022, whose scale (the mean over all elements) is the default here. The ``match`` operator of the
    authors of DarkRank (Chen et al., AAAI 2018) sums over coordinates and rows, and again over the first half of
    the batch: factor B D (B // 2).

    Args:
        penalty: ``"mse"``: squared difference; ``"smooth_l1"``: smooth L1 with its turn at 1.
        **kwargs: ``reducer``, ``embedding_regularizer`` as in every PML loss.

    Shapes:
        embeddings and ref_emb: (B, D), of equal widths. Reducer input: ``loss``, one value per sample (``element``).

    Raises:
        ValueError: ``penalty`` is neither of the two; ``ref_emb`` is missing or differs in shape.

    Example:
        >>> import torch
        >>> RegressionTeacherLoss()(torch.zeros(3, 4), ref_emb=2 * torch.ones(3, 4)).item()
        4.0
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
