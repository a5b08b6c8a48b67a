"""Whether a dataset yields the same at each read and in each process, and what is stored of it."""

import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ..datasets import SeededViews, Views
from ..datasets.items import read_item
from ..utils.modules import eval_mode
from .array_folder import PIXELS, ArrayFolder
from .ask import ask
from .fingerprint import code_digest, code_of, differences, flat, shows_the_teacher, versions

NUM_SAMPLES, FEW = 32, 4


class TeacherItems(Dataset):
    """The items of ``SeededViews`` by row, each with a signature of what the teacher sees and a hash of its file."""

    def __init__(self, dataset: SeededViews):
        self.dataset = dataset

    def __len__(self) -> int:
        return self.dataset.num_rows

    def __getitems__(self, rows: Sequence[int]) -> list[tuple]:
        """Return several items at once."""
        contents = [self.dataset.content(row % len(self.dataset)) for row in rows]
        return [
            (item, signature(item[0]), np.frombuffer(content, dtype="<u8"))
            for item, content in zip(self.dataset.read(rows), contents)
        ]


class TeacherBatch:
    """Makes a batch of ``TeacherItems``: what the teacher sees, rows, signatures, hashes.

    Args:
        collate_fn: makes a batch of items (data, label, row); None: what the teacher sees is stacked.
    """

    def __init__(self, collate_fn: Callable[[list], Any] | None = None):
        self.collate_fn = collate_fn

    def __call__(self, parts: list[tuple]) -> tuple:
        """Return what the teacher sees, the rows, the signatures and the hashes."""
        items, signatures, contents = zip(*parts)
        if self.collate_fn is None:
            try:
                data = default_collate([Views.of(data).teacher for data, _, _ in items])
            except RuntimeError as error:
                raise ValueError(f"Samples cannot be stacked to a batch ({error}). Give a collate_fn.") from error
        else:
            data = Views.of(read_item(self.collate_fn(list(items)))[0]).teacher
        return data, torch.tensor([row for _, _, row in items]), np.stack(signatures), np.stack(contents)


