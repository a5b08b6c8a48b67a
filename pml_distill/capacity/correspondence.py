import sys
from itertools import zip_longest
from typing import Any

from torch import nn

from ..teachers import EnsembleTeacher
from ..utils.modules import unwrapped
from .chain import Chain, find_chains
from .compactor import find_compactors
from .tracing import is_norm_act


def check_networks(student: Any, teacher: Any) -> None:
    """Raise ``ValueError`` for what hides the passes of the student, or is no network, or several."""
    if not isinstance(student, nn.Module):
        raise ValueError(f"student must be a network, but is a {type(student).__name__}.")
    if isinstance(student, nn.DataParallel) or hasattr(student, "_orig_mod"):
        raise ValueError(
            f"student must be the network itself, or in DistributedDataParallel, but is a {type(student).__name__}."
        )
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is not None and any(isinstance(parameter, tensor.DTensor) for parameter in student.parameters()):
        raise ValueError(
            "student is sharded by fully_shard, so that no process holds whole rows of its compactors: train it in "
            "DistributedDataParallel instead."
        )
    if not isinstance(teacher, nn.Module | None) or isinstance(teacher, EnsembleTeacher):
        raise ValueError(f"teacher must be a network of its own or None, but is a {type(teacher).__name__}.")
    if teacher is not None and any(module is unwrapped(student) for module in teacher.modules()):
        raise ValueError("teacher is the student; give it a network of its own.")


def check_correspondence(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ``ValueError`` for the first block of the student that the teacher has not at the same place."""
    compactors = find_compactors(teacher) or find_chains(teacher)
    chains = compactors if isinstance(compactors, list) else [compactor.chain for compactor in compactors.values()]
    own = [compactor.chain for compactor in find_compactors(student).values()]
    sides = [blocks(student, own), blocks(teacher, [c for c in chains if c.inner or not all(d.inner for d in own)])]
    for here, there in zip_longest(*sides):
        if here != there:
            described = ["nothing" if block is None else f"{block[0]} ({block[1]})" for block in (here, there)]
            raise ValueError(
                f"student and teacher must be made of the same blocks, but where the student has {described[0]}, the "
                f"teacher, a {type(teacher).__name__}, has {described[1]}."
            )
    by_name = dict(zip(names_of(teacher, chains), chains))
    for name, compactor in find_compactors(student).items():
        if name not in by_name:
            raise ValueError(f"teacher has no channels behind {name} that can be told apart, the student has.")
        widths = by_name[name].width, compactor.chain.width
        if widths[0] != widths[1]:
            raise ValueError(f"teacher has {widths[0]} channels behind {name}, the student {widths[1]}.")


def blocks(model: nn.Module, chains: list[Chain]) -> list[tuple[str, str]]:
    """Return the blocks with chains, each once, as name and class."""
    names = {module: name for name, module in model.named_modules()}
    kinds = {module: f"{type(module).__module__}.{type(module).__qualname__}" for module in names}
    return list(dict.fromkeys((names[chain.block], kinds[chain.block]) for chain in chains))


def names_of(model: nn.Module, chains: list[Chain]) -> list[str]:
    """Return what compactors of these chains would be called, or are."""
    names = {module: name for name, module in model.named_modules()}
    return [f"{names[c.place]}.drop" if is_norm_act(c.place) else names[c.place].removesuffix(".0") for c in chains]
