from collections.abc import Callable, Sequence
from typing import Any

import torch

from .items import Views, get_items, own_labels, plain_item, read_item


class CrossQuality(torch.utils.data.Dataset):
    """Each sample twice: degraded for the student, as it is for the teacher.

    The student learns to embed an image of low quality where the teacher embeds the good one; what ``dataset``
    augments, both see. Items are those of ``dataset`` as tuples, with ``Views(student=degrade(data), teacher=data)``.
    To test on degraded images, give PML's tester ``data_and_label_getter=lambda batch: (batch[0].student, batch[1])``.

    Args:
        dataset: any dataset of (data, label), (data, label, index) or data alone.
        degrade: makes the student's view of one sample's data, such as ``v2.GaussianBlur(9, 2.0)``; may be random.

    Example:
        >>> dataset = CrossQuality([("IMAGE", 0)], str.lower)
        >>> dataset[0]
        (Views(student='image', teacher='IMAGE'), 0)
    """

    def __init__(self, dataset: Any, degrade: Callable[[Any], Any]):
        self.dataset, self.degrade = dataset, degrade

    @property
    def labels(self) -> torch.Tensor:
        """The labels of the dataset."""
        return own_labels(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list:
        """Return several items at once; what a ``DataLoader`` calls for a batch."""
        return [self.views(item) for item in get_items(self.dataset, indices)]

    def views(self, item: Any) -> Any:
        """Replace the data of an item by its two views."""
        data, label, row = read_item(item)
        views = Views(self.degrade(data), data)
        return (views, *item[1:]) if type(item) in (tuple, list) else plain_item(views, label, row)
