"""What tells whether stored outputs are those of a teacher for a dataset."""

import hashlib
import importlib.metadata
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..datasets import SeededViews

#: What decides which pixels a seed gives.
LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "albumentations")
#: What tells which samples a dataset holds where these have no keys.
IDENTITIES = ("labels", "targets")
PLAIN = (bool, int, float, str, type(None), torch.dtype)


def module_fingerprint(module: torch.nn.Module) -> str:
    """Return a hash of the architecture, the weights and the buffers of a module, and of the stored teachers in it.

    Raises:
        ValueError: it asks a teacher that is neither a module nor stored.
    """
    digest = hashlib.sha256()
    for name, part in modules_of(module):
        own = f"{type(part).__name__}({part.extra_repr()})" if list(part.children()) else repr(part)
        digest.update(without_addresses(f"{name} {own}").encode())
        for number, teacher in enumerate([*getattr(part, "teachers", ()), getattr(part, "teacher", None)]):
            if teacher is None or isinstance(teacher, torch.nn.Module):
                continue
            if not hasattr(teacher, "fingerprint"):
                raise ValueError(
                    f"teachers[{number}] of the ensemble is a {type(teacher).__name__}, and what it returns "
                    "cannot be told from what another does; use modules and CachedTeacher."
                )
            digest.update(f"{number} {teacher.fingerprint}".encode())
    # Means and standard deviations of images are often buffers that no state dict holds.
    for name, value in sorted((dict(module.named_buffers()) | module.state_dict()).items()):
        digest.update(uncompiled(name).encode())
        for bytes_of in content(value):
            digest.update(bytes_of)
    return digest.hexdigest()


def code_of(module: torch.nn.Module) -> dict[str, str]:
    """Return the code and the plain attributes of a module, by name: what may change its outputs, and need not."""
    found = {}
    for name, part in modules_of(module):
        found[f"{name} forward"] = plain(type(part).forward)
        own = {f"{name} {k}": plain(v) for k, v in vars(part).items() if k[0] != "_" and k != "training"}
        found |= {k: text for k, text in own.items() if text}
    return found


def modules_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules in a module and their names, without the wrappers of ``torch.compile``."""
    for name, part in module.named_modules():
        if not hasattr(part, "_orig_mod"):
            yield uncompiled(name), part


def uncompiled(name: str) -> str:
    """Return the name that a module or a weight has without ``torch.compile``."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def plain(value: Any) -> str:
    """Return a text of numbers, texts, functions and collections of these; none of other objects."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{' '.join(map(plain, value))}]"
    if isinstance(value, dict):
        return f"[{' '.join(f'{plain(k)}:{plain(v)}' for k, v in value.items())}]"
    code = getattr(value, "__code__", value)
    if hasattr(code, "co_code"):
        return f"{code.co_code.hex()} {code.co_names} {plain(code.co_consts)}"
    return ""


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


def dataset_fingerprint(dataset: SeededViews) -> dict[str, Any]:
    """Return seed, views and the transforms that the teacher sees; for samples without keys what tells these."""
    found: dict[str, Any] = {"seed": dataset.seed, "views": dataset.views, "transform": transforms_of(dataset)}
    if dataset.keys.are_numbers:
        parts = [part for part in parts_of(dataset) if not hasattr(part, "indices")]
        found["length"] = dataset.keys.total
        found["dataset"] = [type(part).__name__ for part in parts]
        found["labels"] = [
            f"{name} of {type(part).__name__}: {digest_of(vars(part)[name])}"
            for part in parts
            for name in IDENTITIES
            if name in getattr(part, "__dict__", {})
        ]
    return found


def transforms_of(dataset: Any) -> list[str]:
    """Return the attributes of a dataset and of those in it that are named for a transform or for the teacher.

    Those for the student or for labels (``student_transform``, ``target_transform``) are left out.
    """
    found = [
        f"{name}: {described(value)}"
        for part in parts_of(dataset)
        for name, value in getattr(part, "__dict__", {}).items()
        if value is not None
        and ("transform" in name or "teacher" in name)
        and not ("student" in name or "target" in name or name == "transforms" and hasattr(part, "transform"))
    ]
    return list(dict.fromkeys(found))


def shows_the_teacher(dataset: Any) -> bool:
    """Whether items hold what the teacher sees; a dataset whose attribute ``teacher`` is None says that they do not."""
    return all(vars(part).get("teacher", part) is not None for part in parts_of(dataset) if hasattr(part, "__dict__"))


def differences(ours: dict[str, Any], stored: dict[str, Any], shown_to_teacher: bool = True) -> list[str]:
    """Return a line for each part of our fingerprint that differs from what is stored."""
    return [
        f"{name}: {shown(stored.get(name))} in the cache, {shown(value)} now"
        for name, value in ours.items()
        if value != stored.get(name)
        # Of what only the teacher sees there is nothing then.
        and not (name == "transform" and not shown_to_teacher and set(value) <= set(stored[name]))
    ]


def versions() -> dict[str, Any]:
    """Return the versions of the libraries that can change pixels."""
    return {f"version of {name}": version(name) for name in LIBRARIES}


def code_digest(code: dict[str, str], state: Sequence[str]) -> str:
    """Return a hash of the code of a teacher without the attributes that change while it runs, such as counters."""
    return digest_of(sorted((name, text) for name, text in code.items() if name not in state))


def flat(data: Any) -> np.ndarray:
    """Return all numbers of a sample, be it a tensor, an array, an image, a text, or several of these."""
    if data is None:
        return np.zeros(0)
    if isinstance(data, torch.Tensor) and data.dtype == torch.bfloat16:
        data = data.float()
    if isinstance(data, str):
        data = np.frombuffer(data.encode(), dtype=np.uint8)
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, (tuple, list)):
        return np.concatenate([flat(part) for part in data] or [np.zeros(0)])
    return np.asarray(data).reshape(-1)


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


def digest_of(values: Any) -> str:
    """Return a hash of a list, an array, a tensor or None."""
    text = repr(values.tolist() if hasattr(values, "tolist") else values)
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


def refuse(folder: Path, lines: Sequence[str], strict: bool = True) -> None:
    """Raise ``ValueError`` if there are differences to name; warn of them if it is not to be strict."""
    if not lines:
        return
    text = f"The teacher cache in {folder} belongs to something else:\n  " + "\n  ".join(lines)
    # Rows of another number of views are nowhere.
    if strict or any(line.startswith("views: ") for line in lines):
        raise ValueError(f"{text}\nChoose another folder, or delete this one; with strict=False it is used as it is.")
    warnings.warn(text, stacklevel=3)
