import torch
from torch.nn import functional as F

from .base_distillation_loss import set_numbers
from .base_hashing_loss import BaseHashingLoss


class HashNetLoss(BaseHashingLoss):
    r"""Likelihood of similar pairs given the inner products of outputs that grow into codes (HashNet).

    .. math:: g_i = \tanh(\beta u_i), \quad L = \frac{1}{B^2} \sum_{ij} w_{ij} \left(
        \log(1 + e^{\alpha \langle g_i, g_j \rangle}) - s_{ij} \alpha \langle g_i, g_j \rangle \right)

    s_ij is 1 for pairs of one class, or with a label in common; w_ij gives half of the weight to either kind. As in the
    authors' code, the diagonal is among the similar pairs. Take a smaller alpha for longer codes, and raise beta, the
    ``scale``, while you train: ``loss.scale = (1 + epoch // 20) ** 0.5`` at the start of each epoch ("continuation").
    Shapes: embeddings (B, bits), before tanh, labels (B,) or multi-hot (B, C); or ``loss(outputs, similarity=matrix)``
    with a (B, B) matrix of 0 and 1. One value per ordered pair. Source: Cao et al., "HashNet", ICCV 2017.
    """

    sub_losses = ("similarity_loss",)

    def __init__(self, alpha: float = 0.1, scale: float = 1, **kwargs):
        super().__init__(**kwargs)
        set_numbers(self, alpha=alpha, scale=scale)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, similarity=None):
        similar = self.similar(labels, similarity, len(embeddings))
        values = torch.tanh(self.scale * embeddings)
        products = self.alpha * values @ values.T
        return self.parts(self.balance(similar, products.dtype) * (-F.logsigmoid(-products) - similar * products))
