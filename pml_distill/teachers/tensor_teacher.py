import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .array_folder import MANIFEST, STORED, ArrayFolder, locked, new_manifest
from .ask import checked_rows, device_of

CHUNK = 4096


class TensorTeacher:
    """A teacher whose embeddings you already have, from wherever they come.

    Args:
        embeddings: (N, Dt), or (views, N, Dt) for ``SeededViews``: a tensor, an array, a memory map, or the path of a
            ``.npy``, ``.safetensors`` or ``.parquet`` file. If a file holds several, name one behind a colon:
            ``"vectors.parquet:embedding"``.
        ids: of the N samples, if the ``index`` of a batch holds these. None: it holds rows, ``view * N + sample``.

    Shapes:
        index: (B,) numbers, or a list of texts where ``ids`` are. Returns (B, Dt) on the device of ``data``.

    Raises:
        ValueError: embeddings have another shape, or are NaN or infinite; ids are not one for each sample, or one comes
            twice; a file holds several tensors; ``index`` is missing or has an id that is unknown.

    Example:
        >>> teacher = TensorTeacher(torch.eye(3), ids=["a", "b", "c"])
        >>> teacher(torch.zeros(2, 5), ["c", "a"])
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """

    needs_index = True

    def __init__(self, embeddings: Any, ids: Sequence[Any] | None = None):
        table = read_table(str(embeddings)) if isinstance(embeddings, (str, os.PathLike)) else embeddings
        table = table.detach() if isinstance(table, torch.Tensor) else torch.from_numpy(np.asarray(table))
        table = table if table.is_floating_point() else table.float()
        self.table = table[None] if table.ndim == 2 else table
        if self.table.ndim != 3:
            raise ValueError(f"embeddings must be (N, Dt) or (views, N, Dt), but are {tuple(table.shape)}.")
        rows = self.table.flatten(0, 1)
        for start in range(0, len(rows), CHUNK):
            wrong = ~rows[start : start + CHUNK].isfinite().all(dim=1)
            if wrong.any():
                raise ValueError(f"embeddings are NaN or infinite in row {start + int(wrong.nonzero()[0])}.")
        keys = None if ids is None else [key_of(i) for i in ids]
        self.place = None if keys is None else {key: row for row, key in enumerate(keys)}
        if keys is not None and not len(set(keys)) == len(keys) == self.table.shape[1]:
            raise ValueError(
                f"ids must be {self.table.shape[1]}, one for each row of embeddings and all different, but are "
                f"{len(keys)} with {len(set(keys))} different ones."
            )

    def __call__(self, data: Any, index: Any = None) -> torch.Tensor:
        """Return the embeddings of the samples in ``index``."""
        if self.place is not None and index is not None:
            keys = [key_of(i) for i in index]
            unknown = [key for key in keys if key not in self.place]
            if unknown:
                raise ValueError(f"index has the ids {unknown[:5]}, which are not among the ids of the embeddings.")
            index = torch.tensor([self.place[key] for key in keys], dtype=torch.long)
        rows = checked_rows(index, data, self.table.shape[0] * self.table.shape[1])
        return self.table.flatten(0, 1)[torch.from_numpy(rows)].to(device_of(data))

    @property
    def fingerprint(self) -> str:
        """A hash of the embeddings."""
        digest = hashlib.sha256()
        for part in self.table.flatten(0, 1).split(CHUNK):
            digest.update(part.cpu().float().numpy().tobytes())
        return digest.hexdigest()

    def write(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write the embeddings into a folder for ``CachedTeacher``, which finds them by the ids of a dataset.

        Ids may be the paths of files in the dataset's root. Embeddings of one view serve all views of a sample.
        ``dtype=None`` stores that of the embeddings, or float32. ``ValueError``: the folder holds a cache already.
        """
        folder, dtype = Path(folder), dtype or (self.table.dtype if self.table.dtype in STORED else torch.float32)
        views, rows, width = self.table.shape
        lines = [[str(key), None, None] for key in self.place] if self.place else list(range(rows))
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if (folder / MANIFEST).exists():
                raise ValueError(f"folder {folder} holds a teacher cache already. Choose another, or delete it.")
            manifest = new_manifest(views, {"embeddings": width}, dtype, CHUNK)
            manifest |= {"imported": True, "teacher": self.fingerprint}
            manifest |= {"classifier": None, "seed": None, "transform": []}
            ArrayFolder.create(folder, lines, manifest)
            file = ArrayFolder(folder)
            for start in range(0, views * rows, CHUNK):
                part = self.table.flatten(0, 1)[start : start + CHUNK]
                places, unknown = np.arange(start, start + len(part)), np.full((len(part), 4), np.nan)
                file.write(places, {"embeddings": part}, unknown, np.zeros((len(part), 2), dtype="<u8"))


def key_of(value: Any) -> Any:
    """Return an id as one that is equal to others of its value: of tensors and arrays the number."""
    return value.item() if hasattr(value, "item") else value


def read_table(path: str) -> Any:
    """Return the array or tensor in a file, from a memory map where that can be."""
    path, _, name = (path, "", "") if os.path.exists(path) else path.rpartition(":")
    if path.endswith(".npy"):
        return np.load(path, mmap_mode="c")
    if path.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return file.get_tensor(the_one(path, name, list(file.keys())))
    if path.endswith(".parquet"):
        from pyarrow import parquet, types  # type: ignore[import-untyped]

        names = [field.name for field in parquet.read_schema(path) if types.is_nested(field.type)]
        column = parquet.read_table(path, columns=[the_one(path, name, names)]).column(0).combine_chunks()
        lengths = {len(row) for row in column}
        if len(lengths) != 1:
            raise ValueError(f"The embeddings in {path} have the widths {sorted(lengths)}; all must be alike.")
        return np.array(column.flatten()).reshape(len(column), -1)
    raise ValueError(f"embeddings must be a .npy, .safetensors or .parquet file that exists, but is {path!r}.")


def the_one(path: str, name: str, names: list[str]) -> str:
    """Return the name of the tensor or column to read."""
    if name not in names and (name or len(names) != 1):
        raise ValueError(f"{path} holds {names}; name one of them, as in {path}:NAME.")
    return name or names[0]
