from .base_distillation_loss import BaseDistillationLoss


class AbsoluteTeacherLoss(BaseDistillationLoss):
    r"""The distance between a sample's student and teacher embeddings.

    .. math:: L_i = d(f_s(x_i), f_t(x_i))

    With the default distance this is the Euclidean distance, not squared, in [0, 2]. For an inverted distance
    (cosine, dot product) it is the similarity that is missing, d(f_t, f_t) - d(f_s, f_t); 1 - cos for the cosine.
    ``indices_tuple`` has no meaning for single samples and is ignored.

    Source: the absolute teacher of Yu et al., "Learning Metrics from Teachers", CVPR 2019. The default mean over
    the batch is the authors' own scale; like their code, PML's ``LpDistance`` adds 1e-6 to each coordinate of the
    difference. They use lambda = 1.0 (CUB), 1.5 (Cars), 2.0 (SOP) beside a triplet loss at B = 32.

    Args:
        **kwargs: ``distance``, ``reducer``, ``embedding_regularizer`` as in every PML loss.

    Shapes:
        embeddings and ref_emb: (B, D), of equal widths. Reducer input: ``loss``, one value per sample (``element``).

    Raises:
        ValueError: ``ref_emb`` is missing or differs in shape.

    Example:
        >>> import torch
        >>> teacher = torch.eye(3)
        >>> loss = AbsoluteTeacherLoss()(-teacher, ref_emb=teacher)
        >>> round(loss.item(), 4)
        2.0
    """

    equal_widths = True
    takes_pairs = False

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        student = self.distance.maybe_normalize(self.directed(embeddings))
        teacher = self.distance.maybe_normalize(ref_emb)
        losses = self.distance.pairwise_distance(student, teacher) ** self.distance.power
        if self.distance.is_inverted:
            losses = self.distance.pairwise_distance(teacher, teacher) ** self.distance.power - losses
        return self.query_losses(losses, None, embeddings)
