from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from ..datasets.items import UNLABELED, numbered
from ..utils.distributed import process_rank


class MixedSampler(Sampler[int]):
    """Batches of labelled and unlabelled samples in a fixed ratio.

    The labelled part of a batch is like that of PML's ``MPerClassSampler``, with classes drawn anew for each batch.
    The unlabelled part goes through the unlabelled samples in random order, again and again. A pass is drawn from a
    seed of torch's global generator; of several processes with the same seed each draws batches of its own.

    Args:
        labels: (N,) labels of the dataset, -1 for samples without; see ``PartiallyLabeled``.
        m: samples per class; those of smaller classes are repeated.
        batch_size: samples per batch.
        labeled_fraction: share of the labelled samples in a batch, rounded to a multiple of ``m``.
        length_before_new_iter: samples per pass, rounded down to whole batches; None: as many as the dataset has.

    Raises:
        ValueError: ``m`` is below 1; ``batch_size`` is larger than a pass; the labelled part of a batch is empty or
            needs more classes than there are, or more unlabelled samples.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1] + [-1] * 12)
        >>> sampler = MixedSampler(labels, m=2, batch_size=8, labeled_fraction=0.5)
        >>> labels[list(sampler)].view(-1, 8).sort().values.tolist()
        [[-1, -1, -1, -1, 0, 0, 1, 1], [-1, -1, -1, -1, 0, 0, 1, 1]]
    """

    def __init__(
        self,
        labels: Sequence[int | str] | torch.Tensor,
        m: int,
        batch_size: int,
        labeled_fraction: float = 0.5,
        length_before_new_iter: int | None = None,
    ):
        if m < 1:
            raise ValueError(f"m must be at least 1, but is {m}.")
        known = numbered(labels).cpu().numpy()
        if known.ndim != 1:
            raise ValueError(f"labels must be (N,), one class for each sample, but have shape {known.shape}.")
        length = len(known) if length_before_new_iter is None else length_before_new_iter
        if not 0 < batch_size <= length:
            text = f"batch_size must be from 1 to the length of a pass, {length}, but is {batch_size}"
            raise ValueError(f"{text}; see length_before_new_iter.")
        self.classes = tuple(np.flatnonzero(known == c) for c in np.unique(known) if c != UNLABELED)
        self.unlabeled = np.flatnonzero(known == UNLABELED)
        self.m, self.batch_size, self.num_batches = m, batch_size, length // batch_size
        self.classes_per_batch = round(labeled_fraction * batch_size / m)
        self.unlabeled_per_batch = batch_size - m * self.classes_per_batch
        if not 0 < self.classes_per_batch <= len(self.classes) or self.unlabeled_per_batch < 0:
            raise ValueError(
                f"labeled_fraction {labeled_fraction} of batch_size {batch_size} makes {self.classes_per_batch} "
                f"classes of m = {m} samples in a batch, but labels has {len(self.classes)} classes and a batch takes "
                f"at least 1 and at most {batch_size // m}."
            )
        if self.unlabeled_per_batch > len(self.unlabeled):
            text = f"labeled_fraction {labeled_fraction} asks for {self.unlabeled_per_batch} unlabelled samples in a"
            raise ValueError(f"{text} batch, but labels has {len(self.unlabeled)} (-1).")

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng(int(torch.randint(2**62, ())) + process_rank())
        for _, others in zip(range(self.num_batches), self.unlabeled_parts(random)):
            for c in random.choice(len(self.classes), self.classes_per_batch, replace=False):
                own = self.classes[c]
                yield from random.choice(own, self.m, replace=len(own) < self.m).tolist()
            yield from others.tolist()

    def unlabeled_parts(self, random: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the unlabelled part of one batch after the other; no part has a sample twice."""
        size = self.unlabeled_per_batch
        while True:
            order = random.permutation(self.unlabeled)
            yield from (order[i : i + size] for i in range(0, len(order) - size + 1, max(1, size)))
