import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..utils.files import whole_file

FORMAT = "pml-distill teacher cache 2"
HEADER, CHECKSUMS, LOCK = "cache.json", "checksums.bin", "lock"
#: A block that is written has this bit above its CRC-32; a zero is a block that is not.
WRITTEN = 1 << 32
#: The folders that this process holds: POSIX's locks keep only others out, and end when any file on them is closed.
HELD: set[Path] = set()


class BlockFile:
    """Arrays of many rows in a folder, filled block by block in any order, each block with a checksum.

    ``NAME.bin`` holds the rows of an array without any header, in full length from the start; ``checksums.bin`` a
    little-endian uint64 for each block, which is written after the block, so that what was cut short by a kill counts
    as missing; ``cache.json`` the rest. Blocks are written with ``pwrite`` and not into a memory map, where a full disk
    would end the process.

    Args:
        folder: what ``create`` has made.

    Raises:
        ValueError: ``folder`` holds no such file, one of another format, or an array of another length.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        path = self.folder / HEADER
        if not path.exists():
            raise ValueError(f"folder {self.folder} holds no teacher cache: {HEADER} is missing.")
        try:
            header = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}).") from error
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} has the format {header.get('format')!r}, but this version reads {FORMAT!r}.")
        if header.pop("checksum", None) != checksum_of(header):
            raise ValueError(f"{path} is damaged (its checksum differs). Delete the folder and write the cache again.")
        self.num_rows, self.block_rows, self.widths = header["rows"], header["block_rows"], header["widths"]
        self.dtype, self.fingerprint = getattr(torch, header["dtype"]), header["fingerprint"]
        self.num_blocks = -(-self.num_rows // self.block_rows)
        for name, size in file_sizes(self.num_rows, self.block_rows, self.widths, self.dtype).items():
            actual = (self.folder / name).stat().st_size if (self.folder / name).exists() else 0
            if actual != size:
                raise ValueError(
                    f"{self.folder / name} has {actual:,} bytes, but the cache needs {size:,}: the file has been "
                    "truncated or replaced. Delete the folder and write the cache again."
                )
        self.arrays = {
            name: np.memmap(self.folder / f"{name}.bin", np.uint8, "r", shape=(self.num_rows, self.row_bytes(name)))
            for name in self.widths
        }
        self.checksums = np.memmap(self.folder / CHECKSUMS, "<u8", "r")
        self.verified = np.zeros(self.num_blocks, dtype=bool)

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike,
        num_rows: int,
        block_rows: int,
        widths: dict[str, int],
        dtype: torch.dtype,
        fingerprint: dict[str, Any],
    ) -> "BlockFile":
        """Make the files, without any block, and open them.

        Raises:
            OSError: the disk has less room than they will need.
        """
        folder = Path(folder)
        sizes = file_sizes(num_rows, block_rows, widths, dtype)
        check_room(folder, sum(sizes.values()))
        for name, size in sizes.items():
            with open(folder / name, "wb") as file:
                file.truncate(size)
        header = {
            "format": FORMAT,
            "rows": num_rows,
            "block_rows": block_rows,
            "widths": widths,
            "dtype": str(dtype).removeprefix("torch."),
            "fingerprint": fingerprint,
        }
        # Last, so that where there is a header there are files.
        with whole_file(folder / HEADER) as unfinished:
            unfinished.write_text(json.dumps(header | {"checksum": checksum_of(header)}, indent=1))
        return cls(folder)

    def row_bytes(self, name: str) -> int:
        """The length of a row of an array."""
        return self.widths[name] * self.dtype.itemsize

    def rows_of(self, block: int) -> range:
        """The rows of a block; the last one may be shorter."""
        return range(block * self.block_rows, min(self.num_rows, (block + 1) * self.block_rows))

    def is_whole(self, block: int) -> bool:
        """Whether a block is written and its rows on disk have its checksum."""
        rows, entry = self.rows_of(block), int(self.checksums[block])
        # Read at once: through the memory map it would come page by page.
        return entry != 0 and entry == checksum(
            read_at(self.folder / f"{name}.bin", rows.start * self.row_bytes(name), len(rows) * self.row_bytes(name))
            for name in self.widths
        )

    @property
    def num_written(self) -> int:
        """How many blocks are written."""
        return int(np.count_nonzero(self.checksums))

    def write(self, block: int, arrays: Mapping[str, torch.Tensor]) -> None:
        """Write a block: for each array the tensor of its rows, (rows, width).

        Raises:
            ValueError: an array has another shape; a value is not finite in the file's precision.
            OSError: the disk is full.
        """
        rows, content = self.rows_of(block), {}
        for name in self.widths:
            given, shape = arrays[name].detach().cpu(), (len(rows), self.widths[name])
            of_rows = f"The teacher's {name} of the rows {rows.start} to {rows.stop - 1}"
            if given.shape != shape:
                raise ValueError(f"{of_rows} must have the shape {shape}, but have {tuple(given.shape)}.")
            if not given.isfinite().all():
                raise ValueError(f"{of_rows} are NaN or infinite.")
            values = given.to(self.dtype).contiguous()
            if not values.isfinite().all():
                raise ValueError(
                    f"{of_rows} are not finite in {self.dtype}; torch.bfloat16 and torch.float32 reach further than "
                    "torch.float16."
                )
            content[name] = values.view(torch.uint8).numpy().tobytes()
        try:
            for name, part in content.items():
                write_at(self.folder / f"{name}.bin", rows.start * self.row_bytes(name), part)
            entry = np.array([checksum(content.values())], dtype="<u8")
            write_at(self.folder / CHECKSUMS, 8 * block, entry.tobytes())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    error.errno,
                    f"The disk is full: {self.num_written} of {self.num_blocks} batches are "
                    "written and kept. Make room and write again to go on",
                    str(self.folder),
                ) from error
            raise

    def read(self, name: str, rows: np.ndarray) -> torch.Tensor:
        """Return rows of an array, (len(rows), width), in the order of ``rows``.

        They are read in the order of the file. A block's checksum is verified when it is first read from.

        Raises:
            ValueError: a block is not written or does not have its checksum.
        """
        blocks = rows // self.block_rows
        if not self.verified[blocks].all():
            for block in np.unique(blocks[~self.verified[blocks]]).tolist():
                if not self.is_whole(block):
                    raise ValueError(
                        f"Block {block} of the teacher cache {self.folder} (rows {self.rows_of(block).start} to "
                        f"{self.rows_of(block).stop - 1}) does not have its checksum: a file is damaged. "
                        "TeacherCache.write() computes damaged blocks again."
                    )
                self.verified[block] = True
        order = np.argsort(rows, kind="stable")
        values = np.empty((len(rows), self.row_bytes(name)), dtype=np.uint8)
        values[order] = self.arrays[name][rows[order]]
        return torch.from_numpy(values).flatten().view(self.dtype).view(len(rows), self.widths[name])


def file_sizes(num_rows: int, block_rows: int, widths: dict[str, int], dtype: torch.dtype) -> dict[str, int]:
    """Return the length of each file in bytes."""
    arrays = {f"{name}.bin": num_rows * width * dtype.itemsize for name, width in widths.items()}
    return arrays | {CHECKSUMS: 8 * -(-num_rows // block_rows)}


def checksum(parts: Iterable[Any]) -> int:
    """Return the entry for a block that consists of these bytes."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return WRITTEN | crc


def checksum_of(header: dict[str, Any]) -> int:
    """Return the checksum of a header without its own."""
    return zlib.crc32(json.dumps(header).encode())


def check_room(folder: Path, needed: int) -> None:
    """Raise ``OSError`` if the disk has less room."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"The teacher cache needs {needed / 2**30:.2f} GiB, free are {free / 2**30:.2f}", str(folder)
        )


def read_at(path: Path, offset: int, length: int) -> bytes:
    """Read a part of a file."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(length)


def write_at(path: Path, offset: int, content: bytes) -> None:
    """Write into a file that is long enough already."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        rest = memoryview(content)
        while rest:
            written = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[written:], offset + written
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for one writer; the lock goes with the process that holds it, however it ends.

    Raises:
        RuntimeError: another process holds it, or another writer of this one.
        OSError: the file system knows no locks.
    """
    import fcntl

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
            raise RuntimeError(
                f"Another process is writing the teacher cache in {folder}; wait for it or choose another folder."
            ) from error
        HELD.add(folder)
        try:
            yield
        finally:
            HELD.remove(folder)
