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


def check_labels(rows: tuple[int, int], any_kind: bool = False, **labels: torch.Tensor) -> None:
    """Raise ``ValueError`` for labels of queries and of a database that do not fit their rows or one another."""
    for size, (name, of_rows) in zip(rows, labels.items()):
        if len(of_rows) != size:
            raise ValueError(f"{name} must have one entry for each of {size} rows, but has {len(of_rows)}.")
        if not any_kind:
            check_multi_hot(of_rows, name)
    shapes = [tuple(of_rows.shape) for of_rows in labels.values()]
    if shapes[0][1:] != shapes[1][1:]:
        raise ValueError(
            f"{' and '.join(labels)} must both be classes, or multi-hot with the same number of columns, but have "
            f"shapes {shapes[0]} and {shapes[1]}."
        )
