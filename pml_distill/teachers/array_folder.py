import errno
import io
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..datasets.keys import Keys
from ..utils.files import whole_file

FORMAT = "pml-distill teacher outputs 3"
MANIFEST, ROWS, LOCK, NEXT = "manifest.json", "rows.jsonl", "lock", "next"
#: How outputs are stored; NumPy has no bfloat16, whose bits stand in a uint16.
STORED = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<u2"}
#: Beside the outputs: signatures of what the teacher saw, hashes of files, and checksums of the outputs.
PIXELS, CONTENT, FINISHED = "pixels", "content", "finished"
#: The folders that this process holds: POSIX's locks keep only others out, and end when any file on them is closed.
HELD: set[Path] = set()
CHUNK = 1 << 24


class ArrayFolder:
    """The outputs of a teacher: for each an ``.npy`` file (views, rows, width), and what tells rows and teacher.

    ``manifest.json`` says what they are of. Line i of ``rows.jsonl`` has the key of row i, with size and time of its
    file. ``finished.npy`` has a checksum for each row of each output, written after the row, and 0 where it is missing:
    what was cut short by a kill counts as missing. All is written with ``pwrite``: in a memory map a full disk would
    end the process. Files that grow are made in the folder ``next`` and take the places of the old ones when they are
    whole; ``settle`` goes on with that after a kill.

    Raises:
        ValueError: ``folder`` holds no outputs, some of another format, or a damaged file.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder, self.manifest = Path(folder), read_manifest(Path(folder))
        self.views, self.num_rows, self.batch_size = (self.manifest[k] for k in ("views", "rows", "batch_size"))
        self.widths: dict[str, int] = self.manifest["outputs"]
        self.dtype: torch.dtype = getattr(torch, self.manifest["dtype"])
        places, self.arrays = self.views * self.num_rows, {}
        for name, (width, kind, header) in layout(self.manifest).items():
            path = self.folder / f"{name}.npy"
            size, length = len(header) + places * width * kind.itemsize, path.stat().st_size if path.exists() else 0
            if length != size or path.open("rb").read(len(header)) != header:
                raise ValueError(
                    f"{path} has {length:,} bytes, but the cache needs {size:,} and a header of its own: the file has "
                    "been truncated or replaced, or rows were being added. Call TeacherCache.write() again, and if "
                    "that is refused too, delete the folder."
                )
            self.arrays[name] = np.memmap(path, kind, "r", len(header), (places, width))
        self.verified = {name: np.zeros(places, dtype=bool) for name in self.widths}

    @classmethod
    def create(cls, folder: Path, keys: Any, manifest: dict[str, Any], old: "ArrayFolder | None" = None) -> None:
        """Make the files for these keys, with the rows of ``old``, whose keys come first; ``OSError`` if it is full."""
        folder.mkdir(exist_ok=True)
        manifest = manifest | {"rows": len(keys)}
        places, files = manifest["views"] * len(keys), layout(manifest)
        needed = places * sum(width * kind.itemsize for width, kind, _ in files.values())
        free = shutil.disk_usage(folder).free
        if free < needed:
            told = f"The teacher cache needs {needed / 2**30:.2f} GiB, free are {free / 2**30:.2f}"
            raise OSError(errno.ENOSPC, told, str(folder))
        for name, (width, kind, header) in files.items():
            row_bytes = width * kind.itemsize
            with open(folder / f"{name}.npy", "wb") as file:
                file.write(header)
                file.truncate(len(header) + places * row_bytes)
            for view, array in enumerate(() if old is None else np.split(old.arrays[name], old.views)):
                content, start = array.reshape(-1).view(np.uint8), len(header) + view * len(keys) * row_bytes
                for place in range(0, len(content), CHUNK):
                    write_at(folder / f"{name}.npy", start + place, content[place : place + CHUNK])
        write_keys(folder, keys, manifest)

    def lines(self) -> list:
        """Return the line of each row: a number, or a key with the size and the time of its file."""
        text = (self.folder / ROWS).read_bytes()
        if zlib.crc32(text) != self.manifest["rows_crc32"]:
            raise ValueError(f"{self.folder / ROWS} is damaged. Delete the folder and write the cache again.")
        return json.loads(b"[" + text.rstrip().replace(b"\n", b",") + b"]")

    def keys(self) -> Keys:
        """Return the keys of all rows."""
        lines = self.lines()
        return Keys([line[0] for line in lines] if isinstance(lines[0], list) else np.array(lines), None, len(lines))

    def find(self, keys: Keys, rename: bool = False) -> np.ndarray:
        """Return the row of each sample by its key, or else by the content of its file; -1 where there is none.

        A file with another size or time than before is known only by its content. ``rename`` writes new names down.
        """
        lines = self.lines()
        if isinstance(lines[0], list) == keys.are_numbers:
            return np.full(len(keys.names), -1)
        if keys.are_numbers:
            order = np.argsort(lines)
            places = order[np.searchsorted(lines, keys.names, sorter=order).clip(max=len(lines) - 1)]
            return np.where(np.asarray(lines)[places] == keys.names, places, -1)
        ours, known = lines_of(keys), {tuple(line): row for row, line in enumerate(lines)}
        found = np.array([known.get(line, known.get((line[0], None, None), -1)) for line in ours])
        taken = set(found.tolist())
        sizes = {line[1] for row, line in enumerate(lines) if row not in taken} - {None}
        asked = [sample for sample, line in enumerate(ours) if found[sample] < 0 and line[1] in sizes]
        contents = enumerate(self.arrays[CONTENT][: self.num_rows] if asked else ())
        by_content = {content.tobytes(): row for row, content in contents if content.any()}
        for sample in asked:
            row = found[sample] = by_content.get(keys.content(sample), -1)
            if row >= 0:
                lines[row] = ours[sample]
        if rename and (found[asked] >= 0).any():
            (self.folder / NEXT).mkdir()
            write_keys(self.folder / NEXT, lines, self.manifest | {"as_written": False})
            settle(self.folder)
            self.manifest = read_manifest(self.folder)
        return found

    def write(self, places: np.ndarray, outputs: Mapping[str, torch.Tensor], pixels: Any, content: Any) -> None:
        """Write rows at increasing places, ``view * num_rows + row``: for each output a tensor (len(places), width)."""
        values: dict[str, Any] = {name: self.stored(name, outputs[name], places) for name in self.widths}
        checks = np.stack([checksums(value) for value in values.values()], axis=1)
        try:
            # The checksums come last. Rows behind one another are written at once.
            for name, value in {**values, PIXELS: pixels, CONTENT: content, FINISHED: checks}.items():
                array = self.arrays[name]
                for run in np.split(np.arange(len(places)), np.flatnonzero(np.diff(places) != 1) + 1):
                    part = np.ascontiguousarray(value[run], dtype=array.dtype)
                    write_at(self.folder / f"{name}.npy", array.offset + int(places[run[0]]) * array.strides[0], part)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            done, total = np.count_nonzero((self.arrays[FINISHED] != 0).all(axis=1)), self.views * self.num_rows
            told = f"The disk is full: {done} of {total} rows are written and kept. Make room and write again to go on"
            raise OSError(error.errno, told, str(self.folder)) from error

    def stored(self, name: str, output: torch.Tensor, places: np.ndarray) -> np.ndarray:
        """Return an output as it stands in its file."""
        given, shape = output.detach().cpu(), (len(places), self.widths[name])
        of_rows = f"The teacher's {name} of the rows {places[0]} to {places[-1]}"
        if given.shape != shape:
            raise ValueError(f"{of_rows} must have the shape {shape}, but have {tuple(given.shape)}.")
        if not given.isfinite().all():
            raise ValueError(f"{of_rows} are NaN or infinite.")
        values = given.to(self.dtype).contiguous()
        if not values.isfinite().all():
            raise ValueError(
                f"{of_rows} are not finite in {self.dtype}; torch.bfloat16 and torch.float32 reach further."
            )
        return (values.view(torch.int16) if self.dtype == torch.bfloat16 else values).numpy().view(STORED[self.dtype])

    def missing(self, places: np.ndarray) -> np.ndarray:
        """Return which of the places have no finished row."""
        return (self.arrays[FINISHED][places] == 0).any(axis=1)

    def damaged(self, places: np.ndarray) -> np.ndarray:
        """Return which of the places have a finished row that differs from its checksum, after reading all of them."""
        wrong = np.zeros(len(places), dtype=bool)
        step = max(1, CHUNK // (4 * max(self.widths.values())))
        for start in range(0, len(places), step):
            part = places[start : start + step]
            for output, name in enumerate(self.widths):
                expected = self.arrays[FINISHED][part, output]
                wrong[start : start + step] |= (expected != 0) & (checksums(self.arrays[name][part]) != expected)
        return wrong

    def read(self, name: str, places: np.ndarray) -> torch.Tensor:
        """Return rows of an output in the order of ``places``; ``ValueError`` if one does not have its checksum.

        They are read in the order of the file.
        """
        order, array, verified = np.argsort(places, kind="stable"), self.arrays[name], self.verified[name]
        places = places[order]
        rows = np.asarray(array[places])
        if not verified[places].all():
            wrong = places[checksums(rows) != self.arrays[FINISHED][places, list(self.widths).index(name)]]
            if len(wrong):
                raise ValueError(
                    f"Row {wrong[0]} of {self.folder / name}.npy (view {wrong[0] // self.num_rows}, line "
                    f"{wrong[0] % self.num_rows + 1} of {ROWS}) and {len(wrong) - 1} others do not have their "
                    "checksum: the file is damaged. TeacherCache.write() computes damaged rows again."
                )
            verified[places] = True
        values = np.empty_like(rows)
        values[order] = rows
        return torch.from_numpy(values.view(np.int16) if self.dtype == torch.bfloat16 else values).view(self.dtype)


def layout(manifest: Mapping[str, Any]) -> dict[str, tuple[int, np.dtype, bytes]]:
    """Return width, kind of number and header of each file."""
    outputs, kind = manifest["outputs"], STORED[getattr(torch, manifest["dtype"])]
    widths = {name: (width, kind) for name, width in outputs.items()}
    widths |= {PIXELS: (4, "<f4"), CONTENT: (2, "<u8"), FINISHED: (len(outputs), "<u8")}
    files = {}
    for name, (width, kind) in widths.items():
        header, shape = io.BytesIO(), (manifest["views"], manifest["rows"], width)
        np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
        files[name] = width, np.dtype(kind), header.getvalue()
    return files


def checksums(values: np.ndarray) -> np.ndarray:
    """Return a checksum for each row, never 0: the sum of its 64-bit words, each times an odd number of its own."""
    rows = np.ascontiguousarray(values).view(np.uint8)
    words = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 8))).view(np.uint64)
    factors = np.cumprod(np.full(words.shape[1], 0x9E3779B97F4A7C15, dtype=np.uint64))
    return np.maximum((words * factors).sum(axis=1, dtype=np.uint64) + np.uint64(0x5851F42D4C957F2D), np.uint64(1))


def lines_of(keys: Keys) -> list:
    """Return the line of each sample: a row number, or a key with size and time of its file."""
    if isinstance(keys.names, np.ndarray):
        return keys.names.tolist()
    states = [os.stat(path) if path else None for path in keys.paths or [""] * len(keys.names)]
    return [(name, s and s.st_size, s and s.st_mtime_ns) for name, s in zip(keys.names, states)]


def new_manifest(views: int, outputs: dict[str, int], dtype: torch.dtype, batch_size: int) -> dict[str, Any]:
    """Return what a manifest says of the files."""
    told = {"dtype": str(dtype).removeprefix("torch."), "stored_as": STORED[dtype], "batch_size": batch_size}
    return {"format": FORMAT, "views": views, "outputs": outputs, **told, "as_written": True, "imported": False}


def write_keys(folder: Path, keys: Any, manifest: dict[str, Any]) -> None:
    """Write the keys of the rows, then the manifest: where there is one, all is there."""
    text = "\n".join(str(key) if isinstance(key, int) else json.dumps(key) for key in keys) + "\n"
    manifest = manifest | {"rows": len(keys), "rows_crc32": zlib.crc32(text.encode())}
    manifest |= {"checksum": zlib.crc32(json.dumps(manifest).encode())}
    for name, content in ((ROWS, text), (MANIFEST, json.dumps(manifest, indent=1))):
        with whole_file(folder / name) as unfinished:
            unfinished.write_bytes(content.encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder, once it is whole and of this format."""
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"folder {folder} holds no teacher cache: {MANIFEST} is missing.")
    try:
        manifest = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}).") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {manifest.get('format')!r}, but this version reads {FORMAT!r}.")
    if manifest.pop("checksum", None) != zlib.crc32(json.dumps(manifest).encode()):
        raise ValueError(f"{path} is damaged (its checksum differs). Delete the folder and write the cache again.")
    return manifest


