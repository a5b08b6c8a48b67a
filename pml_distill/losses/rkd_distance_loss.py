from torch.nn import functional as F

from .base_distillation_loss import BaseDistillationLoss, off_diagonal

# The least distance, as in the authors' code: duplicates count, and a batch of nothing else has a mean to divide by.
SMALLEST = 1e-6


class RKDDistanceLoss(BaseDistillationLoss):
    r"""Relational distillation of distances, each divided by the batch's mean distance (RKD-D).

    .. math:: L_{ij} = \ell\Big(\frac{d_s(x_i, x_j)}{\mu_s}, \frac{d_t(x_i, x_j)}{\mu_t}\Big), \quad
        \mu = \frac{1}{B(B-1)} \sum_{i \neq j} d(x_i, x_j), \quad \ell \text{ smooth L1}

    The distance is no similarity, and at least 1e-6. Gradients flow through the student's mean, which is that of the
    whole batch also with a miner's pairs. ``RKDLoss`` adds the angles. Shapes: embeddings (B, Ds), ref_emb (B, Dt); one
    value per ordered pair. Source: Park et al., "Relational Knowledge Distillation", CVPR 2019. Multiply by (B - 1) / B
    for their mean over B^2; their embeddings are not normalised: ``distance=LpDistance(normalize_embeddings=False)``.
    """

    needs_proper_distance = True

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        if len(embeddings) < 2:
            return self.zero_losses()
        distances = (self.distance_matrix(rows).clamp(min=SMALLEST) for rows in (embeddings, ref_emb))
        student, teacher = (mat / off_diagonal(mat).mean() for mat in distances)
        return self.pair_losses(F.smooth_l1_loss(student, teacher, reduction="none"), indices_tuple, embeddings)
