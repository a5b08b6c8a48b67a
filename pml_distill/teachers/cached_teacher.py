import os
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch

from ..datasets import SeededViews
from .block_file import BlockFile
from .fingerprint import chain, dataset_fingerprint, differences, embedding_signature, module_fingerprint, refuse


class CachedTeacher:
    """A teacher whose embeddings ``TeacherCache`` has written: the network is not needed, nor its time.

    It serves wherever ``FrozenTeacher`` does: in trainers, in ``EnsembleTeacher``, in a loop of your own. The rows of a
    batch are read in the order of the file, from a memory map that all processes of a machine share, so that a cache
    may be larger than the memory. Each batch of the cache is held against its checksum when it is first read from.

    Args:
        folder: where ``TeacherCache`` has written.
        dataset: the ``SeededViews`` that it was written for; the same data, seed, views and transforms.
        teacher: the teacher that wrote it, only to be compared; None not to.

    Shapes:
        data: not looked at, but for its device and length. index: (B,) rows, the third entry of the items of
        ``SeededViews``. Returns (B, Dt) on the device of ``data``, in the precision of the cache.

    Raises:
        ValueError: the cache is incomplete, damaged, or of another dataset or teacher, with what differs; ``index`` is
            missing, not an integer tensor, or not as long as ``data``.
        IndexError: ``index`` is out of range.
    """

    needs_index = True

    def __init__(self, folder: str | os.PathLike, dataset: SeededViews, teacher: torch.nn.Module | None = None):
        if not isinstance(dataset, SeededViews):
            raise ValueError(
                f"dataset must be the SeededViews that the cache was written for, but is a {type(dataset).__name__}."
            )
        self.file, self.dataset = BlockFile(folder), dataset
        ours = dataset_fingerprint(dataset)
        if teacher is not None:
            ours |= {"teacher": module_fingerprint(teacher), "embedding": embedding_signature(teacher, dataset)}
        refuse(self.file.folder, differences(ours, self.file.fingerprint))
        if self.file.num_written < self.file.num_blocks:
            raise ValueError(
                f"The teacher cache in {folder} is incomplete: {self.file.num_written} of {self.file.num_blocks} "
                "batches are written. TeacherCache.write() goes on with the others."
            )
        self.taps: list[CachedTap] = []

    def __call__(self, data: Any, index: torch.Tensor | None = None) -> torch.Tensor:
        """Return the embeddings of the rows in ``index``."""
        rows = self.checked_rows(index, data)
        device = getattr(data, "device", None)
        for tap in self.taps:
            tap.features = [self.file.read(f"features.{name}", rows)[:, :, None, None].to(device) for name in tap.names]
        return self.file.read("embeddings", rows).to(device)

    def logits(self, index: torch.Tensor) -> torch.Tensor:
        """Return the logits of the rows in ``index``, (B, C) on the CPU.

        Raises:
            ValueError: the cache holds none; give ``TeacherCache`` a ``classifier``.
        """
        if "logits" not in self.file.widths:
            raise ValueError(f"The teacher cache in {self.file.folder} has no logits; write one with a classifier.")
        return self.file.read("logits", self.checked_rows(index))

    def tap(self, names: Sequence[str]) -> "CachedTap":
        """Return what takes the pooled outputs of the teacher's modules, as ``FeatureTap`` does of a network's.

        Raises:
            ValueError: the cache holds no features of these names.
        """
        return CachedTap(self, names)

    def check_dataset(self, dataset: Any) -> None:
        """Raise ``ValueError`` if what a dataset yields are not the rows of this cache."""
        # The rows are those of the outermost.
        views = next((part for part in chain(dataset) if isinstance(part, SeededViews)), None)
        if views is self.dataset:
            return
        lines = [] if views is None else differences(dataset_fingerprint(views), self.file.fingerprint)
        if views is None or lines:
            cached = {name: self.file.fingerprint[name] for name in ("length", "seed", "views")}
            raise ValueError(
                f"dataset is {' of '.join(type(part).__name__ for part in chain(dataset))}, but the teacher reads a "
                f"cache of SeededViews with {cached}; its rows mean nothing for another dataset."
                + "".join(f"\n  {line}" for line in lines)
            )

    def checked_rows(self, index: torch.Tensor | None, data: Any = None) -> np.ndarray:
        """Return the index as an array of rows that are in the cache, one for each sample of the data."""
        if index is None:
            raise ValueError(
                "CachedTeacher needs the index of each sample: a batch must be (data, labels, index), as SeededViews "
                "yields it."
            )
        if not isinstance(index, torch.Tensor):
            raise ValueError(f"index must be a tensor of integers, but is a {type(index).__name__}.")
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(
                f"index must hold integers and have the shape (batch,), but is {index.dtype} of {tuple(index.shape)}."
            )
        if isinstance(data, torch.Tensor) and len(data) != len(index):
            raise ValueError(
                f"index must have one row for each sample, but has {len(index)} for data of {tuple(data.shape)}."
            )
        rows = index.cpu().numpy()
        if len(rows) and not (0 <= rows.min() and rows.max() < self.file.num_rows):
            raise IndexError(
                f"index must be from 0 to {self.file.num_rows - 1}, the rows of the teacher cache, but goes from "
                f"{rows.min()} to {rows.max()}."
            )
        return rows


class CachedTap:
    """The pooled outputs of a cached teacher's modules in its latest batch, as feature maps of one pixel.

    Args:
        teacher: the cached teacher.
        names: of the modules.
    """

    def __init__(self, teacher: CachedTeacher, names: Sequence[str]):
        cached = [name.removeprefix("features.") for name in teacher.file.widths if name.startswith("features.")]
        unknown = [name for name in names if name not in cached]
        if unknown:
            raise ValueError(
                f"The teacher cache in {teacher.file.folder} has no features of {unknown}, but of {cached}; "
                "see TeacherCache(features=...)."
            )
        self.teacher, self.names = teacher, names
        self.features: list[torch.Tensor] = []

    def __enter__(self) -> "CachedTap":
        self.teacher.taps.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.teacher.taps.remove(self)


def caches(teacher: Any) -> Iterator[CachedTeacher]:
    """Yield the caches that a teacher reads, also those in an ensemble."""
    if isinstance(teacher, CachedTeacher):
        yield teacher
    for part in getattr(teacher, "teachers", ()):
        yield from caches(part)
