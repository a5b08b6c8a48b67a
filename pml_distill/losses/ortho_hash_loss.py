from torch.nn import functional as F

from .base_distillation_loss import set_numbers, unit_rows
from .base_hashing_loss import BaseHashingLoss
from .hash_centers import hash_centers


class OrthoHashLoss(BaseHashingLoss):
    r"""One loss: the outputs classify by their cosine to a fixed code of each class, with a margin (OrthoHash).

    .. math:: L = -\frac{1}{B} \sum_i \sum_c \frac{y_{ic}}{\sum_{c'} y_{ic'}}
        \log \operatorname{softmax}_c \left( s \left( \cos(u_i, o_c) - m y_{ic} \right) \right)

    An output at a small angle to a code has its signs, so that no term of quantization is needed. m is ``margin``, s
    ``scale``, and the codes o are those of ``hash_centers`` with ``seed``, saved with the loss. The authors put
    ``torch.nn.BatchNorm1d(bits)`` behind the hash head. A sample without any label costs nothing. Shapes: embeddings
    (B, ``embedding_size``), labels (B,) or multi-hot (B, ``num_classes``); one value per sample. Source: Hoe et al.,
    "One Loss for All: Deep Hashing with a Single Cosine Similarity based Learning Objective", NeurIPS 2021.
    """

    sub_losses = ("similarity_loss",)

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 0.2, scale: float = 8, seed: int = 0, **kwargs
    ):
        super().__init__(**kwargs)
        set_numbers(self, 0, margin=margin)
        set_numbers(self, scale=scale)
        self.num_classes, self.embedding_size = num_classes, embedding_size
        self.register_buffer("hash_centers", hash_centers(num_classes, embedding_size, seed))

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        own = (F.one_hot(labels.long(), self.num_classes) if labels.ndim == 1 else labels).to(embeddings)
        cosines = unit_rows(embeddings) @ self.hash_centers.to(embeddings).T / self.embedding_size**0.5
        logarithms = (self.scale * (cosines - self.margin * own)).log_softmax(dim=1)
        return self.parts(-(own * logarithms).sum(dim=1) / own.sum(dim=1).clamp(min=1))
