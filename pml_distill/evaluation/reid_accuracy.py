from typing import Any

import torch

from .retrieval_metrics import retrieval_accuracy


def reid_accuracy(
    queries: torch.Tensor,
    labels: torch.Tensor,
    cameras: torch.Tensor,
    gallery: torch.Tensor,
    gallery_labels: torch.Tensor,
    gallery_cameras: torch.Tensor,
    ranks: tuple[int, ...] = (1, 5, 10),
    **settings: Any,
) -> dict[str, float]:
    """CMC and mAP of re-identification by the protocol of Market-1501, by cosine similarity.

    Gallery images of the query's own identity and camera are left out, as are those of identity -1 ("junk");
    distractors (identity 0) stay as wrong answers. Queries without a correct image are left out of the means. The
    average precision is the mean precision at the correct images, as in torchreid and FastReID.

    Source: Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015.

    Args:
        queries: (Q, D).
        labels: (Q,) identities.
        cameras: (Q,).
        gallery: (N, D).
        gallery_labels: (N,).
        gallery_cameras: (N,).
        ranks: of the CMC curve.
        **settings: ``lone_queries``, ``ignore_label``, as in ``retrieval_accuracy``.

    Returns:
        ``cmc_1``, ``cmc_5``, ``cmc_10`` and ``mean_average_precision``.

    Example:
        >>> gallery, people, cameras = torch.eye(3), torch.tensor([4, 4, 7]), torch.tensor([1, 2, 2])
        >>> query = torch.tensor([[0.9, 0.1, 0.5]]), torch.tensor([4]), torch.tensor([1])
        >>> reid_accuracy(*query, gallery, people, cameras, ranks=(1, 2))
        {'cmc_1': 0.0, 'cmc_2': 1.0, 'mean_average_precision': 0.5}
    """
    metrics = (*(f"recall_at_{rank}" for rank in ranks), "mean_average_precision")
    settings |= {"cameras": cameras, "gallery_cameras": gallery_cameras, "ref_includes_query": False}
    found = retrieval_accuracy(queries, labels, gallery, gallery_labels, metrics, **settings)
    return {name.replace("recall_at", "cmc"): value for name, value in found.items()}
