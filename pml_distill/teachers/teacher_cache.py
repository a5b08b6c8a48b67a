import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from ..datasets import SeededViews, Views
from ..utils.distributed import in_first_process, num_processes, process_rank
from ..utils.modules import eval_mode
from .block_file import CHECKSUMS, HEADER, LOCK, BlockFile, file_sizes, locked
from .cached_teacher import caches
from .fingerprint import dataset_fingerprint, differences, embedding_signature, module_fingerprint, refuse
from .frozen_teacher import FrozenTeacher

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TeacherCache:
    """Writes a teacher's embeddings of all views of all samples into a folder, for ``CachedTeacher`` to serve.

    The teacher's forward pass is the larger part of a distillation step, and what it returns for a fixed image never
    changes. Written once, it costs a read of a memory map in each run that follows.

    Embeddings are written batch by batch. A run that was killed goes on with the first batch that is missing, and ends
    with the same bits. Under ``torchrun`` each process writes its share of the batches; the number of processes may
    change from run to run. The folder holds a fingerprint of the teacher's architecture and weights and of what it
    returns for a sample, of the dataset, its seed, views, transforms and labels, 32 of its rows, and the versions of
    the libraries: another teacher or dataset is refused, never mixed in. Writing needs a POSIX system.

    Args:
        folder: where the cache is or will be.
        teacher: ``FrozenTeacher``, or another frozen module that is called with (data, index); in eval mode while it
            writes.
        dataset: ``SeededViews`` around the dataset to train on.
        dtype: to store, ``torch.float32``, ``torch.float16`` or ``torch.bfloat16``.
        batch_size: of the teacher; a cache that has been begun keeps its own.
        classifier: turns embeddings into logits, to be stored too, as ``"logits"``.
        features: names of modules of ``teacher.trunk``, whose outputs, (B, C) or averaged over the places of
            (B, C, H, W) and the like, are stored too, for ``feature_distillation_loss``; see ``FeatureTap``.

    Raises:
        ValueError: a teacher that is not frozen, without a trunk where ``features`` are asked for, or an ensemble with
            a cache of another dataset or a teacher that is no module; a dataset that is no ``SeededViews``, or yields
            other data at each read; ``dtype`` or ``batch_size`` out of range.

    Example:
        >>> import tempfile
        >>> from pml_distill.datasets import Glyphs
        >>> from pml_distill.models import SmallResNet
        >>> from pml_distill.teachers import CachedTeacher
        >>> dataset = SeededViews(torch.utils.data.Subset(Glyphs("train"), range(10)), views=2)
        >>> image, label, row = dataset[3]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     TeacherCache(folder, FrozenTeacher(SmallResNet(4)), dataset).write()
        ...     CachedTeacher(folder, dataset)(image[None], torch.tensor([row])).shape
        torch.Size([1, 16])
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        teacher: torch.nn.Module,
        dataset: SeededViews,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
        classifier: torch.nn.Module | None = None,
        features: Sequence[str] = (),
    ):
        if not isinstance(teacher, torch.nn.Module) or any(p.requires_grad for p in teacher.parameters()):
            raise ValueError(
                f"teacher, a {type(teacher).__name__}, must be a module without parameters that require gradients; "
                "pass FrozenTeacher(trunk, embedder)."
            )
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, but is {dtype}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but is {batch_size}.")
        if features and not isinstance(teacher, FrozenTeacher):
            raise ValueError(
                f"features names modules of teacher.trunk, but teacher is a {type(teacher).__name__}, not a "
                "FrozenTeacher."
            )
        if not isinstance(dataset, SeededViews):
            raise ValueError(
                "dataset must be SeededViews(dataset, ...), whose items never change, but is a "
                f"{type(dataset).__name__}."
            )
        for cache in caches(teacher):
            cache.check_dataset(dataset)
        features = tuple(dict.fromkeys(features))
        self.folder, self.teacher, self.dataset = Path(folder), teacher, dataset
        self.dtype, self.batch_size, self.features = dtype, batch_size, features
        self.classifier = None if classifier is None else FrozenTeacher(classifier)
        self.tap = teacher.tap(features) if isinstance(teacher, FrozenTeacher) and features else None
        self.names = ["embeddings", *(f"features.{name}" for name in features)]
        if classifier is not None:
            self.names.insert(1, "logits")
        self.fingerprint = {
            "teacher": module_fingerprint(teacher),
            **dataset_fingerprint(dataset),
            "embedding": embedding_signature(teacher, dataset),
        }
        if self.classifier is not None:
            self.fingerprint["classifier"] = module_fingerprint(self.classifier)

    def write(self, num_workers: int = 0) -> None:
        """Write the batches that are missing, and those that are damaged anew; nothing if there are none.

        Before a new cache is begun, its size and about the time it will take are printed. Under ``torch.distributed``
        all processes must call this, and it returns when all are done.

        Args:
            num_workers: processes that read the dataset, for each process that writes.

        Raises:
            ValueError: the folder belongs to another teacher or dataset, with what differs, or holds something else;
                an embedding is not finite in ``dtype``; the teacher or a module returns another shape than expected.
            RuntimeError: another writer is at work in the folder.
            OSError: the disk is too small or full; what is written stays.
        """
        rank, processes = process_rank(), num_processes()
        with ExitStack() as stack, eval_mode(self.teacher):

            def begin() -> None:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.folder))
                self.open_or_create(processes)

            in_first_process(begin)
            file = BlockFile(self.folder)
            if rank > 0:
                # Processes that were seeded differently have different teachers.
                self.check(file)
            self.write_blocks(file, range(rank, file.num_blocks, processes), num_workers, show_progress=rank == 0)
            if processes > 1:
                torch.distributed.barrier()

    def open_or_create(self, processes: int) -> None:
        """Check the cache in the folder, or make a new one if there is none, for so many processes to write."""
        if (self.folder / HEADER).exists():
            self.check(BlockFile(self.folder))
            return
        # A kill leaves an unfinished header under another name.
        others = {path.name for path in self.folder.iterdir() if not path.name.startswith(HEADER)}
        others -= {LOCK, CHECKSUMS, *(f"{name}.bin" for name in self.names)}
        if others:
            raise ValueError(f"folder {self.folder} is not empty and holds no teacher cache, but {sorted(others)[:5]}.")
        num_rows, start = self.dataset.num_rows, time.perf_counter()
        first = range(min(self.batch_size, num_rows))
        batch = default_collate(AllRows(self.dataset).__getitems__(first))
        read = time.perf_counter()
        # On the CPU they are there; on a GPU they may only be under way.
        arrays = {name: values.cpu() for name, values in self.compute(batch).items()}
        seconds = [s * num_rows / len(first) / processes for s in (read - start, time.perf_counter() - read)]
        for name, values in arrays.items():
            if values.ndim != 2 or len(values) != len(first):
                raise ValueError(
                    f"The teacher's {name} of {len(first)} samples must have the shape ({len(first)}, width), but have "
                    f"{tuple(values.shape)}."
                )
        widths = {name: values.shape[1] for name, values in arrays.items()}
        size = sum(file_sizes(num_rows, self.batch_size, widths, self.dtype).values())
        tqdm.write(
            f"Teacher cache {self.folder}: {num_rows:,} rows, {size / 2**20:,.1f} MiB; about {seconds[0]:,.0f} s of "
            f"reading, shared by the workers, and {seconds[1]:,.0f} s of the teacher.",
            file=sys.stderr,
        )
        BlockFile.create(self.folder, num_rows, self.batch_size, widths, self.dtype, self.fingerprint)

    def check(self, file: BlockFile) -> None:
        """Raise ``ValueError`` if a cache is not of this teacher, dataset and precision, and of these arrays."""
        lines = differences(self.fingerprint, file.fingerprint)
        for name, cached, ours in (("arrays", list(file.widths), self.names), ("dtype", file.dtype, self.dtype)):
            if cached != ours:
                lines.append(f"{name}: {cached} in the cache, {ours} now")
        refuse(self.folder, lines)

    def write_blocks(self, file: BlockFile, blocks: range, num_workers: int, show_progress: bool) -> None:
        """Write those of the blocks that are missing or damaged."""
        todo = [block for block in blocks if not file.is_whole(block)]
        batches = [file.rows_of(block) for block in todo]
        loader: DataLoader = DataLoader(
            AllRows(self.dataset),
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=num_workers,
            # The global one is left as it is.
            generator=torch.Generator(),
        )
        total, left = (sum(len(file.rows_of(block)) for block in some) for some in (blocks, todo))
        with tqdm(
            total=total, initial=total - left, unit="row", desc="teacher cache", disable=not show_progress
        ) as bar:
            for block, batch in zip(todo, loader):
                file.write(block, self.compute(batch))
                bar.update(len(file.rows_of(block)))

    @torch.no_grad()
    def compute(self, batch: Any) -> dict[str, torch.Tensor]:
        """Return what is stored of a batch of (data, row)."""
        data, rows = batch
        with self.tap or nullcontext():
            arrays = [self.teacher(Views.of(data).teacher, rows)]
        if self.classifier is not None:
            arrays.append(self.classifier(arrays[0]))
        if self.tap is not None:
            arrays += [pooled(name, output) for name, output in zip(self.features, self.tap.features)]
        return dict(zip(self.names, arrays))


def pooled(name: str, output: torch.Tensor) -> torch.Tensor:
    """Average the output of a module over all but batch and channels.

    Raises:
        ValueError: it is not plain where the channels are.
    """
    if output.ndim not in (2, 4, 5):
        raise ValueError(
            f"features has {name!r}, whose output has the shape {tuple(output.shape)}, but must have (batch, channels) "
            "or the channels followed by two or three dimensions of places; tokens are not pooled."
        )
    return output.flatten(2).mean(2) if output.ndim > 2 else output


class AllRows(Dataset):
    """The data of all views of ``SeededViews`` and their rows, by row."""

    def __init__(self, dataset: SeededViews):
        self.dataset = dataset

    def __len__(self) -> int:
        return self.dataset.num_rows

    def __getitems__(self, rows: Sequence[int]) -> list[tuple]:
        """Return the (data, row) of a batch of rows."""
        return [(data, row) for data, _, row in self.dataset.read(rows)]
