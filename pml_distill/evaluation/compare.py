from dataclasses import dataclass
from typing import Any

import torch

from .bootstrap import bootstrap_interval
from .retrieval_metrics import retrieval_values


@dataclass(frozen=True)
class Comparison:
    """Two networks on the same queries: ``difference`` is a - b, with its ``interval``.

    ``won``, ``tied`` and ``lost`` are shares of the queries where a is better, equal or worse.
    """

    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    won: float
    tied: float
    lost: float


def compare(
    a: torch.Tensor,
    b: torch.Tensor,
    labels: torch.Tensor,
    metric: str = "mean_average_precision_at_r",
    gallery_a: torch.Tensor | None = None,
    gallery_b: torch.Tensor | None = None,
    gallery_labels: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    **settings: Any,
) -> Comparison:
    """Decide between two networks by the same queries: a paired bootstrap of the difference of a retrieval figure.

    Where the interval does not hold 0, one network is better than chance would explain.

    Args:
        a: (Q, Da) embeddings of one network.
        b: (Q, Db) embeddings of the same samples by the other.
        labels: (Q,).
        metric: one of those of ``retrieval_accuracy``.
        gallery_a: what ``a`` searches; None: the queries themselves.
        gallery_b: what ``b`` searches; None: ``gallery_a``.
        gallery_labels: of both, as in ``retrieval_accuracy``.
        groups: (Q,), drawn as a whole; this and the next three as in ``bootstrap_interval``.
        level: of the interval.
        resamples: how many.
        seed: of the draws.
        **settings: as in ``retrieval_accuracy``.

    Example:
        >>> labels = torch.arange(20) // 2
        >>> found = compare(torch.eye(10).repeat_interleave(2, 0), torch.eye(20), labels, "precision_at_1")
        >>> found.a, found.lost, found.interval[0] > 0
        (1.0, 0.0, True)
    """
    if len(a) != len(b):
        raise ValueError(f"a and b must embed the same samples, but have {len(a)} and {len(b)} rows.")
    gallery_b = gallery_a if gallery_b is None else gallery_b
    of_a, of_b = (
        retrieval_values(queries, labels, gallery, gallery_labels, (metric,), **settings)[metric].cpu()
        for queries, gallery in ((a, gallery_a), (b, gallery_b))
    )
    counted = ~of_a.isnan()
    of_a, of_b = of_a[counted], of_b[counted]
    difference = of_a - of_b
    groups = None if groups is None else groups[counted.to(groups.device)]
    return Comparison(
        of_a.mean().item(),
        of_b.mean().item(),
        difference.mean().item(),
        bootstrap_interval(difference, groups, level, resamples, seed),
        *((sign.double().mean().item()) for sign in (difference > 0, difference == 0, difference < 0)),
    )
