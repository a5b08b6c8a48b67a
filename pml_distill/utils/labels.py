"""Multi-hot labels."""

import torch


def check_multi_hot(labels: torch.Tensor, name: str) -> None:
    """Raise ``ValueError`` for labels of two dimensions that are not 0 or 1."""
    if labels.ndim == 2 and not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"{name} must be 0 or 1 if multi-hot, but go from {labels.min()} to {labels.max()}.")


def flat(labels: torch.Tensor) -> torch.Tensor:
    """Return labels of one column, as PML's testers give them, as a vector."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def share_a_label(labels: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the (N, M) boolean matrix of equal classes, or of at least one common label if multi-hot."""
    if labels.ndim == 1:
        return labels[:, None] == others
    return labels.float() @ others.float().T > 0
