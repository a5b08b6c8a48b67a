from collections.abc import Callable, Sequence
from typing import Any

import torch

from .items import Views, get_items, own_labels, plain_item, read_item


class CrossQuality(torch.utils.data.Dataset):
    """Each sample twice: degraded for the student, as it is for the teacher.

    The student learns to embed an image of low quality where the teacher embeds the good one. What ``dataset`` does
    to augment a sample is done once, before it is degraded, so that both views show the same.

    torchvision's transforms degrade tensors: ``v2.Compose([v2.Resize(12), v2.Resize(32)])`` lowers the resolution,
    ``v2.GaussianBlur(9, 2.0)`` blurs, and ``v2.JPEG(10)`` compresses uint8 tensors (``v2.ToDtype(torch.uint8,
    scale=True)`` before it makes them of images in [0, 1]).

    To test on degraded images, give PML's tester ``data_and_label_getter=lambda batch: (batch[0].student, batch[1])``.

    Args:
        dataset: any dataset of (data, label), (data, label, index) or data alone.
        degrade: makes the student's view of one sample's data. It may be random. Where workers are not forked (macOS,
            Windows, Python 3.14) they need it pickled, which no lambda can be.

    Items:
        those of ``dataset`` as tuples, their data replaced by ``Views(student=degrade(data), teacher=data)``.

    Attributes:
        labels: those of ``dataset``.

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
        return self.views(self.dataset[index])

    def __getitems__(self, indices: Sequence[int]) -> list:
        """Return several items at once; what a ``DataLoader`` calls for a batch."""
        return [self.views(item) for item in get_items(self.dataset, indices)]

    def views(self, item: Any) -> Any:
        """Replace the data of an item by its two views."""
        data, label, row = read_item(item)
        if type(item) in (tuple, list):
            return (Views(self.degrade(data), data), *item[1:])
        return plain_item(Views(self.degrade(data), data), label, row)
