import torch
from torch import nn
from torch.nn import functional as F


class EmbeddingNetwork(nn.Module):
    """A trunk and an embedder as one network, images in, embeddings out: what is tested and deployed.

    Args:
        trunk: from images to features (B, F).
        embedder: from features to embeddings; None for the features themselves.
        normalize: whether embeddings have length 1. Outputs whose signs are a code have not.

    Shapes:
        images: what the trunk takes. Returns (B, D).
    """

    def __init__(self, trunk: nn.Module, embedder: nn.Module | None = None, normalize: bool = True):
        super().__init__()
        self.trunk, self.embedder = trunk, nn.Identity() if embedder is None else embedder
        self.normalize = normalize

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embeddings."""
        embeddings = self.embedder(self.trunk(images))
        return F.normalize(embeddings) if self.normalize else embeddings
