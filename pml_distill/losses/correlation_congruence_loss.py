import math

import torch

from .base_distillation_loss import BaseDistillationLoss, set_numbers, unit_rows


class CorrelationCongruenceLoss(BaseDistillationLoss):
    r"""The correlation of samples under a Gaussian kernel (correlation congruence, CC or CCKD).

    .. math:: L_{ij} = (K^s_{ij} - K^t_{ij})^2, \quad
        K_{ij} = \sum_{p=0}^{P} e^{-2\gamma} \frac{(2\gamma)^p}{p!} \cos(f_i, f_j)^p, \quad i \neq j

    K is the Taylor series, up to the ``order`` P, of exp(-gamma \|f_i - f_j\|^2) for L2-normalised embeddings. The
    distance is not used. Shapes: embeddings (B, Ds), ref_emb (B, Dt); one value per ordered pair. Source: Peng et al.,
    "Correlation Congruence for Knowledge Distillation", ICCV 2019. Multiply by (B - 1) / B for their mean over B^2.
    """

    def __init__(self, gamma: float = 0.4, order: int = 2, **kwargs):
        super().__init__(**kwargs)
        set_numbers(self, gamma=gamma)
        set_numbers(self, 1, order=order)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        losses = (self.correlation(embeddings) - self.correlation(ref_emb)).square()
        return self.pair_losses(losses, indices_tuple, embeddings)

    def correlation(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the (B, B) kernel matrix K."""
        unit = unit_rows(embeddings)
        cosine = unit @ unit.t()
        # Horner's scheme, from the highest order down.
        series = torch.full_like(cosine, (2 * self.gamma) ** self.order / math.factorial(self.order))
        for order in range(self.order - 1, -1, -1):
            series = series * cosine + (2 * self.gamma) ** order / math.factorial(order)
        return math.exp(-2 * self.gamma) * series
