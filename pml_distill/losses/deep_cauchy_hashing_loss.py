import torch
from pytorch_metric_learning.distances import CosineSimilarity

from .base_distillation_loss import cut_zero_rows, set_numbers
from .base_hashing_loss import BaseHashingLoss

# The least product of two lengths that the authors divide by.
LEAST_PRODUCT = 1e-4


class DeepCauchyHashingLoss(BaseHashingLoss):
    r"""Similar pairs within a small Hamming radius, by a likelihood with the tail of a Cauchy distribution (DCH).

    .. math:: d_{ij} &= \tfrac{K}{2} (1 - \min(\cos(u_i, u_j), 0.99)) \\
        L &= \frac{1}{B^2} \sum_{ij} w_{ij} \left( s_{ij} \log \frac{d_{ij}}{\gamma}
             + \log\left(1 + \frac{\gamma}{d_{ij}}\right) \right)
             + \lambda \frac{1}{B} \sum_i \log\left(1 + \frac{d(|u_i|, 1)}{\gamma}\right)

    K is the number of bits; s_ij is 1 for pairs of one class, or with a label in common, and w_ij gives half of the
    weight to either kind. As in the authors' code, the diagonal is among the similar pairs and inner products are
    divided by at least 1e-4. A zero row counts as orthogonal to all and gets no gradient. Shapes: embeddings (B, bits),
    labels (B,) or multi-hot (B, C); or ``loss(outputs, similarity=matrix)`` with a (B, B) matrix of 0 and 1. One value
    per ordered pair and one per sample. Source: Cao et al., "Deep Cauchy Hashing for Hamming Space Retrieval", CVPR
    2018; the defaults of ``gamma``, within which pairs count as near, and lambda, the ``quantization_weight``, are
    those of Reddy et al. 2022.
    """

    def __init__(self, gamma: float = 20, quantization_weight: float = 0.1, **kwargs):
        super().__init__(**kwargs)
        set_numbers(self, gamma=gamma)
        set_numbers(self, 0, quantization_weight=quantization_weight)
        if not isinstance(self.distance, CosineSimilarity):
            raise ValueError(f"distance must be CosineSimilarity(), but is a {type(self.distance).__name__}.")

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, similarity=None):
        # Normalisation would multiply the gradient of a zero row by 1e12.
        embeddings = cut_zero_rows(embeddings)
        similar = self.similar(labels, similarity, len(embeddings))
        lengths, bits = torch.linalg.vector_norm(embeddings, dim=1), embeddings.shape[1]
        distances = self.hamming(self.distance(embeddings), lengths[:, None] * lengths, bits)
        likelihood = similar * (distances / self.gamma).log() + (self.gamma / distances).log1p()
        # The cosine of |u| and (1, ..., 1).
        cosines = self.distance.normalize(embeddings.abs()).sum(dim=1) / bits**0.5
        off = self.quantization_weight * (self.hamming(cosines, lengths * bits**0.5, bits) / self.gamma).log1p()
        return self.parts(self.balance(similar, likelihood.dtype) * likelihood, off)

    def hamming(self, cosines: torch.Tensor, products: torch.Tensor, bits: int) -> torch.Tensor:
        """Return the relaxed Hamming distance, at least 0.005 K, for cosines and the products of the two lengths."""
        cosines = cosines * (products / LEAST_PRODUCT).clamp(max=1)
        return (1 - cosines.clamp(max=0.99)) * bits / 2

    def get_default_distance(self):
        return CosineSimilarity()
