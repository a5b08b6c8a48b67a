import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .glyphs import Glyphs

PARTS = ("train", "query", "database")


class HashingSplit(torch.utils.data.Dataset):
    """Some samples of a dataset, whose ``labels`` are a tensor, (len,) or multi-hot (len, C)."""

    def __init__(self, dataset: Any, indices: Sequence[int] | np.ndarray, labels: torch.Tensor):
        self.dataset, self.indices = dataset, torch.as_tensor(indices)
        self.labels = torch.as_tensor(labels)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple:
        return self.dataset[int(self.indices[i])]


def hashing_splits(
    dataset: Any,
    labels: torch.Tensor | Sequence[int],
    train_per_class: int = 500,
    query_per_class: int = 100,
    train_in_database: bool = True,
    seed: int = 0,
) -> dict[str, HashingSplit]:
    """Split one dataset into ``train``, ``query`` and ``database``: the protocol of CIFAR-10 in the hashing literature.

    Of each class ``query_per_class`` samples, drawn at random, are the queries, ``train_per_class`` others train, and
    all but the queries are the database, or, with ``train_in_database=False``, all but both.

    Raises:
        ValueError: labels of another length or below 0; counts below 1; a class with too few samples.

    Example:
        >>> parts = hashing_splits(range(20), [0] * 10 + [1] * 10, train_per_class=3, query_per_class=2)
        >>> {name: len(part) for name, part in parts.items()}
        {'train': 6, 'query': 4, 'database': 16}
    """
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or len(labels) != len(dataset):
        raise ValueError(f"labels must be ({len(dataset)},), one per sample, but have shape {tuple(labels.shape)}.")
    if train_per_class < 1 or query_per_class < 1:
        counts = f"{train_per_class} and {query_per_class}"
        raise ValueError(f"train_per_class and query_per_class must be at least 1, but are {counts}.")
    if (labels < 0).any():
        raise ValueError(f"labels must be classes, not negative, but go from {labels.min()} to {labels.max()}.")
    order = np.random.RandomState(seed).permutation(len(labels))
    places: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    for number in labels.unique().tolist():
        own = order[labels.numpy()[order] == number]
        taken = train_per_class + query_per_class
        if len(own) < taken:
            text = f"class {number} has {len(own)} samples, but train_per_class + query_per_class = {taken}"
            raise ValueError(f"{text}. Lower them, or leave out the class.")
        query, train, rest = np.split(own, [query_per_class, taken])
        places["query"].append(query)
        places["train"].append(train)
        places["database"].append(np.concatenate([train, rest]) if train_in_database else rest)
    return {part: HashingSplit(dataset, np.sort(np.concatenate(found)), labels) for part, found in places.items()}


def cifar10_hashing(
    root: str | os.PathLike,
    transform: Callable | None = None,
    download: bool = False,
    train_in_database: bool = True,
    seed: int = 0,
) -> dict[str, HashingSplit]:
    """Return CIFAR-10 of torchvision, by ``hashing_splits`` with 500 images of a class to train and 100 queries."""
    from torchvision.datasets import CIFAR10

    halves = [CIFAR10(str(root), train=train, transform=transform, download=download) for train in (True, False)]
    labels = [label for half in halves for label in half.targets]
    dataset: torch.utils.data.Dataset = torch.utils.data.ConcatDataset(halves)
    return hashing_splits(dataset, labels, train_in_database=train_in_database, seed=seed)


class MultiLabelList(torch.utils.data.Dataset):
    """Images named in a text file, each line a path followed by 0/1 columns, as the lists of NUS-WIDE are.

    Paths are relative to ``root``, columns separated by blanks; ``transform`` takes PIL images (RGB). Items are
    (image, label) with a (C,) float32 multi-hot tensor; all of these are in ``labels``, (N, C).

    Raises:
        ValueError: a line without labels, or with others than the first line has; an empty list.
    """

    def __init__(self, list_file: str | os.PathLike, root: str | os.PathLike, transform: Callable | None = None):
        self.root, self.transform = Path(root), transform
        self.paths: list[str] = []
        rows: list[list[float]] = []
        for number, line in enumerate(Path(list_file).read_text(encoding="utf-8-sig").splitlines(), start=1):
            path, *columns = line.split() or [""]
            if not path:
                continue
            if not columns or not set(columns) <= {"0", "1"} or (rows and len(columns) != len(rows[0])):
                wanted = f"{len(rows[0])} columns" if rows else "at least one column"
                raise ValueError(f"{list_file}, line {number}: expected a path and {wanted} of 0 or 1, got {line!r}.")
            self.paths.append(path)
            rows.append([float(column) for column in columns])
        if not rows:
            raise ValueError(f"{list_file} names no image.")
        self.labels = torch.tensor(rows)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple:
        from PIL import Image

        with Image.open(self.root / self.paths[index]) as file:
            image = file.convert("RGB")
        return image if self.transform is None else self.transform(image), self.labels[index]


def glyph_hashing(
    num_classes: int = 100, size: int = 32, channels: int = 1, seed: int = 0
) -> dict[str, torch.utils.data.Dataset]:
    """Return ``train``, ``query`` and ``database`` of Glyphs: the same classes in all three, the faces disjoint.

    Of the 16 faces 8 train, 2 query and 6 are the database. The classes are the first ones of ``Glyphs("train+val")``.
    """
    parts: dict[str, torch.utils.data.Dataset] = {}
    faces = np.random.RandomState(seed).permutation(16)
    for part, own in zip(PARTS, np.split(faces, [8, 10])):
        dataset = Glyphs("train+val", size, channels, augment=part == "train", seed=seed)
        classes = dataset.labels.unique()
        if not 0 < num_classes <= len(classes):
            raise ValueError(f"num_classes must be from 1 to {len(classes)}, but is {num_classes}.")
        places = torch.arange(num_classes)[:, None] * 16 + torch.as_tensor(np.sort(own))
        dataset.pixels = dataset.pixels[places.flatten()]
        dataset.labels = torch.arange(num_classes).repeat_interleave(len(own))
        dataset.characters = "".join(dataset.characters[c] for c in classes[:num_classes])
        parts[part] = dataset
    return parts
