import torch
from pytorch_metric_learning.distances import BaseDistance


def similarity_score(mat: torch.Tensor, distance: BaseDistance, alpha: float, beta: float) -> torch.Tensor:
    r"""DarkRank's similarity score of a matrix of distances: larger is nearer.

    .. math:: S = -\alpha \, d^\beta \quad (Eq. 4)

    For an inverted distance, whose values d are similarities of either sign: alpha * sign(d) * abs(d)^beta.
    Use beta = 1 there unless values near zero shall matter less.

    Source: Chen et al., "DarkRank", AAAI 2018, Eq. 4. The authors' operators take -(scale * d^2)^power:
    alpha = scale^power, beta = 2 * power.
    """
    if beta < 1:
        # The power's slope is infinite at 0; there the score gets no gradient.
        mat = torch.where(mat == 0, mat.detach().clamp(min=torch.finfo(mat.dtype).tiny), mat)
    if distance.is_inverted:
        return alpha * mat.sign() * mat.abs().pow(beta)
    return -alpha * mat.pow(beta)
