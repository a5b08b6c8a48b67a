import torch

from .base_distillation_loss import BaseDistillationLoss, cut_zero_rows

EPSILON = 1e-7


class ProbabilisticTransferLoss(BaseDistillationLoss):
    r"""Each query's distribution over its neighbours, under a cosine kernel, taught to the student (PKT).

    .. math:: L_i = \sum_j p^t_{ij} \log \frac{p^t_{ij} + \epsilon}{p^s_{ij} + \epsilon}, \quad
        p_{ij} = \frac{1 + \cos(f_i, f_j)}{\sum_k 1 + \cos(f_i, f_k)}, \quad \epsilon = 10^{-7}

    The Kullback-Leibler divergence of each row, the query itself among the candidates; the cosines are of rows that
    are divided by their length plus :math:`\epsilon`. The distance is not used; the two widths may differ; the spaces
    do not end up aligned. With ``indices_tuple`` the candidates of a query are itself and those it is paired with;
    queries without any are left out.

    Source: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018.
    The authors average over all B^2 entries: divide by B for their scale (a weight of 30000 there is 30000 / B
    here). Their code gives NaN gradients for a zero row; here it has cosine 0 to all, and no gradient.

    Args:
        **kwargs: ``reducer``, ``embedding_regularizer`` as in every PML loss.

    Shapes:
        embeddings: (B, Ds), ref_emb: (B, Dt). Reducer input: ``loss``, one value per query (``element``).

    Raises:
        ValueError: ``ref_emb`` is missing or differs in rows.

    Example:
        >>> import torch
        >>> round(ProbabilisticTransferLoss()(torch.eye(4), ref_emb=3 * torch.eye(4, 7)).item(), 6)
        0.0
    """

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        if len(embeddings) < 2:
            return self.zero_losses()
        candidates = None
        if indices_tuple is not None:
            candidates = self.pair_mask(indices_tuple, embeddings).fill_diagonal_(True)
        student, teacher = probabilities(embeddings, candidates), probabilities(ref_emb, candidates)
        losses = teacher * ((teacher + EPSILON).log() - (student + EPSILON).log())
        return self.query_losses(losses.sum(dim=1), indices_tuple, embeddings)


def probabilities(embeddings: torch.Tensor, candidates: torch.Tensor | None) -> torch.Tensor:
    """Return the (B, B) probabilities of each row's candidates under the cosine kernel."""
    rows = cut_zero_rows(embeddings)
    unit = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + EPSILON)
    kernel = (unit @ unit.t() + 1).clamp(min=0)
    if candidates is not None:
        kernel = kernel * candidates
    return kernel / kernel.sum(dim=1, keepdim=True)
