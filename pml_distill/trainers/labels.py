from collections.abc import Callable
from typing import Any

import torch
from pytorch_metric_learning.utils import common_functions as c_f

from ..datasets.items import UNLABELED, class_numbers, numbered, own_labels
from ..utils.distributed import num_processes


class ClassNumbers:
    """Turns labels that are text into numbers: in the alphabetical order of ``dataset_labels``, or of the dataset's.

    Of a dataset that does not tell its labels classes are numbered as they come, and kept in ``as_they_come``.
    """

    def __init__(self, dataset_labels: Any, dataset: Any):
        self.dataset, self.known = dataset, {} if dataset_labels is None else class_numbers(dataset_labels)
        self.as_they_come: dict[str, int] | None = None

    def __call__(self, labels: Any) -> torch.Tensor:
        """Return the numbers of a batch; ``ValueError`` for a class that is not known."""
        names = [] if isinstance(labels, torch.Tensor) else class_numbers(labels)
        if names and not self.known and self.as_they_come is None:
            try:
                self.known = class_numbers(own_labels(self.dataset))
            except ValueError:
                pass
            # Each of several processes would number them in another order.
            self.as_they_come = {} if not self.known and num_processes() == 1 else None
        if self.as_they_come is not None:
            self.known = self.as_they_come
            for name in names:
                self.known.setdefault(name, len(self.known))
        return numbered(labels, self.known)


def label_mapper(set_min_label_to_zero: bool, dataset_labels: Any) -> Callable[[Any, int], Any]:
    """Return what maps labels as PML does, but for -1, which stays and is no class."""
    labels = None if dataset_labels is None else numbered(dataset_labels).cpu().numpy()
    mapper = c_f.LabelMapper(set_min_label_to_zero, labels)
    for level, ranks in getattr(mapper, "label_map", {}).items():
        known = [label for label in ranks if label != UNLABELED]
        mapper.label_map[level] = c_f.make_label_to_rank_dict(known) | {UNLABELED: UNLABELED}
    return mapper.map
