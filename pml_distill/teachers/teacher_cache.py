import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..datasets import SeededViews
from ..utils.distributed import in_first_process, num_processes, process_rank
from ..utils.modules import eval_mode
from .agreement import TeacherBatch, TeacherItems, check_repeats, code_digest, disagreements
from .array_folder import (
    LOCK,
    MANIFEST,
    NEXT,
    ROWS,
    STORED,
    ArrayFolder,
    layout,
    lines_of,
    locked,
    new_manifest,
    settle,
)
from .ask import ask
from .cached_teacher import caches
from .fingerprint import code_of, dataset_fingerprint, differences, module_fingerprint, refuse, versions
from .frozen_teacher import FrozenTeacher


class TeacherCache:
    """Writes a teacher's embeddings of all views of all samples into a folder, for ``CachedTeacher`` to serve.

    The folder holds plain ``.npy`` files, see ``ArrayFolder``. Only missing rows are computed: after a kill, and for
    samples that are new. Rows belong to samples by id or file (see ``SeededViews``), so that a dataset may grow,
    shrink, be reordered or moved. Samples without either are known by their row number; then labels and length of the
    dataset must stay. Under ``torchrun`` the processes share the work. Another teacher, seed, number of views or
    transform of the teacher's side is an error. Writing needs a POSIX system.

    Args:
        folder: where the cache is or will be.
        teacher: ``FrozenTeacher``, or another frozen module; in eval mode while it writes.
        dataset: ``SeededViews`` around the dataset to train on.
        dtype: to store, ``torch.float32``, ``torch.float16`` or ``torch.bfloat16``.
        batch_size: of the teacher; a cache that has been begun keeps its own.
        classifier: turns embeddings into logits, to be stored too, as ``"logits"``.
        features: names of modules of ``teacher.trunk``, whose outputs, (B, C) or averaged over the places of
            (B, C, H, W) and the like, are stored too, for ``feature_distillation_loss``.
        collate_fn: makes a batch of items (data, label, row), as in a ``DataLoader``; None: data are stacked.
        strict: False to use a folder that belongs to something else, with a warning.

    Raises:
        ValueError: a teacher that is not frozen, has no trunk for ``features``, or asks a cache of another dataset; a
            dataset that is no ``SeededViews``, or yields other data at each read; ``dtype`` or ``batch_size``.

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
        collate_fn: Callable[[list], Any] | None = None,
        strict: bool = True,
    ):
        if not isinstance(teacher, torch.nn.Module) or any(p.requires_grad for p in teacher.parameters()):
            told = f"teacher, a {type(teacher).__name__}, must be a module without parameters that require gradients"
            raise ValueError(f"{told}; pass FrozenTeacher(trunk, embedder).")
        if dtype not in STORED:
            raise ValueError(f"dtype must be one of {', '.join(map(str, STORED))}, but is {dtype}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but is {batch_size}.")
        if features and not isinstance(teacher, FrozenTeacher):
            kind = type(teacher).__name__
            raise ValueError(f"features names modules of teacher.trunk, but teacher is a {kind}, not a FrozenTeacher.")
        if not isinstance(dataset, SeededViews):
            raise ValueError(f"dataset must be SeededViews(dataset, ...), but is a {type(dataset).__name__}.")
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
        self.collate, self.strict = TeacherBatch(collate_fn), strict
        check_repeats(dataset)
        self.fingerprint = {
            "teacher": module_fingerprint(teacher),
            **dataset_fingerprint(dataset),
            "classifier": None if self.classifier is None else module_fingerprint(self.classifier),
        }

    def write(self, num_workers: int = 0, **loader: Any) -> None:
        """Write the rows that are missing, and those that are damaged anew; nothing if there are none.

        Before a new cache is begun, its size and about the time it will take are printed. Under ``torch.distributed``
        all processes must call this, and it returns when all are done.

        Args:
            num_workers: processes that read the dataset, for each process that writes.
            **loader: other settings of the ``DataLoader``, such as ``collate_fn``, ``prefetch_factor``, ``pin_memory``
                and ``multiprocessing_context``.

        Raises:
            ValueError: the folder belongs to another teacher or dataset, with what differs, or holds something else;
                the dataset yields other data in a worker; an embedding is not finite in ``dtype``; the teacher or a
                module returns another shape than expected.
            RuntimeError: another writer is at work in the folder; a sample cannot be read.
            OSError: the disk is too small or full; what is written stays.
        """
        if "collate_fn" in loader:
            self.collate = TeacherBatch(loader.pop("collate_fn"))
        rank, processes, settings = process_rank(), num_processes(), {"num_workers": num_workers, **loader}
        with ExitStack() as stack, eval_mode(self.teacher):

            def begin() -> None:
                if self.is_done_and_read_only():
                    return
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.folder))
                self.open_or_create(processes, settings.get("multiprocessing_context"))

            in_first_process(begin)
            file = ArrayFolder(self.folder)
            if rank > 0:
                # Processes that were seeded differently have different teachers.
                self.check(file)
            self.write_rows(file, rank, processes, settings)
            if processes > 1:
                torch.distributed.barrier()

    def is_done_and_read_only(self) -> bool:
        """Whether nothing is to be written where nothing can be."""
        if not (self.folder / MANIFEST).exists() or os.access(self.folder, os.W_OK):
            return False
        file = ArrayFolder(self.folder)
        self.check(file)
        places = self.places(file)
        return places.min() >= 0 and not file.missing(places).any()

    def open_or_create(self, processes: int, start: Any = None) -> None:
        """Check the cache in the folder and make room for new samples, or begin one, for so many processes to write."""
        settle(self.folder)
        lines = lines_of(self.dataset.keys)
        if not (self.folder / MANIFEST).exists():
            return self.create(lines, processes, start)
        file = ArrayFolder(self.folder)
        self.check(file)
        new = dict.fromkeys(line for line, row in zip(lines, file.find(self.dataset.keys, rename=True)) if row < 0)
        if new:
            check_repeats(self.dataset, in_a_worker=True, start=start)
            manifest = file.manifest | {"as_written": False}
            ArrayFolder.create(self.folder / NEXT, [*file.lines(), *new], manifest, old=file)
            settle(self.folder)

    def create(self, lines: list, processes: int, start: Any) -> None:
        """Make the files for samples with these lines, and write the first batch, whose time tells that of all."""
        first_of = {line: sample for sample, line in reversed(list(enumerate(lines)))}
        unique, views = list(dict.fromkeys(lines)), self.dataset.views
        manifest = new_manifest(views, {name: 0 for name in self.names}, self.dtype, self.batch_size) | self.fingerprint
        # A kill leaves unfinished files under other names.
        others = {path.name for path in self.folder.iterdir() if not path.name.endswith(".tmp")}
        others -= {LOCK, ROWS, *(f"{name}.npy" for name in layout(manifest | {"rows": 0}))}
        if others:
            raise ValueError(f"folder {self.folder} is not empty and holds no teacher cache, but {sorted(others)[:5]}.")
        check_repeats(self.dataset, in_a_worker=True, start=start)
        num_rows, begun, before = views * len(unique), time.perf_counter(), code_of(self.teacher)
        places = np.arange(min(self.batch_size, num_rows))
        rows = [p // len(unique) * len(lines) + first_of[unique[p % len(unique)]] for p in places.tolist()]
        batch = self.collate(TeacherItems(self.dataset).__getitems__(rows))
        read = time.perf_counter()
        # On the CPU they are there; on a GPU they may only be under way.
        outputs = {name: values.cpu() for name, values in self.compute(batch).items()}
        seconds = [s * num_rows / len(rows) / processes for s in (read - begun, time.perf_counter() - read)]
        for name, values in outputs.items():
            if values.ndim != 2 or len(values) != len(rows):
                told = f"must have the shape ({len(rows)}, width), but have {tuple(values.shape)}"
                raise ValueError(f"The teacher's {name} of {len(rows)} samples {told}.")
            manifest["outputs"][name] = values.shape[1]
        size = num_rows * sum(manifest["outputs"].values()) * self.dtype.itemsize / 2**20
        tqdm.write(
            f"Teacher cache {self.folder}: {num_rows:,} rows, {size:,.1f} MiB; about {seconds[0]:,.0f} s of reading, "
            f"shared by the workers, and {seconds[1]:,.0f} s of the teacher.",
            file=sys.stderr,
        )
        code = code_of(self.teacher)
        # What running the teacher changes, such as a counter, does not tell it from another.
        state = sorted(name for name in code if code[name] != before.get(name))
        manifest |= {"versions": versions(), "code": [state, code_digest(code, state)]}
        ArrayFolder.create(self.folder, unique, manifest)
        ArrayFolder(self.folder).write(places, outputs, *batch[2:])

    def places(self, file: ArrayFolder) -> np.ndarray:
        """Return the place of each row of the dataset in the folder, -1 for those that are not there."""
        found = file.find(self.dataset.keys)
        starts = file.num_rows * np.arange(self.dataset.views)[:, None]
        return np.where(found < 0, -1, starts + found).reshape(-1)

    def check(self, file: ArrayFolder) -> None:
        """Raise ``ValueError`` if a cache is not of this teacher, dataset and precision, and of these outputs."""
        kinds = (("arrays", list(file.widths), self.names), ("dtype", file.dtype, self.dtype))
        lines = [f"{name}: {cached} in the cache, {ours} now" for name, cached, ours in kinds if cached != ours]
        if lines:
            refuse(self.folder, [*differences(self.fingerprint, file.manifest), *lines])
        told = self.places(file), self.fingerprint, self.teacher, self.collate.collate_fn
        refuse(self.folder, disagreements(file, self.dataset, *told), self.strict)

    def write_rows(self, file: ArrayFolder, rank: int, processes: int, settings: dict[str, Any]) -> None:
        """Write this process' share of the rows that are missing or damaged, in batches."""
        places, rows = np.unique(self.places(file), return_index=True)
        batches = places // file.batch_size
        own = batches % processes == rank
        places, rows, batches = places[own], rows[own], batches[own]
        # The batch of a damaged row is computed as a whole, so that it has the same bits.
        todo = np.flatnonzero(file.missing(places) | np.isin(batches, batches[file.damaged(places)]))
        parts = np.split(todo, np.flatnonzero(np.diff(batches[todo])) + 1) if len(todo) else []
        loader: DataLoader = DataLoader(
            TeacherItems(self.dataset),
            batch_sampler=[rows[part].tolist() for part in parts],
            collate_fn=self.collate,
            # The global one is left as it is.
            generator=torch.Generator(),
            **settings,
        )
        done = len(rows) - len(todo)
        with tqdm(total=len(rows), initial=done, unit="row", desc="teacher cache", disable=rank > 0) as bar:
            for part, batch in zip(parts, loader):
                file.write(places[part], self.compute(batch), *batch[2:])
                bar.update(len(part))

    @torch.no_grad()
    def compute(self, batch: tuple) -> dict[str, torch.Tensor]:
        """Return what is stored of a batch of ``TeacherBatch``."""
        with self.tap or nullcontext():
            outputs = [ask(self.teacher, batch[0], batch[1])]
        if self.classifier is not None:
            outputs.append(self.classifier(outputs[0]))
        if self.tap is not None:
            outputs += [pooled(name, output) for name, output in zip(self.features, self.tap.features)]
        return dict(zip(self.names, outputs))


def pooled(name: str, output: torch.Tensor) -> torch.Tensor:
    """Average the output of a module over all but batch and channels."""
    if output.ndim not in (2, 4, 5):
        raise ValueError(
            f"features has {name!r}, whose output has the shape {tuple(output.shape)}, but must have (batch, channels) "
            "or the channels followed by two or three dimensions of places; tokens are not pooled."
        )
    return output.flatten(2).mean(2) if output.ndim > 2 else output
