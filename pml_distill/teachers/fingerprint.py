"""What tells whether a cache belongs to a teacher and a dataset."""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from ..datasets import SeededViews, Views
from ..utils.modules import eval_mode
from ..utils.tensors import one_tensor
from .block_file import BlockFile

#: What decides which pixels a seed gives.
LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "albumentations")
NUM_SAMPLES, NUM_VALUES = 32, 16
#: What tells which samples a dataset holds, and in which order; ``indices`` are those of a ``Subset``.
IDENTITIES = ("labels", "targets", "indices")
#: The same in datasets of files: torchvision's and PML's.
FILES = ("samples", "paths")


def module_fingerprint(module: torch.nn.Module) -> str:
    """Return a hash of the architecture, the weights and the buffers of a module, and of what the caches in it hold.

    Raises:
        ValueError: an ensemble has a teacher that is neither a module nor a cache.
    """
    digest = hashlib.sha256(without_addresses(repr(module)).encode())
    # Means and standard deviations of images are often buffers that no state dict holds.
    for name, value in sorted((dict(module.named_buffers()) | module.state_dict()).items()):
        digest.update(name.encode())
        for part in content(value):
            digest.update(part)
    for part in module.modules():
        for number, teacher in enumerate(getattr(part, "teachers", ())):
            if isinstance(teacher, torch.nn.Module):
                continue
            file = getattr(teacher, "file", None)
            if not isinstance(file, BlockFile):
                raise ValueError(
                    f"teachers[{number}] of the ensemble is a {type(teacher).__name__}, and what it returns cannot be "
                    "told from what another does; use modules and CachedTeacher."
                )
            digest.update(f"{number} {file.dtype} {json.dumps(file.fingerprint)}".encode())
    return digest.hexdigest()


def content(value: Any) -> Iterator[Any]:
    """Yield the bytes of an entry of a state dict: a tensor, or what a quantised module or another keeps beside it."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from content(part)
    elif isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        value = value.dequantize() if value.is_quantized else value
        yield value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
    else:
        yield without_addresses(repr(value)).encode()


@torch.no_grad()
def embedding_signature(teacher: torch.nn.Module, dataset: SeededViews) -> list[float]:
    """Return a few values of a teacher's embedding of the first sample: no weight tells of what its code does."""
    data, row = default_collate([(dataset.read([0])[0][0], 0)])
    with eval_mode(teacher):
        embedding = one_tensor(teacher(Views.of(data).teacher, row), "teacher")
    return a_few(flat(embedding.double().cpu()))


def dataset_fingerprint(dataset: SeededViews) -> dict[str, Any]:
    """Return length, views, transforms, labels and files of a dataset, what a few samples look like, and the versions.

    Raises:
        ValueError: a sample is not the same when read twice.
    """
    return {
        "length": len(dataset),
        "seed": dataset.seed,
        "views": dataset.views,
        "dataset": [type(part).__name__ for part in parts_of(dataset)],
        "transform": [
            f"{name}: {described(value)}"
            for _, name, value in attributes_of(dataset)
            if "transform" in name and value is not None
        ],
        "labels": [
            f"{name} of {type(part).__name__}: {digest_of(value)}"
            for part, name, value in attributes_of(dataset)
            if name in IDENTITIES
        ],
        "files": [
            f"{name} of {type(part).__name__}: {digest_of(value, getattr(part, 'root', ''))}"
            for part, name, value in attributes_of(dataset)
            if name in FILES and names_files(value)
        ],
        **{f"version of {name}": version(name) for name in LIBRARIES},
        "samples": {str(row): signature(dataset, row) for row in sampled_rows(dataset)},
    }


def differences(ours: dict[str, Any], cached: dict[str, Any]) -> list[str]:
    """Return a line for each part of our fingerprint that differs from the cache's."""
    lines = []
    for name, value in ours.items():
        if name == "samples":
            others = [row for row, values in value.items() if not alike(values, cached[name].get(row))]
            if others:
                more = " and others" if len(others) > 5 else ""
                lines.append(f"samples: what the dataset yields for the rows {', '.join(others[:5])}{more}")
        elif name == "embedding":
            if not alike(value, cached.get(name)):
                lines.append("embedding: what the teacher returns for the first sample")
        elif value != cached.get(name):
            lines.append(f"{name}: {shown(cached.get(name))} in the cache, {shown(value)} now")
    return lines


