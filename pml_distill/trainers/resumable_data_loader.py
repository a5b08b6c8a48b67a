from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from ..utils.distributed import joint_seed, num_processes
from .checkpoint import get_random_state, set_random_state


def train_loader(trainer: Any) -> "ResumableDataLoader":
    """Return the loader of a trainer; without a sampler, each of several processes draws its own part of the data."""
    sampler = trainer.sampler
    if sampler is None and num_processes() > 1:
        sampler = DistributedSampler(trainer.dataset)
    order: dict[str, Any] = {"batch_sampler": sampler}
    if not isinstance(sampler, BatchSampler):
        size = int(trainer.batch_size)
        order = {"batch_size": size, "sampler": sampler, "shuffle": sampler is None, "drop_last": True}
    settings = {"num_workers": trainer.dataloader_num_workers, "collate_fn": trainer.collate_fn}
    loader = DataLoader(trainer.dataset, **order, **settings, **trainer.loader_settings)
    if len(loader) == 0:
        name, drawn = ("dataset", trainer.dataset) if trainer.sampler is None else ("sampler", trainer.sampler)
        raise ValueError(f"{name} has {len(drawn)} samples, fewer than batch_size, {trainer.batch_size}.")
    return ResumableDataLoader(loader, trainer.data_position)


class ResumableDataLoader:
    """A data loader that can say where it is and be set back there, shuffling and augmentation included.

    A pass is a function of the random state at its start and of what a sampler shuffles in place, as PML's
    ``MPerClassSampler`` does with its list of labels: to return to a place, the loader restores both, draws the batches
    up to there once more, and puts the random state of the moment back. Of a sampler it knows the attributes that are
    lists or arrays of integers or strings, such as places and classes, and random generators of torch, not NumPy's.
    What a sampler draws by the weights of a network, as PML's ``TuplesToWeightsSampler`` does, cannot be drawn again.

    Args:
        dataloader: the loader to walk through.
        position: what ``position()`` returned in the run to be continued; None for a fresh start.

    Raises:
        ValueError: a sampler holds other items than in the run to be continued.
    """

    def __init__(self, dataloader: DataLoader, position: dict[str, Any] | None = None):
        self.dataloader, self.resume_from = dataloader, position
        batch_sampler = dataloader.batch_sampler
        self.samplers = (batch_sampler, getattr(batch_sampler, "sampler", dataloader.sampler))
        if position is not None:
            self.restore(position["order"])
            for key, state in position["generators"].items():
                self.generators()[key].set_state(state.cpu())
        self.start: Any = None
        self.generators_at_start: dict[str, torch.Tensor] = {}
        self.held: dict[str, tuple] = {}
        self.batches = 0

    def __getattr__(self, name: str) -> Any:
        # As the loader itself, for hooks that ask for its dataset or sampler; a copy asks before there is one.
        if name == "dataloader":
            raise AttributeError(name)
        return getattr(self.dataloader, name)

    def __len__(self) -> int:
        return len(self.dataloader)

    def __iter__(self) -> Iterator[Any]:
        position, self.resume_from = self.resume_from, None
        self.held = {key: (value, plain(value)) for key, value in self.lists().items()}
        self.generators_at_start = self.generator_states()
        if position is None or not position["batches"]:
            self.start, self.batches = get_random_state(), 0
            iterator = self.begin()
        else:
            now = get_random_state()
            self.start, self.batches = position["start"], position["batches"]
            set_random_state(self.start)
            iterator = self.begin()
            for _ in islice(iterator, self.batches):
                pass
            set_random_state(now)
        for batch in iterator:
            self.batches += 1
            yield batch

    def begin(self) -> Iterator[Any]:
        """Begin a pass; torch's ``DistributedSampler`` takes another order only if it is told."""
        for sampler in self.samplers:
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(joint_seed())
        return iter(self.dataloader)

    def position(self) -> dict[str, Any]:
        """Return the number of batches drawn since the start of this pass, and the random state and order there."""
        if self.resume_from is not None:
            return self.resume_from
        lists, ended = self.lists(), self.batches in (0, len(self))
        # What a sampler makes anew in each pass depends on the random state alone.
        kept = {key: order for key, (value, order) in self.held.items() if lists.get(key) is value}
        order = {key: plain(lists[key]) if ended else order for key, order in kept.items() if order is not None}
        return {
            "start": None if ended else self.start,
            "generators": self.generator_states() if ended else self.generators_at_start,
            "order": order,
            "batches": 0 if ended else self.batches,
        }

    def attributes(self) -> Iterator[tuple[str, Any]]:
        """Yield the attributes of the samplers by class and name."""
        for sampler in self.samplers:
            for name, value in getattr(sampler, "__dict__", {}).items():
                yield f"{type(sampler).__name__}.{name}", value

    def generators(self) -> dict[str, torch.Generator]:
        """Return the random generators of the samplers by class and attribute."""
        return {key: value for key, value in self.attributes() if isinstance(value, torch.Generator)}

    def generator_states(self) -> dict[str, torch.Tensor]:
        """Return the states of the random generators."""
        return {key: generator.get_state() for key, generator in self.generators().items()}

    def lists(self) -> dict[str, Any]:
        """Return the lists and arrays of the samplers by class and attribute."""
        dataset: object = self.dataloader.dataset  # torch's samplers hold it, and it may be a list
        return {
            key: value
            for key, value in self.attributes()
            if (isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim)) and value is not dataset
        }

    def restore(self, order: dict[str, list]) -> None:
        """Bring the lists of the samplers into a recorded order."""
        lists = self.lists()
        for key, value in order.items():
            current: Any = lists.get(key)
            if current is not None and len(current) == 0:
                continue  # the sampler fills it itself
            wanted, present = ([repr(item) for item in items or []] for items in (value, plain(current)))
            if current is None or sorted(wanted) != sorted(present):
                raise ValueError(
                    f"sampler must be as it was when the checkpoint was written, but {key} holds other items."
                )
            items = current.copy()
            for place, source in zip(argsort(wanted), argsort(present)):
                if place != source:
                    current[place] = items[source]


def argsort(items: list[str]) -> list[int]:
    """Return the places of the items in ascending order."""
    return sorted(range(len(items)), key=items.__getitem__)


def plain(value: Any) -> Any:
    """Return integers, strings and nested lists of them without NumPy's types; None if there is anything else."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, list):
        items = [plain(item) for item in value]
        return None if None in items else items
    return value if isinstance(value, (int, str)) else None
