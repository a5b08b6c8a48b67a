"""What a sample is called, whatever its place in the dataset."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

#: Where datasets keep their files: torchvision's, PML's and others'; paths, or tuples that begin with one.
FILES = ("samples", "imgs", "paths", "image_paths", "files", "_samples", "_image_files", "_images")


class Keys(NamedTuple):
    """The keys of all samples of a dataset.

    Args:
        names: paths relative to the dataset's root, the user's ids as text, or an array of row numbers.
        paths: the file of each sample, an empty text where it has none.
        total: how many rows there are to number, those that a ``Subset`` leaves out among them.
    """

    names: Sequence[str] | np.ndarray
    paths: Sequence[str] | None
    total: int

    @property
    def are_numbers(self) -> bool:
        """Whether the samples have nothing but row numbers."""
        return isinstance(self.names, np.ndarray)

    @property
    def digest(self) -> str:
        """A hash of all names, in their order."""
        names = self.names
        text = names.astype("<i8").tobytes() if isinstance(names, np.ndarray) else "\n".join(names).encode()
        return hashlib.blake2b(text, digest_size=16).hexdigest()

    def content(self, sample: int) -> bytes:
        """Return a hash of 16 bytes of a sample's file, zeros where it has none."""
        if self.paths is None or not self.paths[sample]:
            return bytes(16)
        with open(self.paths[sample], "rb") as file:
            return hashlib.blake2b(file.read(), digest_size=16).digest()


def keys_of(dataset: Any) -> Keys:
    """Return the keys of the samples: ``dataset.ids``, else its files, else row numbers; ``ValueError`` for bad ids.

    They are looked up through ``Subset`` (whatever has ``dataset`` and ``indices``), ``ConcatDataset``,
    ``LabeledAndUnlabeled`` and what wraps a dataset of the same length as ``dataset``.
    """
    size, ids = len(dataset), getattr(dataset, "ids", None)
    if ids is not None:
        return Keys(distinct([str(i) for i in ids], size), None, size)
    inner, indices = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
    if inner is not None and indices is not None and len(indices) == size:
        names, paths, total = keys_of(inner)
        places = np.asarray(indices, dtype=np.int64)
        taken = names[places] if isinstance(names, np.ndarray) else [names[i] for i in places]
        return Keys(taken, paths and [paths[i] for i in places], total)
    parts = getattr(dataset, "datasets", None) or [getattr(dataset, name, None) for name in ("labeled", "unlabeled")]
    if isinstance(parts, list) and None not in parts and sum(map(len, parts)) == size:
        return joined_keys([keys_of(part) for part in parts])
    if inner is not None and hasattr(inner, "__len__") and len(inner) == size:
        return keys_of(inner)
    for name in FILES:
        root = os.path.join(str(getattr(dataset, "root", None) or ""), "")
        files = files_of(getattr(dataset, name, None), root, size)
        if files:
            return Keys([file.removeprefix(root) for file in files], files, size)
    return Keys(np.arange(size), None, size)


def joined_keys(parts: list[Keys]) -> Keys:
    """Return the keys of datasets behind one another; row numbers if one of them has no others."""
    total = sum(part.total for part in parts)
    if any(part.are_numbers for part in parts):
        starts = np.cumsum([0, *(part.total for part in parts)])
        whole = [np.asarray(p.names) if p.are_numbers else np.arange(len(p.names)) for p in parts]
        return Keys(np.concatenate([start + names for start, names in zip(starts, whole)]), None, total)
    ids = [name for part in parts if part.paths is None for name in part.names]
    distinct(ids, len(ids))
    paths = [path for part in parts for path in part.paths or [""] * len(part.names)]
    return Keys([name for part in parts for name in part.names], paths, total)


def files_of(values: Any, root: str, size: int) -> list[str]:
    """Return the files that these values name, one for each sample; nothing if they name others or some twice."""
    if not isinstance(values, (list, tuple, np.ndarray)) or len(values) != size or not size:
        return []
    firsts = [value[0] if isinstance(value, (tuple, list)) and value else value for value in values]
    if not isinstance(firsts[0], (str, os.PathLike)):
        return []
    for folder in ("", root):
        files = [os.path.join(folder, file) for file in firsts]
        if os.path.isfile(files[0]) and len(set(files)) == size:
            return files
    return []


def distinct(ids: list[str], size: int) -> list[str]:
    """Return the ids if they are one for each sample and all different."""
    if len(ids) != size:
        raise ValueError(f"ids must be {size}, one for each sample, but are {len(ids)}.")
    if len(set(ids)) < size:
        twice, _ = Counter(ids).most_common(1)[0]
        raise ValueError(f"ids has {twice!r} more than once. Give each sample an id of its own.")
    return ids
