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
            raise ValueError(
                f"The labels of a batch must be (B,) or (B, C), but have shape {tuple(labels.shape)}. Without labels, "
                "let the dataset yield (data,)."
            )
        return cls(data, labels, index)

    def labeled_rows(self) -> torch.Tensor | None:
        """Return which rows have a label; None: all, or there are no labels. Multi-hot rows lack all of theirs."""
        if self.labels is None:
            return None
        missing = self.labels == UNLABELED
        missing = missing.all(dim=1) if missing.ndim == 2 else missing
        return (~missing).nonzero().flatten() if missing.any() else None

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
    if isinstance(part, Mapping):
        return {name: select(value, rows) for name, value in part.items()}
    if hasattr(part, "_fields"):
        return type(part)(*(select(value, rows) for value in part))
    if isinstance(part, (tuple, list)):
        parts = all(isinstance(value, torch.Tensor) and value.ndim for value in part)
        return [select(value, rows) for value in part] if parts else [part[row] for row in rows.tolist()]
    return part if part is None else part[rows.tolist()]


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


def on_device(part: Any, device: torch.device) -> Any:
    """Return tensors, and those in tuples, lists and dictionaries, on a device; other objects as they are."""
    if isinstance(part, torch.Tensor):
        return part.to(device, non_blocking=torch.device(device).type == "cuda")
    if isinstance(part, Mapping):
        return {name: on_device(value, device) for name, value in part.items()}
    if hasattr(part, "_fields"):
        return type(part)(*(on_device(value, device) for value in part))
    return type(part)(on_device(value, device) for value in part) if type(part) in (tuple, list) else part
