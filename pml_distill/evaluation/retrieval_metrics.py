"""Figures of a ranking by cosine similarity, query by query and on average."""

import re
from typing import Any

import torch
from torch.nn import functional as F

from ..utils.labels import check_labels, flat, share_a_label
from ..utils.tensors import check_finite, in_float32

METRICS = ("precision_at_1", "recall_at_10", "mean_average_precision_at_r")
# Similarities of this many pairs at once: 128 MB.
PAIRS = 1 << 25


def retrieval_accuracy(
    queries: torch.Tensor,
    labels: torch.Tensor,
    gallery: torch.Tensor | None = None,
    gallery_labels: torch.Tensor | None = None,
    metrics: tuple[str, ...] = METRICS,
    **settings: Any,
) -> dict[str, float]:
    """Measure retrieval by cosine similarity: recall@k, precision@k, R-precision, MAP@R, mAP and MRR.

    With ``queries`` and ``labels`` alone, each query searches the others. ``gallery`` without labels holds the same
    items as another network sees them (student queries, teacher gallery); each query's own row is left out.
    ``gallery`` with ``gallery_labels`` holds other items, and all of them count.

    Metrics, means over the queries, where R is the number of relevant items of a query:

    - ``precision_at_K``: the share of relevant items among the first K.
    - ``recall_at_K``: whether any of the first K is relevant, the Recall@K of metric learning and the rank-K (CMC)
      of re-identification; elsewhere "hit rate".
    - ``r_precision``: the precision at R. ``mean_average_precision_at_r``: MAP@R (Musgrave et al., "A Metric Learning
      Reality Check", ECCV 2020).
    - ``mean_average_precision``: over the whole ranking, divided by R. ``mean_reciprocal_rank``: of the first relevant.

    Args:
        queries: (Q, D) embeddings of any length.
        labels: (Q,) classes, or (Q, C) multi-hot, where items with a common label are relevant.
        gallery: (N, D); None: the queries.
        gallery_labels: (N,) or (N, C).
        metrics: names as above, with any K.
        **settings: by name:

            - ``ref_includes_query``: whether row i of the gallery is query i. Default: True without ``gallery_labels``.
            - ``cameras``, ``gallery_cameras``: (Q,) and (N,); items with the query's class and camera are left out.
            - ``lone_queries``: ``"skip"`` leaves out queries without a relevant item, ``"zero"`` counts them as 0.
            - ``ignore_label``: items of this class are neither queries nor in the gallery. Default: -1, unlabelled.
            - ``batch_size``: how many queries are compared at a time. Default: as many as take 128 MB.

    Raises:
        ValueError: shapes do not fit, values are not finite, a name is unknown, or no query has a relevant item.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> retrieval_accuracy(embeddings, torch.tensor([0, 0, 1, 1]), metrics=("recall_at_1", "recall_at_2"))
        {'recall_at_1': 1.0, 'recall_at_2': 1.0}
    """
    found = retrieval_values(queries, labels, gallery, gallery_labels, metrics, **settings)
    return {name: values.nanmean().item() for name, values in found.items()}


