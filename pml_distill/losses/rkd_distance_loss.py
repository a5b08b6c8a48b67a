import torch
from torch.nn import functional as F

from .base_distillation_loss import BaseDistillationLoss, off_diagonal

# The least distance, as in the authors' code: duplicates count, and a batch of nothing else has a mean to divide by.
SMALLEST = 1e-6


class RKDDistanceLoss(BaseDistillationLoss):
    r"""Relational distillation of distances: each divided by the batch's mean distance, then compared.

    .. math:: L_{ij} = \ell\Big(\frac{d_s(x_i, x_j)}{\mu_s}, \frac{d_t(x_i, x_j)}{\mu_t}\Big), \quad
        \mu = \frac{1}{B(B-1)} \sum_{i \neq j} d(x_i, x_j), \quad \ell \text{ smooth L1}

    The two widths and scales may differ; the spaces do not end up aligned. Gradients flow through the student's
    mean. With ``indices_tuple`` only its pairs count, while the means stay those of the whole batch.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019. The authors average over all
    B^2 entries, the zero diagonal included: multiply by (B - 1) / B for their scale. They use weight 1 for metric
    learning (with 2 for the angles) and 25 for classification, on embeddings that are not normalised:
    ``distance=LpDistance(normalize_embeddings=False)``. Like theirs, distances below 1e-6 count as 1e-6.

    Args:
        **kwargs: ``distance``, ``reducer``, ``embedding_regularizer`` as in every PML loss.

    Shapes:
        embeddings: (B, Ds), ref_emb: (B, Dt). Reducer input: ``loss``, one value per ordered pair (``pos_pair``).

    Raises:
        ValueError: the distance is inverted (a similarity has no mean to divide by); ``ref_emb`` is missing or
            differs in rows.

    Example:
        >>> import torch
        >>> student, teacher = torch.eye(4), 3 * torch.eye(4, 7)
        >>> round(RKDDistanceLoss()(student, ref_emb=teacher).item(), 6)
        0.0
    """

    needs_proper_distance = True

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        if len(embeddings) < 2:
            return self.zero_losses()
        losses = F.smooth_l1_loss(self.relations(embeddings), self.relations(ref_emb), reduction="none")
        return self.pair_losses(losses, indices_tuple, embeddings)

    def relations(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the (B, B) distances in units of their mean."""
        distances = self.distance_matrix(embeddings).clamp(min=SMALLEST)
        return distances / off_diagonal(distances).mean()
