from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .jitter import random_jitter

SPLITS = ("train", "val", "train+val", "test")


class ClassDisjointImages(torch.utils.data.Dataset):
    """Grey images in memory and their classes, split by class; a batch is jittered in one go. See ``Glyphs``."""

    default_size: int

    def __init__(
        self,
        split: str = "train",
        size: int | None = None,
        channels: int = 1,
        augment: bool | None = None,
        return_index: bool = False,
        seed: int = 0,
    ):
        size = self.default_size if size is None else size
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, but is {split!r}.")
        if not 8 <= size <= 64:
            raise ValueError(f"size must be from 8 to 64 pixels, but is {size}.")
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, but is {channels}.")
        images, labels = self.load()
        kept = np.isin(labels, split_classes(int(labels.max()) + 1, seed)[split])
        self.labels = torch.as_tensor(labels[kept], dtype=torch.int64)
        pixels = torch.as_tensor(images[kept])[:, None].float() / 255
        if pixels.shape[-1] != size:
            pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
        self.augment = split.startswith("train") if augment is None else augment
        self.channels, self.return_index = channels, return_index
        self.pixels = pixels if self.augment else random_jitter(pixels, torch.Generator().manual_seed(seed))

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all images, (N, h, w) uint8, and their labels (N,)."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple]:
        """Return several items at once; what a ``DataLoader`` calls for a batch."""
        places = torch.arange(len(self))[torch.as_tensor(indices)]
        images = self.pixels[places]
        if self.augment:
            images = random_jitter(images)
        parts: list[Any] = [(2 * images - 1).expand(-1, self.channels, -1, -1), self.labels[places].tolist()]
        return list(zip(*parts, places.tolist())) if self.return_index else list(zip(*parts))


def split_classes(num_classes: int, seed: int) -> dict[str, np.ndarray]:
    """Return the classes of each split."""
    classes = np.random.RandomState(seed).permutation(num_classes)
    training, test = np.split(classes, [num_classes // 2])
    val, train = np.split(training, [len(training) // 5])
    return {"train": train, "val": val, "train+val": training, "test": test}
