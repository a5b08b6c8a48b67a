from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .items import UNLABELED, get_items, labels_of, plain_item, read_item


class PartiallyLabeled(torch.utils.data.Dataset):
    """A dataset of which a fraction has labels; the label of all other samples is -1.

    The labelled samples are drawn at random within each class: ``fraction`` of them, rounded, but two at least, since
    a metric loss learns nothing from one. Items are (data, label) or (data, label, index). Test on ``dataset.dataset``:
    a tester would take -1 for a class.

    Args:
        dataset: any dataset of (data, label, ...).
        fraction: of the labels to keep, from 0 to 1.
        labels: (N,) of all samples; None: ``dataset.labels``, or ``dataset.targets``.
        seed: of the draw.

    Attributes:
        labels: (N,) int64 tensor, -1 where not kept; what ``MixedSampler`` needs.

    Example:
        >>> samples = [("image", i % 2) for i in range(20)]
        >>> dataset = PartiallyLabeled(samples, 0.3, labels=[label for _, label in samples])
        >>> sorted(label for _, label in dataset)[-8:]
        [-1, -1, 0, 0, 0, 1, 1, 1]
    """

    def __init__(
        self, dataset: Any, fraction: float, labels: Sequence[int] | torch.Tensor | None = None, seed: int = 0
    ):
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be from 0 to 1, but is {fraction}.")
        all_labels = labels_of(dataset, labels)
        self.dataset, self.labels = dataset, torch.full_like(all_labels, UNLABELED)
        random = np.random.RandomState(seed)
        for label in all_labels.unique().tolist():
            own = random.permutation((all_labels == label).nonzero().flatten().numpy())
            kept = torch.as_tensor(own[: max(2, round(fraction * len(own))) if fraction > 0 else 0])
            self.labels[kept] = label

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple]:
        """Return several items at once; what a ``DataLoader`` calls for a batch."""
        labels = self.labels[torch.as_tensor(indices)].tolist()
        items = get_items(self.dataset, indices)
        return [plain_item(data, label, row) for (data, _, row), label in zip(map(read_item, items), labels)]
