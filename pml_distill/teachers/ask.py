from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..utils.tensors import one_tensor


class AlwaysEval(torch.nn.Module):
    """A module that stays in eval mode, whatever ``train()`` is called."""

    def train(self, mode: bool = True) -> "AlwaysEval":
        """Stay in eval mode."""
        return super().train(False)


def refuse_unfrozen(teacher: Any, name: str = "teacher") -> None:
    """Raise ``ValueError`` if a teacher is a module that would learn."""
    if isinstance(teacher, torch.nn.Module) and any(parameter.requires_grad for parameter in teacher.parameters()):
        told = f"{name}, a {type(teacher).__name__}, has parameters that require gradients"
        raise ValueError(f"{told}; pass FrozenTeacher(trunk, embedder).")


@torch.no_grad()
def ask(
    teacher: Callable[..., Any], data: Any, index: torch.Tensor | None = None, name: str = "teacher"
) -> torch.Tensor:
    """Return what a teacher makes of a batch, without gradients.

    A teacher is any callable from data to embeddings, such as a frozen network or a function. One with
    ``needs_index = True``, such as ``CachedTeacher``, is called with the rows of the batch too.
    """
    output = teacher(data, index) if getattr(teacher, "needs_index", False) else teacher(data)
    return one_tensor(output, name)


def checked_rows(index: Any, data: Any, num_rows: int) -> np.ndarray:
    """Return the index of a batch as rows from 0 to ``num_rows - 1``, one for each sample of the data."""
    if index is None:
        raise ValueError("The teacher needs the index of each sample: a batch must be (data, labels, index).")
    if not isinstance(index, torch.Tensor):
        raise ValueError(f"index must be a tensor of integers, but is a {type(index).__name__}.")
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        told = f"{index.dtype} of {tuple(index.shape)}"
        raise ValueError(f"index must hold integers and have the shape (batch,), but is {told}.")
    if isinstance(data, torch.Tensor) and len(data) != len(index):
        told = f"{len(index)} for data of {tuple(data.shape)}"
        raise ValueError(f"index must have one row for each sample, but has {told}.")
    rows = index.cpu().numpy()
    if len(rows) and not (0 <= rows.min() and rows.max() < num_rows):
        raise IndexError(f"index must be from 0 to {num_rows - 1}, but goes from {rows.min()} to {rows.max()}.")
    return rows


def device_of(data: Any) -> torch.device | None:
    """Return where data are: that of a tensor, or of the first in a dictionary or sequence."""
    if isinstance(data, (tuple, list, Mapping)):
        parts = data.values() if isinstance(data, Mapping) else data
        return next((device for part in parts if (device := device_of(part)) is not None), None)
    return getattr(data, "device", None)