@torch.no_grad()
def retrieval_values(
    queries: torch.Tensor,
    labels: torch.Tensor,
    gallery: torch.Tensor | None = None,
    gallery_labels: torch.Tensor | None = None,
    metrics: tuple[str, ...] = METRICS,
    *,
    ref_includes_query: bool | None = None,
    cameras: torch.Tensor | None = None,
    gallery_cameras: torch.Tensor | None = None,
    lone_queries: str = "skip",
    ignore_label: int | None = -1,
    batch_size: int | None = None,
) -> dict[str, torch.Tensor]:
    """Return the metrics of ``retrieval_accuracy`` for each query, (Q,) float64; NaN where a query does not count."""
    own = gallery_labels is None if ref_includes_query is None else ref_includes_query
    gallery = queries if gallery is None else gallery
    labels, gallery_labels = flat(labels), flat(labels if gallery_labels is None else gallery_labels)
    if cameras is not None and gallery_cameras is None and own and len(gallery) == len(queries):
        gallery_cameras = cameras
    check(queries, labels, gallery, gallery_labels, own, cameras, gallery_cameras)
    depths = [depth_of(name) for name in metrics]
    if lone_queries not in ("skip", "zero"):
        raise ValueError(f"lone_queries must be 'skip' or 'zero', but is {lone_queries!r}.")

    values = torch.full((len(metrics), len(queries)), torch.nan, dtype=torch.float64, device=queries.device)
    labels, gallery_labels = labels.to(queries.device), gallery_labels.to(queries.device)
    queries = F.normalize(in_float32(queries))
    gallery = F.normalize(gallery.to(queries))
    step = batch_size or max(1, PAIRS // len(gallery))
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        relevant = share_a_label(labels[rows], gallery_labels)
        left_out = torch.zeros_like(relevant)
        if cameras is not None and gallery_cameras is not None:
            left_out = relevant & (cameras[rows, None] == gallery_cameras).to(queries.device)
        if ignore_label is not None and labels.ndim == 1:
            left_out |= gallery_labels == ignore_label
        if own:
            left_out.diagonal(start).fill_(True)
        relevant &= ~left_out
        counts = relevant.sum(dim=1, dtype=torch.int32)
        similarities = (queries[rows] @ gallery.T).masked_fill_(left_out, -torch.inf)
        most = max([len(gallery) if depth is None else depth or int(counts.max()) for depth in depths], default=1)
        hits = relevant.gather(1, similarities.topk(max(1, min(most, len(gallery)))).indices)
        for place, name in enumerate(metrics):
            values[place, rows] = figure(name, hits, counts).where(
                counts > 0, torch.nan if lone_queries == "skip" else 0.0
            )
    if ignore_label is not None and labels.ndim == 1:
        values[:, labels == ignore_label] = torch.nan
    if metrics and values[0].isnan().all():
        raise ValueError("No query has a relevant item in the gallery, so that there is nothing to retrieve.")
    return dict(zip(metrics, values))


def depth_of(name: str) -> int | None:
    """Return how many places of the ranking a metric reads: K, 0 for R, None for all."""
    if name in ("r_precision", "mean_average_precision_at_r"):
        return 0
    if name in ("mean_average_precision", "mean_reciprocal_rank"):
        return None
    if re.fullmatch(r"(precision|recall)_at_[1-9]\d*", name):
        return int(name.rpartition("_")[2])
    raise ValueError(
        f"metrics has {name!r}, but can have precision_at_K, recall_at_K, r_precision, mean_average_precision_at_r, "
        "mean_average_precision and mean_reciprocal_rank."
    )


def figure(name: str, hits: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    """Return one metric of each query from the relevance of its ranking (Q, places) and its number of relevant items.

    Places that were left out come last and are not relevant.
    """
    places = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    if name == "mean_reciprocal_rank":
        return (hits / places).amax(dim=1).double()
    depth = depth_of(name)
    if depth:
        found = hits[:, :depth].sum(dim=1).double()
        return found.clamp(max=1) if name.startswith("recall") else found / depth
    if depth == 0:
        hits = hits & (places <= relevant[:, None])
    precisions = hits.cumsum(dim=1).double() / places if name.startswith("mean") else torch.ones_like(hits)
    return (hits * precisions).sum(dim=1) / relevant.clamp(min=1)


def check(queries, labels, gallery, gallery_labels, own: bool, cameras, gallery_cameras) -> None:
    """Raise ``ValueError`` if rows, widths or values do not fit one another."""
    check_finite(queries=queries, gallery=gallery)
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"queries and gallery must be (Q, D) and (N, D), but are {tuple(queries.shape)} and "
            f"{tuple(gallery.shape)}; where widths differ, project the student's embeddings."
        )
    if own and len(queries) > len(gallery):
        raise ValueError(
            f"The gallery has {len(gallery)} rows for {len(queries)} queries, so that row i cannot be query i; "
            "give gallery_labels for a gallery of other items."
        )
    rows = len(queries), len(gallery)
    check_labels(rows, labels=labels, gallery_labels=gallery_labels)
    if (cameras is None) != (gallery_cameras is None):
        raise ValueError("cameras and gallery_cameras must both be given, but one of them is None.")
    if cameras is not None:
        check_labels(rows, cameras=cameras, gallery_cameras=gallery_cameras)
