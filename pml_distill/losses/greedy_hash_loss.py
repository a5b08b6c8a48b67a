import torch
from torch.nn import functional as F

from .base_distillation_loss import set_numbers
from .base_hashing_loss import BaseHashingLoss


class GreedyHashLoss(BaseHashingLoss):
    r"""Classifies the codes themselves, with a gradient that passes straight through the signs (GreedyHash).

    .. math:: b_i = \operatorname{sign}(u_i), \qquad \frac{\partial L}{\partial u_i} := \frac{\partial L}{\partial b_i},
        \qquad L = \frac{1}{B} \sum_i \mathrm{CE}(W b_i, y_i)
        + \lambda \operatorname{mean}_k \left| |u_{ik}| - 1 \right|^3

    W, (num_classes, embedding_size), learns: give the loss an optimizer, as PML's ``metric_loss_optimizer``. lambda is
    ``quantization_weight``. Shapes: embeddings (B, ``embedding_size``), labels (B,); two times one value per sample.
    Source: Su et al., "Greedy Hash: Towards Fast Optimization for Accurate Hash Coding in CNN", NeurIPS 2018.
    """

    def __init__(self, num_classes: int, embedding_size: int, quantization_weight: float = 0.1, **kwargs):
        super().__init__(**kwargs)
        set_numbers(self, 0, quantization_weight=quantization_weight)
        self.num_classes, self.embedding_size = num_classes, embedding_size
        self.W = torch.nn.Linear(embedding_size, num_classes, bias=False).weight

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        if labels.ndim == 2:
            raise ValueError(f"GreedyHashLoss needs classes (B,), but labels has shape {tuple(labels.shape)}.")
        codes = torch.where(embeddings > 0, 1.0, -1.0).to(embeddings) + (embeddings - embeddings.detach())
        similarity = F.cross_entropy(codes @ self.W.to(codes).T, labels.long(), reduction="none")
        off = (embeddings.abs() - 1).pow(3).abs().mean(dim=1)
        return self.parts(similarity, self.quantization_weight * off)
