"""Whether a dataset yields the same at each read and in each process, and what is stored of it."""

import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ..datasets import SeededViews, Views
from ..datasets.items import read_item
from ..utils.modules import eval_mode
from .array_folder import PIXELS, ArrayFolder
from .ask import ask
from .fingerprint import code_of, differences, digest_of, shows_the_teacher, versions

NUM_SAMPLES, FEW = 32, 4


class TeacherItems(Dataset):
    """The items of ``SeededViews`` by row, each with a signature of what the teacher sees and a hash of its file."""

    def __init__(self, dataset: SeededViews):
        self.dataset = dataset

    def __len__(self) -> int:
        return self.dataset.num_rows

    def __getitems__(self, rows: Sequence[int]) -> list[tuple]:
        """Return several items at once."""
        hashes = [np.frombuffer(self.dataset.content(row % len(self.dataset)), dtype="<u8") for row in rows]
        return [(item, signature(item[0]), own) for item, own in zip(self.dataset.read(rows), hashes)]


class TeacherBatch:
    """Makes a batch of ``TeacherItems``: what the teacher sees, rows, signatures, hashes."""

    def __init__(self, collate_fn: Callable[[list], Any] | None = None):
        self.collate_fn = collate_fn

    def __call__(self, parts: list[tuple]) -> tuple:
        """Return the parts of the batch."""
        items, signatures, hashes = zip(*parts)
        if self.collate_fn is not None:
            data = Views.of(read_item(self.collate_fn(list(items)))[0]).teacher
        else:
            try:
                data = default_collate([Views.of(data).teacher for data, _, _ in items])
            except RuntimeError as error:
                raise ValueError(f"Samples cannot be stacked to a batch ({error}). Give a collate_fn.") from error
        return data, torch.tensor([row for _, _, row in items]), np.stack(signatures), np.stack(hashes)


def signature(data: Any) -> np.ndarray:
    """Return the mean of what the teacher sees of a sample, and three of its values."""
    values = flat(Views.of(data).teacher)
    if not len(values):
        return np.zeros(4)
    return np.array([values.mean(dtype=np.float64), *values[[len(values) // k for k in (2, 3, 5)]]], dtype=np.float64)


def flat(data: Any) -> np.ndarray:
    """Return all numbers of a sample, be it a tensor, an array, an image, a text, or several of these."""
    if isinstance(data, str):
        data = np.frombuffer(data.encode(), dtype=np.uint8)
    if isinstance(data, Mapping):
        data = list(data.values())
    if isinstance(data, (tuple, list)) or data is None:
        return np.concatenate([np.zeros(0), *map(flat, data or ())])
    return np.asarray(data.float() if getattr(data, "dtype", None) == torch.bfloat16 else data).reshape(-1)


def signatures(dataset: SeededViews, rows: Sequence[int]) -> np.ndarray:
    """Return the signatures of several rows, (len(rows), 4)."""
    return np.stack([signature(data) for data, _, _ in dataset.read(rows)])


def signatures_in_a_worker(dataset: SeededViews, rows: Sequence[int], start: Any = None) -> np.ndarray:
    """Return what ``signatures`` does, but from a worker, if the dataset can be sent to one."""
    settings: dict[str, Any] = {"num_workers": 1, "collate_fn": only_signatures, "multiprocessing_context": start}
    # A generator of its own leaves the global one as it is.
    settings |= {"batch_sampler": [list(rows)], "generator": torch.Generator()}
    try:
        return next(iter(DataLoader(TeacherItems(dataset), **settings)))
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


def check_repeats(dataset: SeededViews, in_a_worker: bool = False, start: Any = None) -> None:
    """Raise ``ValueError`` if a sample is not the same when it is read twice, the second time perhaps in a worker."""
    rows = spread(np.arange(dataset.num_rows), 2 * FEW if in_a_worker else NUM_SAMPLES)
    again = signatures_in_a_worker(dataset, rows, start) if in_a_worker else signatures(dataset, rows)
    same = alike(signatures(dataset, rows), again, 0)
    sample = rows[same.argmin()] % len(dataset)
    if not same.all() and in_a_worker:
        raise ValueError(
            f"dataset yields other data for sample {sample} in a worker of a DataLoader: it reads torch.initial_seed() "
            "or the worker's number. Give SeededViews reseed=, such as albumentations' Compose.set_random_state."
        )
    if not same.all():
        raise ValueError(
            f"dataset yields other data each time sample {sample} is read: something in it has a generator of its own. "
            "Give SeededViews reseed=, a function that seeds it, such as albumentations' Compose.set_random_seed."
        )


def code_digest(code: dict[str, str], state: Sequence[str]) -> str:
    """Return a hash of the code of a teacher without the attributes that change while it runs, such as counters."""
    return digest_of(sorted((name, text) for name, text in code.items() if name not in state))


def disagreements(
    file: ArrayFolder,
    dataset: SeededViews,
    places: np.ndarray,
    fingerprint: dict[str, Any],
    teacher: torch.nn.Module | None = None,
    collate_fn: Callable[[list], Any] | None = None,
) -> list[str]:
    """Return a line for each way in which a dataset, and a teacher, are not those of a folder.

    ``places`` are those of the dataset's rows in the folder, -1 where there is none; ``fingerprint`` must agree with
    the manifest. Where libraries, or the code of the teacher, have changed, a few rows are computed again.
    """
    shows_teacher, pixels = shows_the_teacher(dataset), file.arrays[PIXELS]
    lines = differences(fingerprint, file.manifest, shows_teacher)
    there = np.flatnonzero((places >= 0) & (places < len(pixels)))
    there = there[~file.missing(places[there])]
    if not shows_teacher or not len(there):
        return lines
    rows = spread(there, NUM_SAMPLES)
    same = alike(signatures(dataset, rows), pixels[places[rows]])
    if not same.all():
        others = [str(row) for row, agrees in zip(rows, same) if not agrees]
        more = " and others" if len(others) > 5 else ""
        lines.append(f"samples: what the dataset yields for the rows {', '.join(others[:5])}{more}")
    changed, (state, digest) = differences(versions(), file.manifest["versions"]), file.manifest["code"]
    if lines or not changed and (teacher is None or digest == code_digest(code_of(teacher), state)):
        return lines
    few = [row for row in spread(there, FEW) if not file.damaged(places[[row]])[0]]
    if changed and not alike(signatures_in_a_worker(dataset, few), pixels[places[few]]).all():
        return [*changed, "samples: what the dataset yields in a worker of a DataLoader"]
    if teacher is not None and few:
        data, index, _, _ = TeacherBatch(collate_fn)(TeacherItems(dataset).__getitems__(few))
        with eval_mode(teacher):
            embeddings = ask(teacher, data, index).float().cpu().numpy()
        stored = file.read("embeddings", places[few]).float().numpy()
        if embeddings.shape != stored.shape or not alike(stored, embeddings).all():
            return [*changed, "embedding: what the teacher returns for samples that are stored"]
    if changed:
        told = "was written with other libraries, but what was computed again agrees"
        warnings.warn(f"The teacher cache in {file.folder} {told}: {'; '.join(changed)}.", stacklevel=4)
    return []
