import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import torch

from .items import UNLABELED, own_labels, read_item
from .keys import Keys, distinct, keys_of


class SeededViews(torch.utils.data.Dataset):
    """Each sample in a fixed number of augmented views, a pure function of (seed, sample, view).

    Before a sample is read, the generators of ``random``, ``np.random`` and torch on the CPU are set to a seed derived
    from the three; afterwards they are put back. It must wrap all that is random in an item, so it is the outermost
    dataset but for those that only change labels. For the seed a sample is known by its id (``ids``, or
    ``dataset.ids``), else by the content of its file, else by its row number, that in the whole dataset for a
    ``Subset``. With ids or files, augmentations stay when samples are added, removed, reordered, renamed or moved.

    Items are (data, label, row), with label -1 where ``dataset`` has none, of a view drawn with torch's generator; the
    row is ``view * len(dataset) + sample``.

    Args:
        dataset: any dataset with a length; see ``items`` for what it may yield.
        seed: of the views. views: how many of each sample; one makes the augmentation fixed.
        reseed: a function, or several, called with a seed before each sample is read, for transforms that have a
            generator of their own, such as ``Compose.set_random_seed`` of albumentations.
        ids: a name for each sample, text or number, if the dataset itself has none.

    Raises:
        ValueError: ``views`` is below 1; it or ``seed`` is no whole number; ``dataset`` has no length or no samples;
            ``ids`` are not one for each sample, all different.
        RuntimeError: a sample cannot be read; the message names its row, view and file.

    Example:
        >>> dataset = SeededViews([("a", 0), ("b", 1)], views=3)
        >>> dataset.read([0, 3])
        [('a', 0, 0), ('b', 1, 3)]
    """

    def __init__(
        self,
        dataset: Any,
        seed: int = 0,
        views: int = 1,
        reseed: Callable[[int], Any] | Sequence[Callable[[int], Any]] = (),
        ids: Sequence[Any] | None = None,
    ):
        try:
            size = len(dataset)
        except (TypeError, NotImplementedError) as error:
            raise ValueError(f"dataset must have a length, but {type(dataset).__name__} has none.") from error
        if size == 0:
            raise ValueError("dataset is empty.")
        for name, value in (("seed", seed), ("views", views)):
            if not isinstance(value, Integral):
                raise ValueError(f"{name} must be a whole number, but is {value!r}.")
        if views < 1:
            raise ValueError(f"views must be at least 1, but is {views}.")
        # NumPy's integers have no place in the manifest of a cache.
        self.dataset, self.seed, self.views, self.ids = dataset, int(seed), int(views), ids
        self.reseed = (reseed,) if callable(reseed) else tuple(reseed)
        self.keys = keys_of(dataset) if ids is None else Keys(distinct([str(i) for i in ids], size), None, size)
        self.contents: dict[int, bytes] = {}

    @property
    def labels(self) -> Any:
        """The labels of the dataset."""
        return own_labels(self.dataset)

    @property
    def num_rows(self) -> int:
        """How many views there are of all samples."""
        return self.views * len(self)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple]:
        """Return several items at once; what a ``DataLoader`` calls for a batch."""
        samples = range(len(self))
        views = torch.randint(self.views, (len(indices),)).tolist()
        return self.read([view * len(self) + samples[index] for view, index in zip(views, indices)])

    def read(self, rows: Sequence[int]) -> list[tuple]:
        """Return the items of given rows, 0 to ``num_rows - 1``; ``IndexError`` for another."""
        for row in rows:
            if not 0 <= row < self.num_rows:
                raise IndexError(f"rows are 0 to {self.num_rows - 1}, but {row} is asked for.")
        with unchanged_generators():
            return [self.read_one(row) for row in rows]

    def read_one(self, row: int) -> tuple:
        """Return the item of a row, and leave the generators where it leaves them."""
        view, sample = divmod(row, len(self))
        try:
            content = self.content(sample)
            name = content.hex() if any(content) else self.keys.names[sample]
            key = hashlib.blake2b(f"{self.seed} {name} {view}".encode(), digest_size=4).digest()
            # 32 bits are what NumPy takes.
            seed = int.from_bytes(key, "little")
            random.seed(seed)
            np.random.seed(seed)
            torch.random.default_generator.manual_seed(seed)
            for reseed in self.reseed:
                reseed(seed)
            data, label, _ = read_item(self.dataset[sample])
        except Exception as error:
            file = f", file {self.keys.paths[sample]}" if self.keys.paths else ""
            raise RuntimeError(f"Sample {sample}{file} cannot be read (row {row}, view {view}): {error!r}") from error
        return data, UNLABELED if label is None else label, row

    def content(self, sample: int) -> bytes:
        """Return a hash of a sample's file, zeros where it has none."""
        if sample not in self.contents:
            self.contents[sample] = self.keys.content(sample)
        return self.contents[sample]


@contextmanager
def unchanged_generators() -> Iterator[None]:
    """Put the global generators of the CPU back where they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
