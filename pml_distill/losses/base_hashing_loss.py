import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction

from ..utils.labels import check_multi_hot
from ..utils.tensors import in_float32
from .base_distillation_loss import IndicesTuple


class BaseHashingLoss(BaseMetricLossFunction):
    """Base of the hashing losses: ``loss(outputs, labels)`` with class labels or multi-hot labels.

    Two sub-losses, ``similarity_loss`` and ``quantization_loss``, which separate reducers can take
    (``MultipleReducers``); they are added. The maths runs in float32 with autocast off (float64 stays float64).

    Args:
        distance, reducer, embedding_regularizer: as in every PML loss.

    Shapes:
        embeddings: (B, bits), the real outputs of the hash head. labels: (B,) class numbers, or (B, C) multi-hot.
        PML's trainers pass multi-hot labels on with ``label_hierarchy_level="all"``.

    Raises:
        ValueError: labels are missing, of another length or shape; multi-hot labels are not 0 or 1 (on the CPU);
            ``indices_tuple`` or ``ref_emb`` is given.
    """

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor | None = None,
        indices_tuple: IndicesTuple | None = None,
        ref_emb: torch.Tensor | None = None,
        ref_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the reduced loss, a float32 (or float64) scalar under the default reducer."""
        # PML's own forward refuses labels of two dimensions; otherwise the steps are its own.
        self.reset_stats()
        for argument, value in (("indices_tuple", indices_tuple), ("ref_emb", ref_emb)):
            if value is not None:
                raise ValueError(
                    f"{type(self).__name__} takes the whole batch by its labels, and no {argument}; "
                    "a trainer must have no tuple_miner, and a DistributedLossWrapper efficient=False."
                )
        labels = self.checked_labels(embeddings, labels).to(embeddings.device)
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = in_float32(embeddings)
            rows = len(embeddings)
            loss_dict = self.compute_loss(embeddings, labels, None, embeddings, labels) if rows else self.zero_losses()
            self.add_embedding_regularization_to_loss_dict(loss_dict, embeddings)
            return self.reducer(loss_dict, embeddings, labels)

    def checked_labels(self, embeddings: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Return the labels if their shape is right."""
        name = type(self).__name__
        if labels is None:
            raise ValueError(f"{name} needs labels of shape (B,) or multi-hot labels of shape (B, C), but got None.")
        shapes = f"embeddings has shape {tuple(embeddings.shape)} and labels has shape {tuple(labels.shape)}"
        if embeddings.ndim != 2 or labels.ndim not in (1, 2) or len(labels) != len(embeddings):
            raise ValueError(f"{name} expects embeddings (B, bits) and labels (B,) or (B, C), but {shapes}.")
        # Reading labels would stall a GPU, and break a compiled graph.
        if not (labels.is_cuda or torch.compiler.is_compiling()):
            check_multi_hot(labels, "labels")
        return labels

    def _sub_loss_names(self):
        return ["similarity_loss", "quantization_loss"]
