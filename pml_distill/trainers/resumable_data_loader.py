from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from .random_state import get_random_state, set_random_state


class ResumableDataLoader:
    """A data loader that can say where it is and be set back there, shuffling and augmentation included.

    A pass is a function of the random state at its start and of what a sampler shuffles in place, as PML's
    ``MPerClassSampler`` does with its list of labels: to return to a place, the loader restores both, draws the batches
    up to there once more, and puts the random state of the moment back. Of a sampler it knows the attributes that are
    lists or arrays of numbers or strings, not a random generator of its own.

    Args:
        dataloader: the loader to walk through.
        position: what ``position()`` returned in the run to be continued; None for a fresh start.
    """

    def __init__(self, dataloader: DataLoader, position: dict[str, Any] | None = None):
        self.dataloader, self.resume_from = dataloader, position
        self.start: Any = None
        self.order: Any = None
        self.batches = 0
        batch_sampler = dataloader.batch_sampler
        self.samplers = (batch_sampler, getattr(batch_sampler, "sampler", dataloader.sampler))

    def __len__(self) -> int:
        return len(self.dataloader)

    def __iter__(self) -> Iterator[Any]:
        position, self.resume_from = self.resume_from, None
        if position is not None:
            self.set_order(position["order"])
        self.order = self.get_order()
        if position is None or not position["batches"]:
            self.start, self.batches = get_random_state(), 0
            iterator = iter(self.dataloader)
        else:
            now = get_random_state()
            self.start, self.batches = position["start"], position["batches"]
            set_random_state(self.start)
            iterator = iter(self.dataloader)
            for _ in islice(iterator, self.batches):
                pass
            set_random_state(now)
        for batch in iterator:
            self.batches += 1
            yield batch

    def position(self) -> dict[str, Any]:
        """Return the number of batches drawn since the start of this pass, and the random state and order there."""
        if self.resume_from is not None:
            return self.resume_from
        if self.batches in (0, len(self)):
            return {"start": None, "order": self.get_order(), "batches": 0}
        return {"start": self.start, "order": self.order, "batches": self.batches}

    def get_order(self) -> list[dict[str, list]]:
        """Return copies of the lists and arrays of each sampler, by attribute, as plain types."""
        dataset: object = self.dataloader.dataset  # torch's samplers hold it, and it may be a list
        return [
            {
                name: plain(value.tolist() if isinstance(value, np.ndarray) else value)
                for name, value in vars(sampler).items()
                if isinstance(value, (list, np.ndarray)) and value is not dataset
            }
            for sampler in self.samplers
        ]

    def set_order(self, order: list[dict[str, list]]) -> None:
        """Restore in place what ``get_order`` returned."""
        for sampler, attributes in zip(self.samplers, order, strict=True):
            for name, value in attributes.items():
                if value is not None:
                    getattr(sampler, name)[:] = value


def plain(value: Any) -> Any:
    """Return numbers, strings and nested lists of them without NumPy's types; None if there is anything else."""
    if isinstance(value, list):
        items = [plain(item) for item in value]
        return None if None in items else items
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, (int, float, str)) else None
