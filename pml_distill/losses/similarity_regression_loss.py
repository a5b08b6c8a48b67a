from .base_distillation_loss import BaseDistillationLoss, set_positive
from .dark_rank_loss import similarity_score


class SimilarityRegressionLoss(BaseDistillationLoss):
    r"""The squared difference between the student's and the teacher's similarity scores (DarkRank's "direct match").

    .. math:: L_{ij} = (S_s(x_i, x_j) - S_t(x_i, x_j))^2, \quad S = -\alpha \, d^\beta, \quad i \neq j

    For a similarity (cosine, dot product) the score is alpha * sign(d) * abs(d)^beta.

    Source: Chen et al., "DarkRank", AAAI 2018, Eq. 8, with its alpha and beta. Multiply by B - 1 for the sum over the
    candidates of one query.

    Args:
        alpha: scale of the score.
        beta: power of the distance.

    Shapes: embeddings (B, Ds), ref_emb (B, Dt). One value per ordered pair (``pos_pair``).
    """

    def __init__(self, alpha: float = 1.0, beta: float = 2.0, **kwargs):
        super().__init__(**kwargs)
        set_positive(self, alpha=alpha, beta=beta)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        student = similarity_score(self.distance_matrix(embeddings), self.distance, self.alpha, self.beta)
        teacher = similarity_score(self.distance_matrix(ref_emb), self.distance, self.alpha, self.beta)
        return self.pair_losses((student - teacher).square(), indices_tuple, embeddings)
