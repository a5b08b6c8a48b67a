from .base_distillation_loss import BaseDistillationLoss, diagonal_mask, unit_rows


class SimilarityPreservingLoss(BaseDistillationLoss):
    r"""The batch's inner products, row by row at length 1 (similarity preserving, SP).

    .. math:: L_i = \frac{1}{B} \sum_j \big(\tilde G^s_{ij} - \tilde G^t_{ij}\big)^2, \quad
        G = F F^\top, \quad \tilde G_i = G_i / \|G_i\|_2

    Embeddings enter as they come, and the distance is not used. With a miner's pairs a row holds the query itself and
    those it is paired with, and is averaged over these. Shapes: embeddings (B, Ds), ref_emb (B, Dt); one value per
    query. Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, whose scale this is, with
    weight 3000.
    """

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        if len(embeddings) < 2:
            return self.zero_losses()
        student, teacher = embeddings @ embeddings.t(), ref_emb @ ref_emb.t()
        if indices_tuple is not None:
            indices_tuple = self.pair_mask(indices_tuple, embeddings)
            outside = ~(indices_tuple | diagonal_mask(embeddings))
            student, teacher = student.masked_fill(outside, 0), teacher.masked_fill(outside, 0)
        losses = (unit_rows(student) - unit_rows(teacher)).square()
        losses = losses.mean(dim=1) if indices_tuple is None else losses.sum(dim=1) / (~outside).sum(dim=1)
        return self.query_losses(losses, indices_tuple, embeddings)
