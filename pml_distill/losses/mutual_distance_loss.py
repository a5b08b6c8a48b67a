from ..distances import EuclideanDistance
from .base_distillation_loss import diagonal_mask, entry, set_numbers
from .base_gallery_loss import LEAST_DISTANCE, BaseGalleryLoss


class MutualDistanceLoss(BaseGalleryLoss):
    r"""Distances of the student's queries to the teacher's gallery, held to those of the teacher's queries (MKD).

    .. math:: L_i = \alpha \, \big( d(s_i, t_i) - 10^{-6} \big)^2 +
        \frac{\beta}{|G \setminus i|} \sum_{j \in G \setminus i} \big( d(s_i, g_j) - d(t_i, g_j) \big)^2

    The gallery G is the batch or a queue; in a queue no row counts as the query's own. ``distance`` is no similarity,
    by default ``EuclideanDistance()``; other arguments are those of ``BaseGalleryLoss``. Shapes: embeddings and ref_emb
    (B, D); ``own`` and ``others``, reduced one by one and added: one value per query. Source: the code of Xie et al.,
    "Capacity Dynamic Distillation", CVPR 2023, there on attention maps. It sums over the others: multiply ``beta`` by B
    - 1 for its scale. Xie et al., DEAP, Pattern Recognition 152, 2024, has alpha 10 and beta 1 in those sums.
    """

    default_distance = EuclideanDistance
    needs_proper_distance = True
    part_names = "own", "others"

    def __init__(self, alpha: float = 1.0, beta: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        set_numbers(self, 0, alpha=alpha, beta=beta)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        student, teacher, filled = self.closeness(embeddings, ref_emb)
        to_batch, counted = student, filled.expand_as(student)
        if self.queue is None:
            counted = counted & ~diagonal_mask(student)
        else:
            to_batch = self.closeness_to(ref_emb, embeddings)
        own = self.alpha * (to_batch.diagonal() + LEAST_DISTANCE).square()
        errors = (student - teacher).square() * counted
        others = self.beta * errors.sum(dim=1) / counted.sum(dim=1).clamp(min=1)
        return {"own": entry(own), "others": entry(others)}
