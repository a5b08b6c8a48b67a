from collections.abc import Sequence
from typing import Any

import torch

from .items import UNLABELED, get_items, labels_of, read_item


class LabeledAndUnlabeled(torch.utils.data.Dataset):
    """Two datasets as one: first all samples with labels, then all without.

    ``MixedSampler(dataset.labels, ...)`` draws batches with so much of each. Items are (data, label), with label -1 for
    a sample of ``unlabeled``; if both datasets yield an index, it goes on from the first to the second.

    Args:
        labeled: a dataset of (data, label), or (data, label, index).
        unlabeled: a dataset of such items too, whose labels are not used, or of data alone.
        labels: (N,) of the labelled samples; None: ``labeled.labels``, or ``labeled.targets``.

    Example:
        >>> dataset = LabeledAndUnlabeled([("a", 0), ("b", 1)], ["c", "d"], labels=[0, 1])
        >>> list(dataset)
        [('a', 0), ('b', 1), ('c', -1), ('d', -1)]
    """

    def __init__(self, labeled: Any, unlabeled: Any, labels: Sequence[int] | torch.Tensor | None = None):
        known = labels_of(labeled, labels)
        self.labeled, self.unlabeled = labeled, unlabeled
        self.labels = torch.cat([known, torch.full((len(unlabeled),), UNLABELED)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple]:
        """Return several items at once; what a ``DataLoader`` calls for a batch."""
        places = range(len(self))
        wanted, size = [places[i] for i in indices], len(self.labeled)
        own = iter(get_items(self.labeled, [i for i in wanted if i < size]))
        others = iter(get_items(self.unlabeled, [i - size for i in wanted if i >= size]))
        parts = [read_item(next(own if i < size else others)) for i in wanted]
        # A batch has an index for all or for none.
        indexed = all(row is not None for *_, row in parts)
        return [
            (data, label, row + size * (i >= size)) if indexed else (data, label)
            for i, label, (data, _, row) in zip(wanted, self.labels[wanted].tolist(), parts)
        ]
