from .base_distillation_loss import BaseDistillationLoss, set_numbers
from .dark_rank_loss import similarity_scores


class SimilarityRegressionLoss(BaseDistillationLoss):
    r"""The squared difference between the student's and the teacher's similarity scores (DarkRank's "direct match").

    .. math:: L_{ij} = (S_s(x_i, x_j) - S_t(x_i, x_j))^2, \quad S = -\alpha \, d^\beta, \quad i \neq j

    For a similarity (cosine, dot product) the score is alpha * sign(d) * abs(d)^beta. Shapes: embeddings (B, Ds),
    ref_emb (B, Dt); one value per ordered pair. Source: Chen et al., "DarkRank", AAAI 2018, Eq. 8, with its alpha and
    beta. Multiply by B - 1 for the sum over the candidates of one query.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 2.0, **kwargs):
        super().__init__(**kwargs)
        set_numbers(self, alpha=alpha, beta=beta)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        losses = (similarity_scores(self, embeddings) - similarity_scores(self, ref_emb)).square()
        return self.pair_losses(losses, indices_tuple, embeddings)