def sampled_rows(dataset: SeededViews) -> list[int]:
    """Return a few rows over all samples and views."""
    return sorted({round(place) for place in np.linspace(0, dataset.num_rows - 1, NUM_SAMPLES)})


def signature(dataset: SeededViews, row: int) -> list[float]:
    """Return the mean of the data that the teacher sees of a sample and a few values, after reading it twice."""
    data, again = (dataset.read([row])[0][0] for _ in range(2))
    if not np.array_equal(flat(data), flat(again), equal_nan=True):
        raise ValueError(
            f"dataset yields other data each time sample {row % len(dataset)} is read, though SeededViews has seeded "
            "random, np.random and torch: something in it has a random generator of its own. Give SeededViews "
            "reseed=, a function that seeds it, such as albumentations' Compose.set_random_seed."
        )
    values = flat(Views.of(data).teacher)
    return [float(values.mean()), *a_few(values)]


def a_few(values: np.ndarray) -> list[float]:
    """Return some of the values, from the first to the last at equal steps."""
    return values[np.linspace(0, len(values) - 1, NUM_VALUES).round().astype(int)].tolist()


def alike(values: list[float], others: list[float] | None) -> bool:
    """Whether two signatures agree, up to what another processor may round otherwise."""
    scale = max(map(abs, values), default=0.0)
    return others is not None and bool(np.allclose(values, others, rtol=0.01, atol=0.01 * scale, equal_nan=True))


def flat(data: Any) -> np.ndarray:
    """Return all numbers of a sample, be it a tensor, an array, an image, a text, or several of these."""
    if isinstance(data, str):
        data = np.frombuffer(data.encode(), dtype=np.uint8)
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, (tuple, list)):
        return np.concatenate([flat(part) for part in data])
    return np.asarray(data, dtype=np.float64).reshape(-1)


def chain(dataset: Any) -> Iterator[Any]:
    """Yield a dataset, the one it wraps, and so on."""
    while dataset is not None:
        yield dataset
        dataset = getattr(dataset, "dataset", None)


def parts_of(dataset: Any) -> Iterator[Any]:
    """Yield a dataset and all that it wraps or joins, such as a ``ConcatDataset``."""
    yield dataset
    inner = [getattr(dataset, name, None) for name in ("dataset", "labeled", "unlabeled")]
    for part in (*inner, *(getattr(dataset, "datasets", None) or ())):
        if part is not None:
            yield from parts_of(part)


def attributes_of(dataset: Any) -> Iterator[tuple[Any, str, Any]]:
    """Yield each part of a dataset with the name and the value of each of its attributes."""
    for part in parts_of(dataset):
        for name, value in getattr(part, "__dict__", {}).items():
            yield part, name, value


def described(transform: Any) -> str:
    """Return the repr of a transform, and the attributes of those in it that have only the repr of every object."""
    text = repr(transform)
    for part in (transform, *getattr(transform, "transforms", ())):
        if type(part).__repr__ is object.__repr__:  # type: ignore[comparison-overlap]
            attributes = dict(getattr(part, "__dict__", {}))
            # The order of a set differs from process to process.
            attributes |= {k: sorted(v, key=repr) for k, v in attributes.items() if isinstance(v, (set, frozenset))}
            text += f" {attributes}"
    return without_addresses(text)


def names_files(values: Any) -> bool:
    """Whether these are paths, or tuples that begin with one: others may call their images ``samples``."""
    first = next(iter(values), None) if isinstance(values, (list, tuple, np.ndarray)) else None
    first = first[0] if isinstance(first, tuple) and first else first
    return isinstance(first, (str, Path))


def digest_of(values: Any, root: Any = "") -> str:
    """Return a hash of a list, an array, a tensor or None; of paths what stands behind the root, which may move."""
    text = repr(values.tolist() if hasattr(values, "tolist") else values)
    text = text.replace(str(root), "") if root else text
    return hashlib.sha256(without_addresses(text).encode()).hexdigest()[:16]


def version(name: str) -> str | None:
    """Return the version of an installed library without its build, None where it is not installed."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def without_addresses(text: str) -> str:
    """Drop the addresses of objects, which change from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def shown(value: Any) -> str:
    """Return a value for a message, cut to a readable length."""
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def refuse(folder: Path, lines: Sequence[str]) -> None:
    """Raise ``ValueError`` if there are differences to name."""
    if lines:
        raise ValueError(
            f"The teacher cache in {folder} belongs to something else:\n  "
            + "\n  ".join(lines)
            + "\nChoose another folder, or delete this one."
        )
