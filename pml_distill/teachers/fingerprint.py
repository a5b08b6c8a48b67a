"""What tells whether stored outputs are those of a teacher for a dataset."""

import hashlib
import importlib.metadata
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..datasets import SeededViews

#: What decides which pixels a seed gives.
LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "albumentations")
#: What tells which samples a dataset holds where these have no keys.
IDENTITIES = ("labels", "targets")
PLAIN = (bool, int, float, str, tuple, list, dict, torch.dtype)


def module_fingerprint(module: torch.nn.Module) -> str:
    """Return a hash of the architecture, the weights and the buffers of a module, and of the stored teachers in it."""
    digest = hashlib.sha256()
    for name, part in modules_of(module):
        own = f"{type(part).__name__}({part.extra_repr()})" if list(part.children()) else repr(part)
        digest.update(without_addresses(f"{name} {own}").encode())
        for number, teacher in enumerate([*getattr(part, "teachers", ()), getattr(part, "teacher", None)]):
            if teacher is not None and not isinstance(teacher, torch.nn.Module):
                if not hasattr(teacher, "fingerprint"):
                    told = f"teachers[{number}] of the ensemble is a {type(teacher).__name__}"
                    raise ValueError(f"{told}, whose weights are not known; use modules and CachedTeacher.")
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
        for key, value in {**vars(part), "forward": type(part).forward}.items():
            code = getattr(value, "__code__", None)
            if key[0] != "_" and key != "training" and (code or isinstance(value, PLAIN)):
                text = repr((code.co_code, code.co_names, code.co_consts) if code else value)
                found[f"{name} {key}"] = without_addresses(text)
    return found


def modules_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules in a module and their names, without the wrappers of ``torch.compile``."""
    return ((uncompiled(name), part) for name, part in module.named_modules() if not hasattr(part, "_orig_mod"))


def uncompiled(name: str) -> str:
    """Return the name that a module or a weight has without ``torch.compile``."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


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
    """Return seed, views and the transforms that the teacher sees; for samples without keys what tells these.

    Transforms are the attributes named for one or for the teacher, in any dataset in this one, but for those named
    for the student or for labels, as ``student_transform``.
    """
    transforms, labels, kinds = [], [], []
    for part in parts_of(dataset):
        kinds += [] if hasattr(part, "indices") else [type(part).__name__]
        for name, value in getattr(part, "__dict__", {}).items():
            # torchvision has ``transform`` in ``transforms`` once more.
            seen = name != "transforms" or not hasattr(part, "transform")
            seen = seen and re.search("transform|teacher", name) and not re.search("student|target", name)
            if value is not None and seen:
                transforms.append(f"{name}: {described(value)}")
            elif name in IDENTITIES:
                labels.append(f"{name} of {type(part).__name__}: {digest_of(value)}")
    found = {"seed": dataset.seed, "views": dataset.views, "transform": list(dict.fromkeys(transforms))}
    if not dataset.keys.are_numbers:
        return found
    return found | {"length": dataset.keys.total, "dataset": kinds, "labels": labels}


def shows_the_teacher(dataset: Any) -> bool:
    """Whether items hold what the teacher sees; a dataset whose attribute ``teacher`` is None says that they do not."""
    return all(getattr(part, "__dict__", {}).get("teacher", part) is not None for part in parts_of(dataset))


def differences(ours: dict[str, Any], stored: dict[str, Any], shows_teacher: bool = True) -> list[str]:
    """Return a line for each part of our fingerprint that differs from what is stored."""
    return [
        f"{name}: {str(stored.get(name)):.120} in the cache, {str(value):.120} now"
        for name, value in ours.items()
        if value != stored.get(name)
        # Of transforms that only the teacher sees there are none then.
        and not (name == "transform" and not shows_teacher and set(value) <= set(stored[name]))
    ]


def versions() -> dict[str, str | None]:
    """Return the versions of the libraries that can change pixels."""
    return {f"version of {name}": version(name) for name in LIBRARIES}


def version(name: str) -> str | None:
    """Return the version of an installed library without its build, None where it is not installed."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


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


def without_addresses(text: str) -> str:
    """Drop the addresses of objects, which change from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def refuse(folder: Path, lines: Sequence[str], strict: bool = True) -> None:
    """Raise ``ValueError`` if there are differences to name; warn of them if it is not to be strict."""
    text = f"The teacher cache in {folder} belongs to something else:\n  " + "\n  ".join(lines)
    # Rows of another number of views are nowhere.
    if lines and (strict or any(line.startswith("views: ") for line in lines)):
        raise ValueError(f"{text}\nChoose another folder, or delete this one; strict=False uses it as it is.")
    if lines:
        warnings.warn(text, stacklevel=3)
