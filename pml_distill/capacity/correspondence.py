from itertools import zip_longest
from typing import Any

from torch import nn

from ..teachers import EnsembleTeacher
from ..utils.modules import unwrapped
from .compactor import find_chains


def check_networks(student: Any, teacher: Any) -> None:
    """Raise ``ValueError`` for what hides the passes of the student, or is no network, or several."""
    if not isinstance(student, nn.Module):
        raise ValueError(f"student must be a network, but is a {type(student).__name__}.")
    if isinstance(student, nn.DataParallel) or hasattr(student, "_orig_mod"):
        raise ValueError(
            f"student must be the network itself, or in DistributedDataParallel, but is of type "
            f"{type(student).__name__}, behind which its passes cannot be seen."
        )
    if not isinstance(teacher, nn.Module | None):
        raise ValueError(f"teacher must be a network, a FrozenTeacher or None, but is a {type(teacher).__name__}.")
    if isinstance(teacher, EnsembleTeacher):
        raise ValueError("teacher must be a single network, but is an EnsembleTeacher: give one of its teachers.")
    if teacher is not None and any(module is unwrapped(student) for module in teacher.modules()):
        raise ValueError("teacher is the student; give it a network of its own.")


def check_correspondence(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ``ValueError`` for the first block of the student that the teacher has not at the same place."""
    for own, other in zip_longest(find_chains(student, "all"), find_chains(teacher, "all")):
        described = ["nothing" if c is None else f"{c.block_name} ({class_name(c.block)})" for c in (own, other)]
        if described[0] != described[1]:
            raise ValueError(
                f"student and teacher must be made of the same blocks, but where the student has {described[0]}, the "
                f"teacher, a {type(teacher).__name__}, has {described[1]}."
            )
        widths = own.conv.out_channels, other.conv.out_channels
        if own.compactor is not None and widths[0] != widths[1]:
            raise ValueError(f"teacher has {widths[1]} channels behind {own.name}, the student {widths[0]}.")


def class_name(module: nn.Module) -> str:
    """Return the full name of a module's class: libraries call different blocks alike."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
