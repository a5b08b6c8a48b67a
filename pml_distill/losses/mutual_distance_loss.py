import torch

from ..distances import EuclideanDistance
from .base_distillation_loss import set_not_negative
from .base_gallery_loss import LEAST_DISTANCE, BaseGalleryLoss


class MutualDistanceLoss(BaseGalleryLoss):
    r"""Distances of the student's queries to the teacher's gallery, held to those of the teacher's queries (MKD).

    .. math:: L_i = \alpha \, \big( d(s_i, t_i) - 10^{-6} \big)^2 +
        \frac{\beta}{|G \setminus i|} \sum_{j \in G \setminus i} \big( d(s_i, g_j) - d(t_i, g_j) \big)^2

    The gallery G is the batch or a queue; in a queue no row counts as the query's own. The sub-losses ``own`` and
    ``others`` are reduced one by one and added.

    Source: the code of Xie et al., "Capacity Dynamic Distillation", CVPR 2023 (``MKD``), there on attention maps. It
    sums over the others: multiply ``beta`` by B - 1 for its scale. Xie et al., DEAP, Pattern Recognition 152, 2024, has
    alpha 10 and beta 1 in those sums.

    Args:
        alpha: weight of the distance to the own teacher.
        beta: weight of the distances to the others.
        **kwargs: as in ``BaseGalleryLoss``; ``distance`` is ``EuclideanDistance()`` by default and no similarity.

    Shapes: embeddings and ref_emb (B, D). Two times one value per query (``element``).
    """

    needs_proper_distance = True

    def __init__(self, alpha: float = 1.0, beta: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        set_not_negative(self, alpha=alpha, beta=beta)

    def get_default_distance(self) -> EuclideanDistance:
        """Return the distance to use where none is given."""
        return EuclideanDistance()

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        student, teacher, filled = self.closeness(embeddings, ref_emb)
        counted = filled.expand_as(student)
        if self.queue is None:
            counted = counted & ~torch.eye(len(filled), dtype=torch.bool, device=filled.device)
        errors = (student - teacher).square() * counted
        others = self.beta * errors.sum(dim=1) / counted.sum(dim=1).clamp(min=1)
        to_batch = student if self.queue is None else self.closeness_to(ref_emb, embeddings)
        own = self.alpha * (to_batch.diagonal() + LEAST_DISTANCE).square()
        return {
            **self.query_losses(own, None, embeddings, "own"),
            **self.query_losses(others, None, embeddings, "others"),
        }

    def _sub_loss_names(self):
        return ["own", "others"]
