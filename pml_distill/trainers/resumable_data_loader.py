from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from .random_state import get_random_state, set_random_state


class ResumableDataLoader:
    """A data loader that can say where it is and be set back there, shuffling and augmentation included.

    A pass is a function of the random state at its start: to return to a place, the loader restores that state,
    draws the batches up to there once more, and puts the random state of the moment back. Lists that a sampler
    shuffles in place, as PML's ``MPerClassSampler`` does, are put back in order before each pass, since they
    would make it depend on all the passes before.

    Args:
        dataloader: the loader to walk through.
        position: what ``position()`` returned in the run to be continued; None for a fresh start.
    """

    def __init__(self, dataloader: DataLoader, position: dict[str, Any] | None = None):
        self.dataloader, self.resume_from = dataloader, position
        self.start: Any = None
        self.batches = 0
        samplers = (dataloader.sampler, getattr(dataloader.batch_sampler, "sampler", None))
        attributes = [value for sampler in samplers if sampler is not None for value in vars(sampler).values()]
        self.sampler_lists = [(value, list(value)) for value in attributes if isinstance(value, list)]

    def __len__(self) -> int:
        return len(self.dataloader)

    def __iter__(self) -> Iterator[Any]:
        position, self.resume_from = self.resume_from, None
        for current, original in self.sampler_lists:
            current[:] = original
        if position is None or not 0 < position["batches"] < len(self):
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
        """Return the random state at the start of this pass and the number of batches drawn since."""
        return {"start": self.start, "batches": self.batches}
