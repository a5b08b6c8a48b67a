import torch

from .base_distillation_loss import BaseDistillationLoss, cut_zero_rows, diagonal_mask

EPSILON = 1e-7


class ProbabilisticTransferLoss(BaseDistillationLoss):
    r"""Each query's distribution over its neighbours under a cosine kernel (probabilistic knowledge transfer, PKT).

    .. math:: L_i = \sum_j p^t_{ij} \log \frac{p^t_{ij} + \epsilon}{p^s_{ij} + \epsilon}, \quad
        p_{ij} = \frac{1 + \cos(f_i, f_j)}{\sum_k 1 + \cos(f_i, f_k)}, \quad \epsilon = 10^{-7}

    The query itself is a candidate; a miner's pairs restrict the others. The distance is not used. Shapes: embeddings
    (B, Ds), ref_emb (B, Dt); one value per query. Source: Passalis and Tefas, "Learning Deep Representations with
    Probabilistic Knowledge Transfer", ECCV 2018. Divide by B for their mean over B^2: their weight of 30000 is 30000 /
    B here.
    """

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        if len(embeddings) < 2:
            return self.zero_losses()
        candidates = None
        if indices_tuple is not None:
            indices_tuple = self.pair_mask(indices_tuple, embeddings)
            candidates = indices_tuple | diagonal_mask(embeddings)
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
