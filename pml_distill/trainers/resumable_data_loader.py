import copy
import random
from collections import deque
from collections.abc import Iterator
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.utils import common_functions as c_f
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from ..datasets import SeededViews
from ..datasets.items import get_items
from ..utils.distributed import joint_seed, num_processes
from .checkpoint import get_random_state, set_random_state

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


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

    A pass is a function of the random state at its start and of what a sampler holds: lists and arrays of integers or
    strings, as ``MPerClassSampler`` shuffles in place, and random generators of torch. Workers read each batch under a
    seed of its own. To return to a place, these are restored, and the sampler's batches up to there are drawn but not
    read. They are read again, with a warning, where a dataset has a random generator of its own. What a sampler draws
    by the weights of a network, as PML's ``TuplesToWeightsSampler`` does, cannot be drawn again.

    Args:
        dataloader: the loader to walk through.
        position: what ``position()`` returned in the run to be continued; None for a fresh start.

    Raises:
        ValueError: a sampler holds other items than in the run to be continued.
    """

    def __init__(self, dataloader: DataLoader, position: dict[str, Any] | None = None):
        self.resume_from, self.dataset, self.generator = position, dataloader.dataset, dataloader.generator
        batch_sampler = dataloader.batch_sampler
        self.samplers = (batch_sampler, getattr(batch_sampler, "sampler", dataloader.sampler))
        self.order = SkippingSampler(batch_sampler)
        self.dataloader = copy.copy(dataloader)
        # By vars, since a loader that is made allows no other sampler.
        vars(self.dataloader)["batch_sampler"] = self.order
        if dataloader.num_workers:
            vars(self.dataloader).update(dataset=SeededReads(self.dataset), generator=torch.Generator())
        self.start: Any = None
        self.generators_at_start: dict[str, torch.Tensor] = {}
        self.held: dict[str, tuple] = {}
        self.batches = 0
        if position is not None:
            self.restore_lists(position["order"])
            for key, state in position["generators"].items():
                self.attributes(torch.Generator)[key].set_state(state.cpu())

    def __getattr__(self, name: str) -> Any:
        # As the loader itself, for hooks that ask for its sampler; a copy asks before there is one.
        if name == "dataloader":
            raise AttributeError(name)
        return getattr(self.dataloader, name)

    def __len__(self) -> int:
        return len(self.dataloader)

    def __iter__(self) -> Iterator[Any]:
        position, self.resume_from = self.resume_from, None
        self.held = {key: (value, plain(value)) for key, value in self.lists().items()}
        self.generators_at_start = self.generator_states()
        now, again = get_random_state(), 0
        self.start, self.batches, self.order.skip = now, 0, 0
        if position is not None and position["batches"]:
            self.start, self.batches = position["start"], position["batches"]
            set_random_state(self.start)
            if holds_generator(self.dataset, {}):
                again, reason = self.batches, "the dataset has a random generator of its own"
                c_f.LOGGER.warning(f"{again} batches before the checkpoint are read again: {reason}.")
            else:
                self.order.skip, self.order.state_after = self.batches, now
        for sampler in self.samplers:
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(joint_seed())  # or it takes the same order in each pass
        if self.num_workers:
            # What a loader draws for new workers, here in each pass, whether they are new or stay.
            self.order.seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.generator))
            self.dataloader.generator.manual_seed(self.order.seed)
        iterator = iter(self.dataloader)
        if again:
            deque(islice(iterator, again), maxlen=0)
            set_random_state(now)
        for batch in iterator:
            self.batches += 1
            yield batch

    def position(self) -> dict[str, Any]:
        """Return the number of batches drawn since the start of this pass, and the random state and order there."""
        if self.resume_from is not None:
            return self.resume_from
        lists, ended = self.lists(), self.batches in (0, len(self))
        # What a sampler makes anew in each pass depends on the random state alone.
        kept = {key: order for key, (value, order) in self.held.items() if lists.get(key) is value}
        return {
            "start": None if ended else self.start,
            "generators": self.generator_states() if ended else self.generators_at_start,
            "order": {key: plain(lists[key]) if ended else order for key, order in kept.items() if order is not None},
            "batches": 0 if ended else self.batches,
        }

    def attributes(self, kind: Any) -> dict[str, Any]:
        """Return the attributes of the samplers that are of a kind, by class and name."""
        named = [(type(sampler).__name__, getattr(sampler, "__dict__", {})) for sampler in self.samplers]
        return {f"{cls}.{key}": part for cls, parts in named for key, part in parts.items() if isinstance(part, kind)}

    def generator_states(self) -> dict[str, torch.Tensor]:
        """Return the states of the samplers' random generators."""
        return {key: generator.get_state() for key, generator in self.attributes(torch.Generator).items()}

    def lists(self) -> dict[str, Any]:
        """Return the lists and arrays of the samplers, but for the dataset, which may be a list too."""
        found = {key: part for key, part in self.attributes((list, np.ndarray)).items() if part is not self.dataset}
        return {key: part for key, part in found.items() if isinstance(part, list) or part.ndim}

    def restore_lists(self, order: dict[str, list]) -> None:
        """Bring the lists of the samplers into a recorded order."""
        lists = self.lists()
        for key, value in order.items():
            current: Any = lists.get(key)
            if current is not None and len(current) == 0:
                continue  # the sampler fills it itself
            present = plain(current)
            if present is None or sorted(map(repr, value)) != sorted(map(repr, present)):
                raise ValueError(f"sampler must be as it was at the checkpoint, but {key} holds other items.")
            if present != value:
                current[:] = value


class SkippingSampler:
    """A batch sampler that draws batches at the start of a pass in vain; with ``seed`` it yields (seed, batch)."""

    def __init__(self, batch_sampler: Any):
        self.batch_sampler, self.skip = batch_sampler, 0
        self.seed: int | None = None
        self.state_after: Any = None

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        seeds = random.Random(self.seed)
        for number, batch in enumerate(self.batch_sampler, start=1):
            seed = seeds.getrandbits(32)
            if number > self.skip:
                yield batch if self.seed is None else (seed, batch)
            elif number == self.skip:
                set_random_state(self.state_after)


class SeededReads:
    """A dataset whose reads of a batch, and the transforms in it, draw random numbers from the seed of the batch."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        # For a worker_init_fn; a copy asks before there is a dataset.
        if name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitems__(self, batch: tuple[int, Any]) -> list:
        seed, indices = batch
        random.seed(seed)
        np.random.seed(seed)
        torch.random.default_generator.manual_seed(seed)
        return get_items(self.dataset, indices)


def holds_generator(part: Any, seen: dict[int, Any], depth: int = 8) -> bool:
    """Whether a dataset, or a transform in it, has a random generator of its own that nobody seeds for each item."""
    if isinstance(part, GENERATORS):
        return True
    if id(part) in seen or depth == 0 or isinstance(part, (SeededViews, torch.Tensor, type, ModuleType)):
        return False
    seen[id(part)] = part
    inner = part if isinstance(part, (list, tuple)) else getattr(part, "__dict__", {}).values()
    return any(holds_generator(value, seen, depth - 1) for value in islice(inner, 100))


def plain(value: Any) -> Any:
    """Return integers, strings and nested lists of them without NumPy's types; None if there is anything else."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, list):
        items = [plain(item) for item in value]
        return None if None in items else items
    return value if isinstance(value, (int, str)) else None
