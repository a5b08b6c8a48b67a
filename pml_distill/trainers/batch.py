from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ..datasets.items import UNLABELED, numbered, read_item


class Batch(NamedTuple):
    """A batch: data, labels and the samples' rows in the dataset.

    Args:
        data: what the networks take, or the embeddings of both networks.
        labels: (B,) or (B, levels), -1 for a sample without; None where the dataset has no labels.
        index: the rows; None where the dataset has none.
    """

    data: Any
    labels: torch.Tensor | None = None
    index: Any = None

    @classmethod
    def of(cls, batch: Any, number: Callable[[Any], torch.Tensor] = numbered) -> "Batch":
        """Read what a loader yields; ``number`` turns the names of classes into numbers."""
        if isinstance(batch, cls):
            return batch
        data, labels, index = read_item(batch)
        if isinstance(labels, (tuple, list)):
            # A loader brings labels of several levels as one sequence for each.
            levels = bool(labels) and np.ndim(labels[0]) > 0
            labels = torch.stack([number(level) for level in labels], dim=1) if levels else number(labels)
        elif labels is not None:
            labels = number(labels)
        if labels is not None and not 1 <= labels.ndim <= 2:
            text = f"The labels of a batch must be (B,) or (B, C), but have shape {tuple(labels.shape)}."
            raise ValueError(f"{text} Without any, yield (data,).")
        return cls(data, labels, index)

    def labeled_rows(self) -> torch.Tensor | None:
        """Return which rows have a label; None: all, or there are no labels."""
        if self.labels is None:
            return None
        known = (self.labels != UNLABELED).reshape(len(self.labels), -1).any(dim=1)
        return None if known.all() else known.nonzero().flatten()

    def labeled(self) -> "Batch":
        """Return the rows that have a label: this batch itself if all have, or if there are no labels."""
        rows = self.labeled_rows()
        return self if rows is None else self.at(rows)

    def all_or_none(self) -> torch.Tensor | None:
        """Return the labels if all rows have one: a -1 would be taken for a class."""
        return self.labels if self.labeled_rows() is None else None

    def at(self, rows: torch.Tensor) -> "Batch":
        """Return these rows."""
        return Batch(*(select(part, rows) for part in self))


def select(part: Any, rows: torch.Tensor) -> Any:
    """Return rows of a tensor, of a sequence of samples, or of each part of a tuple or dictionary of tensors."""
    if isinstance(part, torch.Tensor):
        return part[rows.to(part.device)]
    in_parts = isinstance(part, (tuple, list)) and all(isinstance(p, torch.Tensor) and p.ndim for p in part)
    if isinstance(part, Mapping) or hasattr(part, "_fields") or in_parts:
        return mapped(part, lambda value: select(value, rows))
    if isinstance(part, (tuple, list)):
        return [part[row] for row in rows.tolist()]
    return part if part is None else part[rows.tolist()]


def mapped(part: Any, function: Callable[[Any], Any]) -> Any:
    """Return a dictionary, tuple or list of what the function makes of the values."""
    if isinstance(part, Mapping):
        return {name: function(value) for name, value in part.items()}
    values = map(function, part)
    return type(part)(*values) if hasattr(part, "_fields") else type(part)(values)


def on_device(part: Any, device: torch.device) -> Any:
    """Return tensors, and those in tuples, lists and dictionaries, on a device; other objects as they are."""
    if isinstance(part, torch.Tensor):
        return part.to(device, non_blocking=torch.device(device).type == "cuda")
    if isinstance(part, Mapping) or hasattr(part, "_fields") or type(part) in (tuple, list):
        return mapped(part, lambda value: on_device(value, device))
    return part


class Embeddings(NamedTuple):
    """What the networks make of a batch.

    Args:
        student: (B, Ds).
        projected: (B, Dt) by ``models["projection"]``, or the student's.
        teacher: (B, Dt), or None where nothing asks for them.
    """

    student: torch.Tensor
    projected: torch.Tensor
    teacher: torch.Tensor | None
