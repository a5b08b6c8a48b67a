from numbers import Integral

import torch
from torch import nn
from torch.nn import functional as F

METRICS = ("cosine", "euclidean")


class GradientReset(nn.Module):
    r"""Which channels of one block may go, judged by what retrieval needs (retrieval-guided gradient resetting).

    A channel c is marked when for every sample i of a batch and each of its ``neighbors`` nearest teacher features g
    of a queue, which holds the batch too, :math:`|g_c \cdot s_{i, c}|` is among the floor(``ratio`` C) smallest of the
    C channels, s being the student's features. Small batches mark far more channels than large ones.

    Source: Xie et al., "Towards a Smaller Student: Capacity Dynamic Distillation for Efficient Image Retrieval",
    CVPR 2023, and its code, SCY-X/Capacity_Dynamic_Distillation. Ties are broken by ``torch.topk``.

    Args:
        num_channels: C.
        queue_size: how many teacher features are kept.
        neighbors: how many of them count for each sample.
        ratio: share of a row's channels that may be marked, from 0 to 1.
        metric: ``"cosine"`` (features at unit length) or ``"euclidean"`` (as they come); for the neighbours.
        accumulate: whether marks stay, as the authors have it. Otherwise each update stands alone.
        refresh_interval: after so many updates all marks are taken back, with ``accumulate``; None for never.

    Attributes:
        mask: (C,) bool, False where a channel is marked; in the state dict, with the queue and its counters.

    Example:
        >>> reset = GradientReset(num_channels=4, queue_size=8, neighbors=1)
        >>> reset.update(torch.tensor([[3.0, 2.0, 0.1, 0.2]]), torch.ones(1, 4)).tolist()
        [True, True, False, False]
    """

    mask: torch.Tensor
    queue: torch.Tensor
    position: torch.Tensor
    count: torch.Tensor
    updates: torch.Tensor

    def __init__(
        self,
        num_channels: int,
        queue_size: int = 24000,
        neighbors: int = 2,
        ratio: float = 0.5,
        metric: str = "cosine",
        accumulate: bool = True,
        refresh_interval: int | None = None,
    ):
        super().__init__()
        for name, value in (("num_channels", num_channels), ("queue_size", queue_size), ("neighbors", neighbors)):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, but is {value!r}.")
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio must be from 0 to 1, but is {ratio}.")
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, but is {metric!r}.")
        if refresh_interval is not None and (refresh_interval < 1 or not accumulate):
            given = f"{refresh_interval} with accumulate={accumulate}"
            raise ValueError(f"refresh_interval must be None, or at least 1 with accumulate=True, but is {given}.")
        if neighbors > queue_size:
            raise ValueError(f"neighbors must be at most queue_size, {queue_size}, but is {neighbors}.")
        self.neighbors, self.metric = neighbors, metric
        self.lowest = int(num_channels * ratio)
        self.accumulate, self.refresh_interval = accumulate, refresh_interval
        self.register_buffer("mask", torch.ones(num_channels, dtype=torch.bool))
        self.register_buffer("queue", torch.zeros(queue_size, num_channels))
        for name in ("position", "count", "updates"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Let (B, C) pooled features of the same samples enter, mark channels, and return the mask.

        Rows with values that are not finite have no say; a batch without any other row marks nothing.
        """
        size, channels = self.queue.shape
        if student.shape != teacher.shape or student.ndim != 2 or student.shape[1] != channels:
            shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            raise ValueError(f"student and teacher features must be (batch, {channels}), but have {shapes}.")
        working = torch.promote_types(self.queue.dtype, torch.float32)
        student, teacher = student.to(working), teacher.to(working)
        if self.metric == "cosine":
            student, teacher = F.normalize(student), F.normalize(teacher)
        self.enqueue(teacher)
        nearest, found = self.nearest(teacher)
        products = (self.queue[nearest] * student[:, None]).abs_()
        lowest = products.topk(self.lowest, dim=2, largest=False, sorted=False).indices
        # A neighbour that is not there yet, in a queue shorter than ``neighbors``, has no say.
        found = found & student.isfinite().all(dim=1, keepdim=True)
        votes = found[:, :, None].expand_as(lowest)
        counts = torch.zeros(channels, dtype=torch.long, device=votes.device)
        counts.index_add_(0, lowest.flatten(), votes.flatten().long())
        total = found.sum()
        kept = (counts < total) | (total == 0)
        if not self.accumulate:
            self.mask.copy_(kept)
            return kept
        if self.refresh_interval is not None:
            self.mask |= self.updates % self.refresh_interval == 0
        self.mask &= kept
        self.updates += 1
        return self.mask.clone()

    def enqueue(self, teacher: torch.Tensor) -> None:
        """Put the last rows of a batch over the oldest of the queue."""
        size = len(self.queue)
        teacher = teacher[-size:]
        places = (self.position + torch.arange(len(teacher), device=self.queue.device)) % size
        self.queue.index_copy_(0, places, teacher.to(self.queue.dtype))
        self.position.copy_((self.position + len(teacher)) % size)
        self.count.copy_((self.count + len(teacher)).clamp(max=size))

    def nearest(self, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the places (B, neighbors) of the nearest rows, and which of them are filled and finite."""
        # Squares of raw features leave the range of float16.
        queue = self.queue if self.metric == "cosine" else self.queue.to(teacher.dtype)
        with torch.autocast(queue.device.type, enabled=False):
            closeness = teacher.to(queue.dtype) @ queue.t()
        if self.metric == "euclidean":
            closeness = closeness.mul_(2).sub_(queue.square().sum(dim=1))
        empty = torch.arange(len(self.queue), device=self.queue.device) >= self.count
        closeness = closeness.masked_fill_(empty, -torch.inf)
        closeness = closeness.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
        values, places = closeness.topk(self.neighbors, dim=1)
        return places, values > -torch.inf
