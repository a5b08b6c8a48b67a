from .base_distillation_loss import BaseDistillationLoss, check_positive
from .similarity_score import similarity_score


class SimilarityRegressionLoss(BaseDistillationLoss):
    r"""The squared difference between the student's and the teacher's similarity scores, over pairs of samples.

    .. math:: L_{ij} = (S_s(x_i, x_j) - S_t(x_i, x_j))^2, \quad S = -\alpha \, d^\beta, \quad i \neq j

    DarkRank's direct baseline: it asks the student for the teacher's very scores where ``DarkRankLoss`` asks
    only for their order. For an inverted distance (cosine, dot product) the score is
    alpha * sign(d) * abs(d)^beta.

    Source: "direct match", Eq. 8 of Chen et al., "DarkRank", AAAI 2018; alpha = 1 and beta = 2, the defaults,
    are that equation. The paper sums over the candidates of one query: multiply the default mean by B - 1 for
    that scale. The authors' operator sums over the first half of the batch as queries: factor
    (B // 2) * (B - 1).

    Args:
        alpha: scale of the score, positive.
        beta: power of the distance, positive.
        **kwargs: ``distance``, ``reducer``, ``embedding_regularizer`` as in every PML loss.

    Shapes:
        embeddings: (B, Ds), ref_emb: (B, Dt). Reducer input: ``loss``, one value per ordered pair (``pos_pair``).

    Raises:
        ValueError: ``alpha`` or ``beta`` is not positive; ``ref_emb`` is missing or differs in rows.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0], [-1.0]])
        >>> round(SimilarityRegressionLoss()(student, ref_emb=teacher).item(), 4)  # (2 - 4)^2
        4.0
    """

    def __init__(self, alpha: float = 1.0, beta: float = 2.0, **kwargs):
        super().__init__(**kwargs)
        check_positive(alpha=alpha, beta=beta)
        self.alpha, self.beta = alpha, beta
        self.add_to_recordable_attributes(list_of_names=["alpha", "beta"], is_stat=False)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        student = similarity_score(self.distance_matrix(embeddings), self.distance, self.alpha, self.beta)
        teacher = similarity_score(self.distance_matrix(ref_emb), self.distance, self.alpha, self.beta)
        return self.pair_losses((student - teacher).square(), indices_tuple, embeddings)
