from .base_distillation_loss import BaseDistillationLoss, unit_rows


class SimilarityPreservingLoss(BaseDistillationLoss):
    r"""The batch's inner products, row by row at length 1, taught to the student.

    .. math:: L_i = \frac{1}{B} \sum_j \big(\tilde G^s_{ij} - \tilde G^t_{ij}\big)^2, \quad
        G = F F^\top, \quad \tilde G_i = G_i / \|G_i\|_2

    Embeddings enter as they come, not normalised, and the distance is not used. The two widths may differ; the
    spaces do not end up aligned. With ``indices_tuple`` a query's row holds itself and those it is paired with,
    over which it is averaged; queries without any are left out.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019. The default mean
    over rows is the authors' own scale (a sum over B^2 entries, divided by B^2); they use weight 3000, for
    classification. The row of G of a zero embedding gets no gradient here, and one multiplied by 1e12 in their code.

    Args:
        **kwargs: ``reducer``, ``embedding_regularizer`` as in every PML loss.

    Shapes:
        embeddings: (B, Ds), ref_emb: (B, Dt). Reducer input: ``loss``, one value per query (``element``).

    Raises:
        ValueError: ``ref_emb`` is missing or differs in rows.

    Example:
        >>> import torch
        >>> SimilarityPreservingLoss()(torch.eye(4), ref_emb=3 * torch.eye(4, 7)).item()
        0.0
    """

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        if len(embeddings) < 2:
            return self.zero_losses()
        student, teacher = embeddings @ embeddings.t(), ref_emb @ ref_emb.t()
        if indices_tuple is not None:
            outside = ~self.pair_mask(indices_tuple, embeddings).fill_diagonal_(True)
            student, teacher = student.masked_fill(outside, 0), teacher.masked_fill(outside, 0)
        losses = (unit_rows(student) - unit_rows(teacher)).square()
        losses = losses.mean(dim=1) if indices_tuple is None else losses.sum(dim=1) / (~outside).sum(dim=1)
        return self.query_losses(losses, indices_tuple, embeddings)
