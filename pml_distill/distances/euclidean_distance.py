from typing import Any

import torch
from pytorch_metric_learning.distances import LpDistance

from ..utils.tensors import own_gradient


class EuclideanDistance(LpDistance):
    r"""PML's ``LpDistance(p=2)`` with a faster matrix of a batch against itself.

    .. math:: d_{ij} = \sqrt{\max(0, |x_i|^2 + |x_j|^2 - 2 x_i \cdot x_j)}

    Being symmetric, its gradient needs one product, where ``torch.cdist`` makes two. Its diagonal is exactly zero, and
    so is the gradient at distance zero. The default of the distillation losses; arguments are those of ``LpDistance``.
    """

    def __init__(self, normalize_embeddings: bool = True, **kwargs: Any):
        super().__init__(normalize_embeddings=normalize_embeddings, p=2, **kwargs)

    def compute_mat(self, query_emb: torch.Tensor, ref_emb: torch.Tensor) -> torch.Tensor:
        """Return the matrix of distances."""
        if ref_emb is query_emb:  # as PML passes a batch against itself
            # Half precision would leave nothing of the difference between nearly equal squares.
            with torch.autocast(query_emb.device.type, enabled=False):
                return own_gradient(SelfDistance, query_emb)
        return super().compute_mat(query_emb, ref_emb)


class SelfDistance(torch.autograd.Function):
    """Euclidean distances of all rows to each other: (B, D) -> (B, B)."""

    @staticmethod
    def forward(embeddings):
        """Compute from the Gram product."""
        squares = embeddings.square().sum(dim=1)
        mat = torch.addmm(squares[:, None] + squares, embeddings, embeddings.t(), alpha=-2)
        mat = mat.clamp_(min=0).sqrt_()
        mat.diagonal().zero_()  # fill_diagonal_ would make a graph of its own for each batch size
        return mat

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep both."""
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx, grad):
        """Sum (x_i - x_j) / d_ij over both places of each pair, zero where d_ij is."""
        embeddings, mat = ctx.saved_tensors
        ratio = (grad / mat).masked_fill_(mat == 0, 0)
        ratio = ratio + ratio.t()
        return torch.addmm(embeddings * ratio.sum(dim=1, keepdim=True), ratio, embeddings, alpha=-1)
