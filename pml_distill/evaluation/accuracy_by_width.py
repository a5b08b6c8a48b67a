from typing import Any

import torch

from .retrieval_metrics import retrieval_accuracy


def accuracy_by_width(
    queries: torch.Tensor,
    labels: torch.Tensor,
    widths: tuple[int, ...],
    gallery: torch.Tensor | None = None,
    gallery_labels: torch.Tensor | None = None,
    **settings: Any,
) -> dict[int, dict[str, float]]:
    """Return ``retrieval_accuracy`` of the first coordinates alone, for each width, of nested (Matryoshka) embeddings.

    Args:
        queries: (Q, D).
        labels: (Q,).
        widths: how many of the leading coordinates of both sides are compared.
        gallery: (N, D); None: the queries.
        gallery_labels: (N,).
        **settings: as in ``retrieval_accuracy``, such as ``metrics``.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.5], [1.0, -0.5], [1.0, 0.4], [1.0, -0.4]])
        >>> found = accuracy_by_width(embeddings, torch.tensor([0, 1, 0, 1]), (1, 2), metrics=("recall_at_1",))
        >>> found[2]
        {'recall_at_1': 1.0}
    """
    check_widths(widths, queries.shape[-1])
    return {
        width: retrieval_accuracy(
            queries[:, :width], labels, None if gallery is None else gallery[:, :width], gallery_labels, **settings
        )
        for width in widths
    }


def check_widths(widths: tuple[int, ...], most: int) -> None:
    """Raise ``ValueError`` for widths that embeddings of ``most`` coordinates cannot be cut to."""
    if not widths or not all(1 <= width <= most for width in widths):
        raise ValueError(f"widths must be from 1 to {most}, the width of the embeddings, but are {widths}.")
