from .base_distillation_loss import BaseDistillationLoss, entry


class AbsoluteTeacherLoss(BaseDistillationLoss):
    """The distance between a sample's student and teacher embeddings (absolute teacher).

    .. math:: L_i = d(f_s(x_i), f_t(x_i))

    The default distance is Euclidean, not squared. For a similarity it is d(f_t, f_t) - d(f_s, f_t): 1 - cos for the
    cosine; a dot product of embeddings that are not normalised is refused. Shapes: embeddings and ref_emb (B, D); one
    value per sample. Source: Yu et al., "Learning Metrics from Teachers", CVPR 2019, whose scale this is, with weights
    of 1.0 (CUB), 1.5 (Cars) and 2.0 (SOP) beside a triplet loss at B = 32.
    """

    equal_widths = True
    takes_pairs = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.distance.is_inverted and not self.distance.normalize_embeddings:
            raise ValueError(
                f"distance is a {type(self.distance).__name__} with normalize_embeddings=False, for which the loss has "
                "no lower bound. Use normalize_embeddings=True or a distance."
            )

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        student = self.distance.maybe_normalize(self.directed(embeddings))
        teacher = self.distance.maybe_normalize(ref_emb)
        losses = self.distance.pairwise_distance(student, teacher) ** self.distance.power
        if self.distance.is_inverted:
            losses = self.distance.pairwise_distance(teacher, teacher) ** self.distance.power - losses
        return {"loss": entry(losses)}
