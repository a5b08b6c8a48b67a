from typing import Any

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction

from ..utils.labels import check_multi_hot, share_a_label
from ..utils.tensors import in_float32
from .base_distillation_loss import entry


class BaseHashingLoss(BaseMetricLossFunction):
    """Base of the hashing losses: ``loss(outputs, labels)`` with class labels or multi-hot labels.

    The sub-losses ``similarity_loss`` and ``quantization_loss`` are reduced one by one and added; the default mean is
    the scale of the authors' code. The loss runs in float32 with autocast off (float64 stays float64). ``distance``,
    ``reducer`` and ``embedding_regularizer`` are those of every PML loss. Shapes: embeddings (B, bits), real outputs of
    the hash head; labels (B,), or multi-hot (B, C), which PML's trainers pass on with
    ``label_hierarchy_level="all"``. Labels that do not fit are refused, on CUDA by the device's own assertion.
    """

    #: Of losses with something for each class and each bit.
    num_classes: Any = None
    embedding_size: Any = None
    sub_losses: tuple[str, ...] = ("similarity_loss", "quantization_loss")

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None, **settings):
        """Return the reduced loss, a float32 (or float64) scalar under the default reducer."""
        # PML's own forward refuses labels of two dimensions; otherwise the steps are its own.
        self.reset_stats()
        for argument, value in (("indices_tuple", indices_tuple), ("ref_emb", ref_emb)):
            if value is not None:
                name = f"{type(self).__name__} takes the whole batch by its labels, and no {argument}"
                raise ValueError(f"{name}; use no tuple_miner, and DistributedLossWrapper with efficient=False.")
        if labels is not None or settings.get("similarity") is None:
            labels = self.checked_labels(embeddings, labels).to(embeddings.device)
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = in_float32(embeddings)
            loss_dict = self.zero_losses()
            if len(embeddings):
                loss_dict = self.compute_loss(embeddings, labels, None, embeddings, labels, **settings)
            self.add_embedding_regularization_to_loss_dict(loss_dict, embeddings)
            return self.reducer(loss_dict, embeddings, labels)

    def checked_labels(self, embeddings: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Return the labels if they fit the embeddings and the loss."""
        name, classes, bits = type(self).__name__, self.num_classes, self.embedding_size
        if labels is None:
            raise ValueError(f"{name} needs labels of shape (B,) or multi-hot labels of shape (B, C), but got None.")
        shapes = f"embeddings has shape {tuple(embeddings.shape)} and labels has shape {tuple(labels.shape)}"
        fit = embeddings.ndim == 2 and labels.ndim in (1, 2) and len(labels) == len(embeddings)
        fit = fit and bits in (None, embeddings.shape[1]) and (labels.ndim == 1 or classes in (None, labels.shape[1]))
        if not fit:
            expected = f"embeddings must be (B, {bits or 'bits'}), multi-hot labels must be (B, {classes or 'C'})"
            raise ValueError(f"{name}: {expected}, by embedding_size and num_classes, or (B,), but {shapes}.")
        # Reading labels would stall a GPU, and break a compiled graph.
        if labels.is_cuda or torch.compiler.is_compiling():
            return labels
        check_multi_hot(labels, "labels")
        if classes is not None and labels.ndim == 1 and len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            given = f"go from {int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"labels must be from 0 to num_classes - 1 = {classes - 1}, but {given}.")
        return labels

    def similar(self, labels: torch.Tensor, similarity: torch.Tensor | None, size: int) -> torch.Tensor:
        """Return the (B, B) boolean matrix of similar pairs: of one class, with a common label, or as given."""
        if similarity is None:
            return share_a_label(labels, labels)
        if similarity.shape != (size, size):
            raise ValueError(f"similarity must be ({size}, {size}), but has shape {tuple(similarity.shape)}.")
        if not (similarity.is_cuda or torch.compiler.is_compiling()):
            check_multi_hot(similarity, "similarity")
        return similarity.bool()

    @staticmethod
    def balance(similar: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight of each pair: half to either kind, or 1 where there is only one kind."""
        share = similar.to(dtype).mean()
        weights = torch.where(similar, 1 / share, 1 / (1 - share))
        return torch.where((share > 0) & (share < 1), weights, 1.0)

    @staticmethod
    def parts(similarity: torch.Tensor, quantization: torch.Tensor | None = None) -> dict[str, dict[str, Any]]:
        """Return PML's loss dictionary, for a matrix of pairs (B, B) or a value for each sample (B,), and (B,)."""
        found = {"similarity_loss": entry(similarity)}
        if similarity.ndim == 2:
            rows = torch.arange(len(similarity), device=similarity.device)
            pairs = rows.repeat_interleave(len(rows)), rows.repeat(len(rows))
            found["similarity_loss"] = entry(similarity.flatten(), pairs, "pos_pair")
        return found if quantization is None else {**found, "quantization_loss": entry(quantization)}

    def _sub_loss_names(self):
        return list(self.sub_losses)
