from typing import Any

import torch
from torch.nn import functional as F

from ..utils.labels import share_a_label
from .base_distillation_loss import set_numbers
from .base_hashing_loss import BaseHashingLoss

UNSEEN = torch.iinfo(torch.long).min


class DPSHLoss(BaseHashingLoss):
    r"""Likelihood of similar pairs given half the inner products of outputs, and their distance to codes (DPSH).

    .. math:: \theta_{ij} = \tfrac{1}{2} \langle u_i, u_j \rangle, \qquad
        L = \frac{1}{B N} \sum_{ij} \left( \log(1 + e^{\theta_{ij}}) - s_{ij} \theta_{ij} \right)
            + \lambda \frac{1}{B} \sum_i \operatorname{mean}_k (u_{ik} - \operatorname{sign}(u_{ik}))^2

    s_ij is 1 for pairs of one class, or with a label in common. The N others are the batch itself; or, as published,
    all training samples: with ``num_samples`` the loss remembers the last outputs of each, without gradient, and asks
    for the rows of the batch, ``loss(outputs, labels, index=rows)``. Samples never seen add log 2 each. Shapes:
    embeddings (B, bits), labels (B,) or multi-hot (B, C), index (B,); two times one value per sample. Source: Li et
    al., "Feature Learning based Deep Supervised Hashing with Pairwise Labels", IJCAI 2016. A memory needs
    ``embedding_size``, the number of bits, and ``num_classes`` for multi-hot labels.
    """

    outputs: torch.Tensor
    labels: torch.Tensor

    def __init__(
        self,
        quantization_weight: float = 0.1,
        num_samples: int | None = None,
        embedding_size: int | None = None,
        num_classes: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        set_numbers(self, 0, quantization_weight=quantization_weight)
        self.num_samples, self.embedding_size, self.num_classes = num_samples, embedding_size, num_classes
        if num_samples is not None:
            if embedding_size is None:
                raise ValueError("num_samples asks for a memory, which needs embedding_size, the number of bits.")
            self.register_buffer("outputs", torch.zeros(num_samples, embedding_size))
            unseen: Any = ((num_samples,), UNSEEN) if num_classes is None else ((num_samples, num_classes), 0.0)
            self.register_buffer("labels", torch.full(*unseen))

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, index=None):
        others, similar = embeddings, share_a_label(labels, labels)
        if (index is None) != (self.num_samples is None):
            given = "None" if index is None else "given"
            raise ValueError(f"index is {given}, but num_samples is {self.num_samples}; give both for a memory.")
        if index is not None:
            # Not in place: an earlier loss may still need the memory for its gradient.
            self.outputs = self.outputs.index_copy(0, index, embeddings.detach().to(self.outputs))
            self.labels = self.labels.index_copy(0, index, labels.to(self.labels))
            others, similar = self.outputs.to(embeddings), share_a_label(labels.to(self.labels), self.labels)
        products = embeddings @ others.T / 2
        # The gradient where a product is just 0 is 1/2 - s; published code, in two branches, has -s there.
        likelihood = (-F.logsigmoid(-products) - similar * products).mean(dim=1)
        off = (embeddings - embeddings.detach().sign()).square().mean(dim=1)
        return self.parts(likelihood, self.quantization_weight * off)