def settle(folder: Path) -> None:
    """Let the files in ``next`` take their places, the manifest last; drop them if they are not whole."""
    files = folder / NEXT
    if (files / MANIFEST).exists():
        for path in sorted(files.iterdir(), key=lambda path: path.name == MANIFEST):
            os.replace(path, folder / path.name)
    shutil.rmtree(files, ignore_errors=True)


def write_at(path: Path, offset: int, content: np.ndarray) -> None:
    """Write into a file that is long enough already."""
    descriptor, rest = os.open(path, os.O_WRONLY), memoryview(content.data).cast("B")
    try:
        while rest:
            written = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[written:], offset + written
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for one writer, or raise ``RuntimeError``; the lock ends with the process, however it ends."""
    import fcntl  # not on Windows, where caches can be read

    folder = folder.resolve()
    if folder in HELD:
        raise RuntimeError(f"This process is already writing the teacher cache in {folder}; wait until it is done.")
    with open(folder / LOCK, "w") as file:
        try:
            # Unlike those of flock, these locks are not kept alive by dataloader workers that outlive a kill.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            told = f"Another process is writing the teacher cache in {folder}; wait for it or choose another folder."
            raise RuntimeError(told) from error
        HELD.add(folder)
        try:
            yield
        finally:
            HELD.remove(folder)
