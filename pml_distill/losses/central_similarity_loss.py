import torch
from torch.nn import functional as F

from .base_distillation_loss import set_numbers
from .base_hashing_loss import BaseHashingLoss
from .hash_centers import center_distances, hash_centers


class CentralSimilarityLoss(BaseHashingLoss):
    r"""Each class has a center, a fixed code; the outputs are drawn to the center of their class (CSQ).

    .. math:: v_i = \tanh(u_i), \quad L = \frac{1}{B} \sum_i \operatorname{mean}_k \mathrm{BCE}\left(
        \tfrac{1 + v_{ik}}{2}, \tfrac{1 + c_{ik}}{2}\right) + \lambda \operatorname{mean}_k (|v_{ik}| - 1)^2

    With multi-hot labels the center is the majority, bit by bit, of the centers of the sample's labels; where it is
    even, and for samples without any label, a fixed random center decides. Shapes: embeddings (B, ``embedding_size``),
    labels (B,) or multi-hot (B, ``num_classes``); two times one value per sample. Source: Yuan et al., "Central
    Similarity Quantization for Efficient Image and Video Retrieval", CVPR 2020; they recommend lambda, the
    ``quantization_weight``, 0.05; the default is that of Reddy et al. 2022. ``seed`` is that of ``hash_centers``, which
    are saved with the loss.
    """

    def __init__(
        self, num_classes: int, embedding_size: int, quantization_weight: float = 1e-4, seed: int = 0, **kwargs
    ):
        super().__init__(**kwargs)
        set_numbers(self, 0, quantization_weight=quantization_weight)
        self.num_classes, self.embedding_size = num_classes, embedding_size
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("hash_centers", hash_centers(num_classes, embedding_size, seed))
        self.register_buffer("random_center", 2.0 * torch.randint(2, (embedding_size,), generator=generator) - 1)
        self.add_to_recordable_attributes(name="min_center_distance", is_stat=False)

    @property
    def min_center_distance(self) -> int:
        """The smallest Hamming distance between two centers."""
        return center_distances(self.hash_centers)[0] if self.num_classes > 1 else self.embedding_size

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        values = embeddings.tanh()
        targets = (1 + self.targets(labels).to(values)) / 2
        similarity = F.binary_cross_entropy((1 + values) / 2, targets, reduction="none").mean(dim=1)
        return self.parts(similarity, self.quantization_weight * (values.abs() - 1).square().mean(dim=1))

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the center of each sample, (B, embedding_size)."""
        centers = self.hash_centers.to(labels.device)
        if labels.ndim == 1:
            return centers[labels.long()]
        votes = labels.to(centers.dtype) @ centers
        return torch.where(votes == 0, self.random_center.to(votes), votes.sign())