def signature(data: Any) -> np.ndarray:
    """Return the mean of what the teacher sees of a sample, and three of its values."""
    values = flat(Views.of(data).teacher)
    if not len(values):
        return np.zeros(4)
    return np.asarray([values.mean(dtype=np.float64), *values[[len(values) // k for k in (2, 3, 5)]]], dtype=np.float64)


def signatures(dataset: SeededViews, rows: Sequence[int]) -> np.ndarray:
    """Return the signatures of several rows, (len(rows), 4)."""
    return np.stack([signature(data) for data, _, _ in dataset.read(rows)])


def signatures_in_a_worker(dataset: SeededViews, rows: Sequence[int], settings: dict[str, Any]) -> np.ndarray:
    """Return what ``signatures`` does, but from a worker, if the dataset can be sent to one."""
    loader: DataLoader = DataLoader(
        TeacherItems(dataset),
        batch_sampler=[list(rows)],
        num_workers=1,
        collate_fn=only_signatures,
        # The global one is left as it is.
        generator=torch.Generator(),
        multiprocessing_context=settings.get("multiprocessing_context"),
    )
    try:
        return next(iter(loader))
    except (pickle.PicklingError, AttributeError, TypeError):
        return signatures(dataset, rows)


def only_signatures(parts: list[tuple]) -> np.ndarray:
    """Return the signatures of ``TeacherItems``."""
    return np.stack([part[1] for part in parts])


def alike(values: np.ndarray, others: np.ndarray, tolerance: float = 0.01) -> np.ndarray:
    """Return which rows agree, by default up to what another processor or precision may round otherwise."""
    scale = np.abs(values).max(axis=1, keepdims=True, initial=0)
    return np.isclose(values, others, rtol=tolerance, atol=tolerance * scale, equal_nan=True).all(axis=1)


def spread(rows: np.ndarray, count: int) -> list[int]:
    """Return a few of the rows, from the first to the last at equal steps."""
    return sorted({int(rows[round(place)]) for place in np.linspace(0, len(rows) - 1, count)}) if len(rows) else []


def check_repeats(dataset: SeededViews) -> None:
    """Raise ``ValueError`` if a sample is not the same when read twice."""
    rows = spread(np.arange(dataset.num_rows), NUM_SAMPLES)
    same = alike(signatures(dataset, rows), signatures(dataset, rows), 0)
    if not same.all():
        raise ValueError(
            f"dataset yields other data each time sample {rows[same.argmin()] % len(dataset)} is read, though "
            "SeededViews has seeded random, np.random and torch: something in it has a random generator of its own. "
            "Give SeededViews reseed=, a function that seeds it, such as albumentations' Compose.set_random_seed."
        )


def check_workers(dataset: SeededViews, settings: dict[str, Any]) -> None:
    """Raise ``ValueError`` if a sample is not the same when it is read in a worker."""
    rows = spread(np.arange(dataset.num_rows), 2 * FEW)
    same = alike(signatures(dataset, rows), signatures_in_a_worker(dataset, rows, settings), 0)
    if not same.all():
        raise ValueError(
            f"dataset yields other data for sample {rows[same.argmin()] % len(dataset)} in a worker of a DataLoader: "
            "something in it reads torch.initial_seed() or the worker's number. Give SeededViews reseed=, a function "
            "that sets its generator itself, such as albumentations' Compose.set_random_state."
        )


def disagreements(
    file: ArrayFolder,
    dataset: SeededViews,
    places: np.ndarray,
    fingerprint: dict[str, Any],
    teacher: torch.nn.Module | None = None,
    collate_fn: Callable[[list], Any] | None = None,
) -> list[str]:
    """Return a line for each way in which a dataset, and a teacher, are not those of a folder.

    Where libraries, or the code of the teacher, have changed, a few rows are computed again.

    Args:
        file: the folder.
        dataset: ``SeededViews``.
        places: (num_rows,) of the dataset's rows in the folder, -1 for those that are not there.
        fingerprint: what must agree with the manifest.
        teacher: None not to compare it.
        collate_fn: makes a batch of items for it.
    """
    manifest, shown = file.manifest, shows_the_teacher(dataset)
    lines = differences(fingerprint, manifest, shown)
    there = np.flatnonzero((places >= 0) & (places < len(file.arrays[PIXELS])))
    there = there[~file.missing(places[there])]
    # Vectors that were imported have been computed from something else.
    there = there[~np.isnan(file.arrays[PIXELS][places[there], 0])]
    if not shown or not len(there):
        return lines
    rows = spread(there, NUM_SAMPLES)
    same = alike(signatures(dataset, rows), file.arrays[PIXELS][places[rows]])
    if not same.all():
        others = [str(row) for row, agrees in zip(rows, same) if not agrees]
        more = " and others" if len(others) > 5 else ""
        lines.append(f"samples: what the dataset yields for the rows {', '.join(others[:5])}{more}")
    if lines:
        return lines
    changed = differences(versions(), manifest["versions"])
    state, digest = manifest["code"]
    if not changed and (teacher is None or digest == code_digest(code_of(teacher), state)):
        return []
    few = [row for row in spread(there, FEW) if not file.damaged(places[[row]])[0]]
    if changed and not alike(signatures_in_a_worker(dataset, few, {}), file.arrays[PIXELS][places[few]]).all():
        return [*changed, "samples: what the dataset yields in a worker of a DataLoader"]
    if teacher is not None:
        data, index, _, _ = TeacherBatch(collate_fn)(TeacherItems(dataset).__getitems__(few))
        with eval_mode(teacher):
            embeddings = ask(teacher, data, index).float().cpu().numpy()
        stored = file.read("embeddings", places[few]).float().numpy()
        if embeddings.shape != stored.shape or not alike(stored, embeddings).all():
            return [*changed, "embedding: what the teacher returns for samples that are stored"]
    if changed:
        warnings.warn(
            f"The teacher cache in {file.folder} was written with other libraries, but what was computed again agrees: "
            f"{'; '.join(changed)}.",
            stacklevel=4,
        )
    return []
