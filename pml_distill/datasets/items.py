"""What an item of a dataset is: data, label and row. Batches are read by the same rule.

- A tuple or list is (data,), (data, label) or (data, label, row).
- In a dictionary or named tuple the label has one of ``LABEL_NAMES`` and the row one of ``ROW_NAMES``. The data are the
  value that remains, or a dictionary of all that remain.
- Anything else is data alone: a tensor, ``Views``, an image.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

#: The label of a sample without one. The trainers leave such rows out of the losses that need labels.
UNLABELED = -1
LABEL_NAMES = ("label", "labels", "label_ids", "target", "targets", "y")
ROW_NAMES = ("index", "idx", "id", "row")
LIKE_A_LABEL = re.compile("label|target|class|categor", re.IGNORECASE)


class Views(NamedTuple):
    """Two views of a sample or of a batch: what the student sees, and what the teacher sees."""

    student: Any
    teacher: Any

    @classmethod
    def of(cls, data: Any) -> "Views":
        """Return the data if they are views; what is not is seen by both."""
        return data if isinstance(data, cls) else cls(data, data)


def read_item(item: Any) -> tuple[Any, Any, Any]:
    """Return (data, label, row) of an item or batch, None for what it lacks; ``ValueError`` if they cannot be told."""
    if isinstance(item, Views) or not isinstance(item, (Mapping, tuple, list)):
        return item, None, None
    if isinstance(item, Mapping):
        return read_fields(item, dict(item))
    if hasattr(item, "_asdict"):
        return read_fields(item, item._asdict())
    if not item:
        raise ValueError(f"An item of a dataset is an empty {type(item).__name__}; expected (data, label).")
    data, label, row = (*item, None, None)[:3]
    return data, label, row


def read_fields(item: Any, fields: dict[Any, Any]) -> tuple[Any, Any, Any]:
    """Return (data, label, row) by the names of the fields."""
    labels, rows = ([name for name in fields if name in names] for names in (LABEL_NAMES, ROW_NAMES))
    data = {name: value for name, value in fields.items() if name not in labels + rows}
    unclear = [name for name in data if not labels and LIKE_A_LABEL.search(str(name))]
    if len(labels) > 1 or unclear or not data or (isinstance(item, tuple) and not labels and len(data) > 1):
        raise ValueError(
            f"An item of a dataset is a {type(item).__name__} with the fields {list(fields)}, but must be data and one "
            f"label. Name the label one of {', '.join(LABEL_NAMES)}, or yield (data, label) or, without one, (data,)."
        )
    label, row = (fields[names[0]] if names else None for names in (labels, rows))
    if len(data) == 1:
        return next(iter(data.values())), label, row
    return item if len(data) == len(fields) else data, label, row


def data_and_label(batch: Any) -> tuple[Any, Any]:
    """Return (data, label) of a batch, the ``data_and_label_getter`` of testers."""
    return read_item(batch)[:2]


def plain_item(data: Any, label: Any, row: Any) -> Any:
    """Return what ``read_item`` reads as these: data alone, (data, label) or (data, label, row)."""
    if row is not None:
        return data, UNLABELED if label is None else label, row
    return data if label is None else (data, label)


def get_items(dataset: Any, indices: Sequence[int]) -> list:
    """Return several items of a dataset, in one go where it offers that."""
    if len(indices) and hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(indices)
    return [dataset[i] for i in indices]


def labels_of(dataset: Any, labels: Any = None) -> torch.Tensor:
    """Return the (N,) labels, those given or the dataset's own; ``ValueError`` for none or another shape."""
    known = numbered(own_labels(dataset) if labels is None else labels)
    if known.shape != (len(dataset),):
        raise ValueError(f"labels must be ({len(dataset)},), one per sample, but have shape {tuple(known.shape)}.")
    return known.to(torch.int64)


def own_labels(dataset: Any) -> Any:
    """Return a dataset's ``labels`` or ``targets``, also of a ``Subset`` or ``ConcatDataset``, or ``ValueError``."""
    for name in ("labels", "targets"):
        if hasattr(dataset, name):
            return getattr(dataset, name)
    columns = getattr(dataset, "column_names", None)  # of Hugging Face
    for name in LABEL_NAMES:
        if isinstance(columns, list) and name in columns:
            return list(dataset.with_format(None)[name])
    if isinstance(dataset, Subset):
        labels = own_labels(dataset.dataset)
        return [labels[i] for i in dataset.indices] if isinstance(labels, list) else labels[list(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        return [label for part in dataset.datasets for label in np.asarray(own_labels(part)).tolist()]
    raise ValueError(f"labels must be given: the {type(dataset).__name__} has neither labels nor targets.")


def class_numbers(labels: Any) -> dict[str, int]:
    """Return a number for each class that has a name, in alphabetical order; none for those that are numbers."""
    array = np.asarray(labels)
    names = {label for label in array.flatten().tolist() if isinstance(label, str)} if array.dtype.kind in "UO" else ()
    return {name: number for number, name in enumerate(sorted(set(names) - {str(UNLABELED)}))}


def numbered(labels: Any, numbers: dict[str, int] | None = None) -> torch.Tensor:
    """Return labels as a tensor: names by their ``class_numbers``, None as -1; ``ValueError`` for an unknown name."""
    if isinstance(labels, torch.Tensor):
        return labels
    array = np.asarray(labels)
    if array.dtype.kind not in "UO":
        return torch.as_tensor(array)
    numbers = class_numbers(array) if numbers is None else numbers
    known: dict[Any, Any] = numbers | {None: UNLABELED, str(UNLABELED): UNLABELED}
    flat = array.flatten().tolist()
    unknown = sorted({label for label in flat if isinstance(label, str) and label not in known})
    if unknown:
        text = f"labels has the classes {unknown[:5]}, which are not among the {len(numbers)} of dataset_labels"
        raise ValueError(f"{text}. Give dataset_labels all of them.")
    return torch.tensor([known.get(label, label) for label in flat]).reshape(array.shape)
