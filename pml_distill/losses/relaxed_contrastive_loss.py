from torch.nn import functional as F

from .base_distillation_loss import BaseDistillationLoss, diagonal_mask, set_numbers, unit_rows
from .rkd_distance_loss import SMALLEST


class RelaxedContrastiveLoss(BaseDistillationLoss):
    r"""A contrastive loss whose labels are the teacher's similarities, between 0 and 1 (relaxed contrastive, RC).

    .. math:: L_{ij} = w_{ij} \, \bar d_{ij}^2 + (1 - w_{ij}) \, [\delta - \bar d_{ij}]_+^2, \quad
        w_{ij} = e^{-d_t(x_i, x_j)^2 / \sigma}, \quad
        \bar d_{ij} = \frac{d_s(x_i, x_j)}{\frac{1}{B} \sum_k d_s(x_i, x_k)}, \quad i \neq j

    sigma is the width of the teacher's kernel, delta the margin. ``distance`` is no similarity, and at least 1e-6; the
    teacher's embeddings are L2-normalised, whatever it is. Gradients flow through the row's mean, which is that of the
    whole row also with a miner's pairs. Shapes: embeddings (B, Ds), ref_emb (B, Dt); one value per ordered pair.
    Source: Kim et al., "Embedding Transfer with Label Relaxation for Improved Metric Learning", CVPR 2021. Multiply by
    B - 1 for their scale; their student is not normalised: ``distance=LpDistance(normalize_embeddings=False)``.
    """

    needs_proper_distance = True

    def __init__(self, sigma: float = 1.0, delta: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        set_numbers(self, sigma=sigma, delta=delta)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        if len(embeddings) < 2:
            return self.zero_losses()
        weights = (-self.distance_matrix(unit_rows(ref_emb)).square() / self.sigma).exp()
        # Only the diagonal is zero: cdist leaves rounding on it, and a row of duplicates needs a mean to divide by.
        distances = self.distance_matrix(embeddings).clamp(min=SMALLEST).masked_fill(diagonal_mask(embeddings), 0)
        distances = distances / distances.mean(dim=1, keepdim=True)
        pull, push = distances.square(), F.relu(self.delta - distances).square()
        return self.pair_losses(push + weights * (pull - push), indices_tuple, embeddings)
