import torch
from pytorch_metric_learning.distances import BaseDistance

from .packed_codes import unpack_codes


class HammingDistance(BaseDistance):
    r"""The number of bits in which two codes differ.

    .. math:: d(u, v) = \frac{K - \langle u, v \rangle}{2}

    for codes of -1 and 1, (N, K) and (M, K); between these values it is the linear relaxation, with gradients. Packed
    codes (``uint8``, eight bits to a byte) are unpacked first. Give the signs of a network's outputs to search.
    """

    def __init__(self, **kwargs):
        super().__init__(normalize_embeddings=False, **kwargs)

    def forward(self, query_emb: torch.Tensor, ref_emb: torch.Tensor | None = None) -> torch.Tensor:
        """Return the (N, M) matrix of distances."""
        query_emb, ref_emb = self.unpacked(query_emb, query_emb if ref_emb is None else ref_emb)
        return super().forward(query_emb, ref_emb)

    def compute_mat(self, query_emb: torch.Tensor, ref_emb: torch.Tensor) -> torch.Tensor:
        """Return the matrix for codes that are not packed."""
        return (query_emb.shape[1] - query_emb @ ref_emb.T) / 2

    def pairwise_distance(self, query_emb: torch.Tensor, ref_emb: torch.Tensor) -> torch.Tensor:
        """Return the (N,) distances row for row."""
        query_emb, ref_emb = self.unpacked(query_emb, ref_emb)
        return (query_emb.shape[1] - (query_emb * ref_emb).sum(dim=1)) / 2

    @staticmethod
    def unpacked(query_emb: torch.Tensor, ref_emb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both as floating point codes, if they fit each other."""
        packed = [x.dtype == torch.uint8 for x in (query_emb, ref_emb)]
        if packed[0] != packed[1] or query_emb.shape[1] != ref_emb.shape[1]:
            given = f"{query_emb.dtype} {tuple(query_emb.shape)} and {ref_emb.dtype} {tuple(ref_emb.shape)}"
            raise ValueError(f"query_emb and ref_emb must be of one length, both packed or both not, but are {given}.")
        if packed[0]:
            return unpack_codes(query_emb, 8 * query_emb.shape[1]), unpack_codes(ref_emb, 8 * query_emb.shape[1])
        # Sums of small integers would overflow.
        query_emb, ref_emb = (x if x.is_floating_point() else x.float() for x in (query_emb, ref_emb))
        return query_emb, ref_emb
