import pickle
import random
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.utils import common_functions as c_f
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from ..datasets import SeededViews
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

    A pass is a function of the random state at its start and of what a sampler shuffles in place, as PML's
    ``MPerClassSampler`` does with its list of labels. To return to a place, both are restored, the sampler's batches up
    to there are drawn but not read, and each worker gets the random state that it had. Batches are read again, with a
    warning, where a dataset has a random generator of its own, where a sampler draws from the global ones in the middle
    of a pass, and those that not all workers had. Of a sampler the loader knows the attributes that are lists or arrays
    of integers or strings, such as places and classes, and random generators of torch, not NumPy's. What a sampler
    draws by the weights of a network, as PML's ``TuplesToWeightsSampler`` does, cannot be drawn again.

    Args:
        dataloader: the loader to walk through; it is changed and serves no other purpose then.
        position: what ``position()`` returned in the run to be continued; None for a fresh start.

    Raises:
        ValueError: a sampler holds other items than in the run to be continued.
    """

    def __init__(self, dataloader: DataLoader, position: dict[str, Any] | None = None):
        self.dataloader, self.resume_from = dataloader, position
        batch_sampler = getattr(dataloader.batch_sampler, "batch_sampler", dataloader.batch_sampler)
        self.samplers = (batch_sampler, getattr(batch_sampler, "sampler", dataloader.sampler))
        # A loader allows no other sampler once it is made.
        self.order = vars(dataloader)["batch_sampler"] = SkippingSampler(batch_sampler)
        if dataloader.num_workers:
            dataloader.collate_fn = partial(with_random_state, dataloader.collate_fn)
        self.start: Any = None
        self.generators_at_start: dict[str, torch.Tensor] = {}
        self.held: dict[str, tuple] = {}
        self.batches = 0
        # Of the workers: after their latest batch, and after the latest batch up to which all had equally many.
        self.latest: list[Any] = [None] * dataloader.num_workers
        self.together: list[Any] = list(self.latest)
        self.workers_stay = False
        if position is not None:
            self.restore(position)

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
        if not self.persistent_workers and position is None:
            self.latest = [None] * self.num_workers
        self.together = list(self.latest)
        if position is None:
            self.workers_stay = self.persistent_workers and None not in self.latest
        now = get_random_state()
        self.start, self.batches = now, 0
        if position is None or not position["batches"]:
            batches = self.received(self.begin(0))
        else:
            self.start = position["start"]
            batches = self.resumed(position)
            set_random_state(now)
        yield from batches

    def resumed(self, position: dict[str, Any]) -> Iterator[Any]:
        """Begin a pass and go to a place in it."""
        done = position["batches"]
        reason = "not all workers had them"
        again = done % (self.num_workers or 1)
        if holds_generator(self.dataset, {}):
            again, reason = done, "the dataset has a random generator of its own"
            self.latest = self.together = [None] * self.num_workers
        set_random_state(self.start)
        iterator = self.begin(done - again)
        if self.order.advance() and not self.num_workers:
            again, reason = done, "the sampler draws from the global random generators during a pass"
            self.restore(position)
            set_random_state(self.start)
            iterator = self.begin(0)
        self.batches = done - again
        if again:
            c_f.LOGGER.warning(f"{again} of {done} batches before the checkpoint are read again: {reason}.")
        batches = self.received(iterator)
        for _ in islice(batches, again):
            pass
        return batches

    def begin(self, skip: int) -> Iterator[Any]:
        """Begin a pass behind some batches; torch's ``DistributedSampler`` takes another order only if it is told."""
        for sampler in self.samplers:
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(joint_seed())
        loader = self.dataloader
        self.order.skip, init, generator = skip, loader.worker_init_fn, loader.generator
        loader.worker_init_fn = partial(start_worker, init, self.together)
        if self.workers_stay:
            loader.generator = torch.Generator()  # Only new workers take a seed from the global one.
        try:
            return iter(loader)
        finally:
            loader.worker_init_fn, loader.generator = init, generator

    def received(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches, and keep the random state of the worker that has made each."""
        workers = self.num_workers
        for batch in iterator:
            if workers:
                batch, self.latest[self.batches % workers] = batch
            self.batches += 1
            if workers and self.batches % workers == 0:
                self.together = list(self.latest)
            yield batch

    def position(self) -> dict[str, Any]:
        """Return the number of batches drawn since the start of this pass, and the random state and order there."""
        if self.resume_from is not None:
            return self.resume_from
        lists, ended = self.lists(), self.batches in (0, len(self))
        # What a sampler makes anew in each pass depends on the random state alone.
        kept = {key: order for key, (value, order) in self.held.items() if lists.get(key) is value}
        order = {key: plain(lists[key]) if ended else order for key, order in kept.items() if order is not None}
        lasting = self.latest if self.persistent_workers else []
        return {
            "start": None if ended else self.start,
            "generators": self.generator_states() if ended else self.generators_at_start,
            "order": order,
            "batches": 0 if ended else self.batches,
            "workers": [state and pickle.loads(state) for state in (lasting if ended else self.together)],
            "workers_stay": self.persistent_workers if ended else self.workers_stay,
        }

    def restore(self, position: dict[str, Any]) -> None:
        """Bring samplers and workers to where they were at the start of a pass."""
        self.restore_lists(position["order"])
        for key, state in position["generators"].items():
            self.generators()[key].set_state(state.cpu())
        self.workers_stay = position["workers_stay"]
        workers: list[Any] = [state and pickle.dumps(state) for state in position["workers"]]
        self.latest = workers if len(workers) == self.num_workers else [None] * self.num_workers

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

    def restore_lists(self, order: dict[str, list]) -> None:
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


class SkippingSampler:
    """A batch sampler that leaves out batches at the start of a pass, which are drawn with the first that is not."""

    def __init__(self, batch_sampler: Any):
        self.batch_sampler, self.skip = batch_sampler, 0

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        self.batches = iter(self.batch_sampler)
        return self.remaining()

    def remaining(self) -> Iterator[Any]:
        """Yield the batches that are not left out."""
        self.advance()
        yield from self.batches

    def advance(self) -> bool:
        """Draw what is left out; return whether that took random numbers after the first batch."""
        first, self.skip = islice(self.batches, min(self.skip, 1)), self.skip - 1
        after_first = [comparable_state() for _ in first]
        deque(islice(self.batches, max(0, self.skip)), maxlen=0)
        self.skip = 0
        return bool(after_first) and after_first[0] != comparable_state()


def comparable_state() -> dict[str, Any]:
    """Return the random state without tensors, which cannot be compared as a whole."""
    state = get_random_state(cuda=False)
    return state | {"torch": state["torch"].tolist()}


def with_random_state(collate_fn: Any, samples: Any) -> tuple:
    """Return a batch and the random state that its worker has after it, as bytes, which nobody pins or shares."""
    return collate_fn(samples), pickle.dumps(get_random_state(cuda=False))


def start_worker(init: Any, states: list[Any], worker: int) -> None:
    """Set the random state of a worker, if there is one."""
    if init is not None:
        init(worker)
    if states[worker] is not None:
        set_random_state(pickle.loads(states[worker]))


def holds_generator(part: Any, seen: dict[int, Any], depth: int = 8) -> bool:
    """Whether a dataset, or a transform in it, has a random generator of its own that nobody seeds for each item."""
    if isinstance(part, GENERATORS):
        return True
    known = id(part) in seen or isinstance(part, (SeededViews, torch.Tensor, type, FunctionType, ModuleType))
    if known or depth == 0:
        return False
    seen[id(part)] = part
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else None
    inner = getattr(part, "__dict__", {}).values() if inner is None else inner
    return any(holds_generator(value, seen, depth - 1) for value in islice(inner, 100))


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
