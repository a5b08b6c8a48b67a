import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..datasets import SeededViews
from .agreement import disagreements
from .array_folder import ArrayFolder
from .ask import checked_rows, device_of
from .fingerprint import dataset_fingerprint, differences, module_fingerprint, parts_of, refuse, shows_the_teacher


class CachedTeacher:
    """A teacher whose embeddings ``TeacherCache`` has written: the network is not needed, nor its time.

    It serves wherever ``FrozenTeacher`` does. Rows are read in the order of the file, from a memory map that all
    processes of a machine share, and each is held against its checksum when it is first read. A copied or pickled
    ``CachedTeacher`` holds the folder's name and opens it anew.

    Args:
        folder: where ``TeacherCache`` has written, or several folders, in which samples are looked up in turn.
        dataset: ``SeededViews`` of the data to train on: what was written, a part of it, or several such datasets
            joined. Seed, views and transforms of the teacher's side must be those of the cache. None: rows are those
            of the dataset it was written for.
        teacher: the teacher that wrote it, only to be compared; None not to.
        collate_fn: what ``TeacherCache`` was given.
        strict: False to serve what belongs to something else, with a warning.

    Shapes:
        data: not looked at, but for its device and length. index: (B,) rows, the third entry of the items of
        ``SeededViews``. Returns (B, Dt) on the device of ``data``, in the precision of the cache.

    Raises:
        ValueError: the cache is incomplete, damaged, or of another dataset or teacher, with what differs; ``index`` is
            missing, not an integer tensor, or not as long as ``data``.
        IndexError: ``index`` is out of range.
    """

    needs_index = True

    def __init__(
        self,
        folder: str | os.PathLike | Sequence[str | os.PathLike],
        dataset: SeededViews | None = None,
        teacher: torch.nn.Module | None = None,
        collate_fn: Callable[[list], Any] | None = None,
        strict: bool = True,
    ):
        if dataset is not None and not isinstance(dataset, SeededViews):
            kind = type(dataset).__name__
            raise ValueError(f"dataset must be the SeededViews that the cache was written for, but is a {kind}.")
        folders = [folder] if isinstance(folder, (str, os.PathLike)) else list(folder)
        self.files = [ArrayFolder(each) for each in folders]
        self.taps: list[CachedTap] = []
        first = self.files[0]
        for file in self.files:
            if (file.widths, file.dtype) != (first.widths, first.dtype):
                raise ValueError(
                    f"All folders must hold the same outputs, but {first.folder} has {first.widths} in {first.dtype} "
                    f"and {file.folder} has {file.widths} in {file.dtype}."
                )
        #: Of each sample its row, and the number of the folder that has it.
        self.folder_of, self.rows = np.zeros(1, dtype=np.int8), np.arange(first.num_rows)
        self.strict, ours = strict, {} if dataset is None else dataset_fingerprint(dataset)
        if dataset is not None:
            self.described = ours | {"keys": dataset.keys.digest}
            self.folder_of, self.rows = np.zeros(len(dataset), dtype=np.int8), np.full(len(dataset), -1)
            for number, file in enumerate(self.files):
                left = np.flatnonzero(self.rows < 0)
                self.rows[left], self.folder_of[left] = file.find(dataset.keys)[left], number
        elif len(self.files) > 1 or not first.manifest["as_written"]:
            raise ValueError("dataset must be given for several folders, and where samples were added or renamed.")
        else:
            self.described = first.manifest | {"keys": first.keys().digest}
        self.views = self.described["views"]
        # Joined datasets may each have transforms of its own.
        transforms = list(dict.fromkeys(text for file in self.files for text in file.manifest["transform"]))
        self.described = self.described | {"transform": transforms}
        if set(ours.get("transform", ())) == set(transforms):
            ours.pop("transform", None)
        ours |= {} if teacher is None else {"teacher": module_fingerprint(teacher)}
        total = missing = self.views * len(self.rows)
        for number, file in enumerate(self.files):
            places = self.places(np.arange(total), number)
            if dataset is None:
                refuse(file.folder, differences(ours, file.manifest), strict)
            elif not file.manifest["imported"]:
                refuse(file.folder, disagreements(file, dataset, places, ours, teacher, collate_fn), strict)
            missing -= int((~file.missing(places[places >= 0])).sum())
        if missing:
            absent = np.flatnonzero(self.rows < 0)
            such = f", not such as {dataset.keys.names[absent[0]]}" if dataset and len(absent) else ""
            told = f"{total - missing} of {total} rows are written{such}. TeacherCache.write() goes on with the others"
            raise ValueError(f"The teacher cache in {first.folder} is incomplete: {told}.")

    def places(self, rows: np.ndarray, number: int) -> np.ndarray:
        """Return where a folder has these rows of the dataset, -1 for those that it has not."""
        file, (view, sample) = self.files[number], np.divmod(rows, len(self.rows))
        # Vectors that were imported know of no views.
        start = 0 if file.manifest["imported"] and file.views == 1 else view * file.num_rows
        own = self.rows[sample]
        return np.where((own >= 0) & (self.folder_of[sample % len(self.folder_of)] == number), start + own, -1)

    def read(self, name: str, rows: np.ndarray, device: torch.device | None = None) -> torch.Tensor:
        """Return rows of an output, on a device."""
        if len(self.files) == 1:
            values = self.file.read(name, self.places(rows, 0))
        else:
            values = torch.empty(len(rows), self.file.widths[name], dtype=self.file.dtype)
            for number, file in enumerate(self.files):
                places = self.places(rows, number)
                own = np.flatnonzero(places >= 0)
                values[own] = file.read(name, places[own])
        if device is not None and device.type == "cuda":
            return values.pin_memory().to(device, non_blocking=True)
        return values.to(device)

    def __call__(self, data: Any, index: torch.Tensor | None = None) -> torch.Tensor:
        """Return the embeddings of the rows in ``index``."""
        rows, device = checked_rows(index, data, self.views * len(self.rows)), device_of(data)
        for tap in self.taps:
            tap.features = [self.read(f"features.{name}", rows, device)[:, :, None, None] for name in tap.names]
        return self.read("embeddings", rows, device)

    def logits(self, index: torch.Tensor) -> torch.Tensor:
        """Return the logits of the rows in ``index``, (B, C) on the CPU; ``ValueError`` if the cache has none."""
        if "logits" not in self.file.widths:
            raise ValueError(f"The teacher cache in {self.file.folder} has no logits; write one with a classifier.")
        return self.read("logits", checked_rows(index, None, self.views * len(self.rows)))

    @property
    def file(self) -> ArrayFolder:
        """The first folder."""
        return self.files[0]

    @property
    def fingerprint(self) -> str:
        """What is served: teacher, data and precision of each folder."""
        names = ("teacher", "classifier", "seed", "views", "transform", "dtype", "rows_crc32")
        return json.dumps([[file.manifest[name] for name in names] for file in self.files])

    def __getstate__(self) -> dict[str, Any]:
        # In the dataset's order, as most are, the rows need not be carried along.
        rows = self.rows if (self.rows != np.arange(len(self.rows))).any() else len(self.rows)
        folder_of = self.folder_of if self.folder_of.any() else self.folder_of[:1]
        files = [file.folder for file in self.files]
        return self.__dict__ | {"files": files, "taps": [], "rows": rows, "folder_of": folder_of}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows = np.arange(state["rows"]) if isinstance(state["rows"], int) else state["rows"]
        self.__dict__.update(state, files=[ArrayFolder(folder) for folder in state["files"]], rows=rows)

    def tap(self, names: Sequence[str]) -> "CachedTap":
        """Return what takes the pooled outputs of the teacher's modules, as ``FeatureTap`` does of a network's."""
        return CachedTap(self, names)

    def check_dataset(self, dataset: Any) -> None:
        """Raise ``ValueError`` if what a dataset yields are not the rows of this cache."""
        # The rows are those of the outermost.
        views = next((part for part in parts_of(dataset) if isinstance(part, SeededViews)), None)
        lines: list[str] = []
        if views is not None:
            ours = dataset_fingerprint(views) | {"keys": views.keys.digest}
            compared = self.strict and not self.file.manifest["imported"]
            wanted = ours if compared else {name: ours[name] for name in ("keys", "views")}
            lines = differences(wanted, self.described, shows_the_teacher(views))
            for number, file in enumerate(self.files if compared and not lines else ()):
                lines += disagreements(file, views, self.places(np.arange(views.num_rows), number), {})
        if views is None or lines:
            cached = {"length": len(self.rows)} | {name: self.described[name] for name in ("seed", "views")}
            raise ValueError(
                f"dataset is {' of '.join(type(part).__name__ for part in parts_of(dataset))}, but the teacher reads a "
                f"cache of SeededViews with {cached}; its rows mean nothing for another dataset."
                + "".join(f"\n  {line}" for line in lines)
            )


class CachedTap:
    """The pooled outputs of a cached teacher's modules in its latest batch, as feature maps of one pixel."""

    def __init__(self, teacher: CachedTeacher, names: Sequence[str]):
        widths = teacher.file.widths
        cached = [name.removeprefix("features.") for name in widths if name.startswith("features.")]
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

    def __exit__(self, *error: object) -> None:
        self.teacher.taps.remove(self)


def caches(teacher: Any) -> Iterator[CachedTeacher]:
    """Yield the caches that a teacher reads, also those in an ensemble or behind a standardisation."""
    if isinstance(teacher, CachedTeacher):
        yield teacher
    for part in (*getattr(teacher, "teachers", ()), getattr(teacher, "teacher", None)):
        if part is not None:
            yield from caches(part)
