import torch
from pytorch_metric_learning.distances import BaseDistance


def similarity_score(mat: torch.Tensor, distance: BaseDistance, alpha: float, beta: float) -> torch.Tensor:
    """Return DarkRank's score -alpha d^beta (AAAI 2018, Eq. 4), for a similarity alpha sign(d) abs(d)^beta."""
    if beta < 1:
        # The power's slope is infinite at 0; there the score gets no gradient.
        mat = torch.where(mat == 0, mat.detach().clamp(min=torch.finfo(mat.dtype).tiny), mat)
    if distance.is_inverted:
        return alpha * mat.sign() * mat.abs().pow(beta)
    return -alpha * mat.pow(beta)
