"""What an item of a dataset is: data, label and row, two views of the data, the label of what has none."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

#: The label of a sample without one. The trainers leave such rows out of the losses that need labels.
UNLABELED = -1


class Views(NamedTuple):
    """Two views of a sample or of a batch; the trainers show each network its own.

    Args:
        student: what the student sees.
        teacher: what the teacher sees.
    """

    student: Any
    teacher: Any

    @classmethod
    def of(cls, data: Any) -> "Views":
        """Return the data if they are views; what is not is seen by both."""
        return data if isinstance(data, cls) else cls(data, data)


def get_items(dataset: Any, indices: Sequence[int]) -> list:
    """Return several items of a dataset, in one go where it offers that."""
    if len(indices) and hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(indices)
    return [dataset[i] for i in indices]


def labels_of(dataset: Any, labels: Sequence[int] | torch.Tensor | None) -> torch.Tensor:
    """Return the (N,) labels, those given or the dataset's own; ``ValueError`` for none or another shape."""
    labels = own_labels(dataset) if labels is None else labels
    known = torch.as_tensor(labels, dtype=torch.int64)
    if known.shape != (len(dataset),):
        raise ValueError(f"labels must be ({len(dataset)},), one per sample, but have shape {tuple(known.shape)}.")
    return known


def own_labels(dataset: Any) -> Any:
    """Return a dataset's ``labels``, or ``targets`` as torchvision has it; ``ValueError`` if it has neither."""
    for name in ("labels", "targets"):
        if hasattr(dataset, name):
            return getattr(dataset, name)
    raise ValueError(f"labels must be given: the {type(dataset).__name__} has neither labels nor targets.")
