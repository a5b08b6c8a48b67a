from collections.abc import Iterator, Sequence

import numpy as np
import torch
from pytorch_metric_learning.utils import common_functions as c_f
from torch.utils.data import Sampler

from ..datasets.items import UNLABELED, numbered
from ..utils.distributed import joint_seed, num_processes, process_rank


class DistributedMPerClassSampler(Sampler[int]):
    """PML's ``MPerClassSampler`` for several processes: each draws its own part of one joint batch.

    The joint batch has ``m`` samples of each of its classes, and a class lies whole in the part of one process. Joined
    in the order of the ranks, the parts are what a single process draws with ``batch_size`` times as large. A pass is
    drawn from a seed that rank 0 takes from torch's global generator. Without a process group there is one process.

    Args:
        labels: (N,) labels of the dataset; samples with the label -1, which have none, are not drawn.
        m: samples per class; those of smaller classes are repeated.
        batch_size: samples per process and step, a multiple of ``m``.
        length_before_new_iter: samples per process and pass, rounded down to whole batches.

    Raises:
        ValueError: ``batch_size`` is not a multiple of ``m`` or larger than a pass; on iterating, the classes do not
            suffice for the joint batch.

    Example:
        >>> labels = torch.arange(8).repeat(5)
        >>> sampler = DistributedMPerClassSampler(labels, m=3, batch_size=6, length_before_new_iter=20)
        >>> len(sampler), labels[list(sampler)].view(3, 2, 3).unique(dim=2).shape
        (18, torch.Size([3, 2, 1]))
    """

    def __init__(
        self, labels: Sequence[int | str] | torch.Tensor, m: int, batch_size: int, length_before_new_iter: int = 100000
    ):
        if m < 1 or batch_size % m or not 0 < batch_size <= length_before_new_iter:
            raise ValueError(
                f"batch_size must be a multiple of m, m at least 1 and batch_size at most length_before_new_iter, but "
                f"batch_size is {batch_size}, m is {m} and length_before_new_iter is {length_before_new_iter}."
            )
        self.m, self.batch_size = m, batch_size
        self.num_batches = length_before_new_iter // batch_size
        self.classes = tuple(i for c, i in c_f.get_labels_to_indices(numbered(labels)).items() if c != UNLABELED)

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        rank, processes, seed = process_rank(), num_processes(), joint_seed()
        own = self.batch_size // self.m
        if own * processes > len(self.classes):
            text = f"{processes} processes with {own} classes each need {own * processes} classes, but labels has"
            raise ValueError(f"{text} {len(self.classes)}; lower batch_size or raise m.")
        generator = np.random.default_rng(seed)
        for _ in range(self.num_batches):
            drawn = generator.choice(len(self.classes), own * processes, replace=False)
            samples = [generator.choice(c, self.m, replace=len(c) < self.m) for c in (self.classes[i] for i in drawn)]
            for part in samples[rank * own : (rank + 1) * own]:
                yield from part.tolist()
