import torch
from pytorch_metric_learning.regularizers import BaseRegularizer

from ..utils.tensors import in_float32


class QuantizationRegularizer(BaseRegularizer):
    r"""Draws each output towards -1 or 1, so that little is lost when the signs become the code.

    .. math:: L_i = \operatorname{mean}_k (|u_{ik}| - 1)^2

    One value per sample of (B, bits). The gradient at an output of exactly 0 is 0, since either sign would do. Source:
    the quantization term of Yuan et al., "Central Similarity Quantization", CVPR 2020, for any PML loss.
    """

    def compute_loss(self, embeddings):
        """Return PML's loss dictionary."""
        losses = (in_float32(embeddings).abs() - 1).square().mean(dim=1)
        indices = torch.arange(len(embeddings), device=embeddings.device)
        return {"loss": {"losses": losses, "indices": indices, "reduction_type": "element"}}
