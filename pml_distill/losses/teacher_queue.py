import torch

from .base_distillation_loss import unit_rows

# Finite, so that 0 * (ABSENT - ABSENT) is 0; exp() of it is 0 in every dtype.
ABSENT = -1e30


class TeacherQueue(torch.nn.Module):
    """The last embeddings seen, at unit length, first in first out: candidates beyond the batch.

    Rows, write position and count are buffers, so that a checkpoint holds them and a resumed run goes on where it
    stopped. Under ``DistributedLossWrapper`` a loss sees the joined batch, and so does its queue: every process
    holds the same rows, in an order of its own. Let ``size`` be a multiple of the joined batch then, so that all
    processes also forget the same rows.

    Args:
        size: how many embeddings it holds.
        width: width of the embeddings.

    Raises:
        ValueError: ``size`` or ``width`` is below 1; an embedding has another width.

    Example:
        >>> import torch
        >>> queue = TeacherQueue(size=3, width=2)
        >>> queue.store(*queue.updated(torch.eye(2)))
        >>> queue.count.item(), queue.similarities(torch.eye(2), queue.rows, queue.count)[0, :2].tolist()
        (2, [1.0, 0.0])
    """

    def __init__(self, size: int, width: int):
        super().__init__()
        for name, value in (("size", size), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} of the queue must be at least 1, but is {value}.")
        self.register_buffer("rows", torch.zeros(size, width))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def updated(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rows, count and position as they are once the embeddings have entered; nothing is stored."""
        size, width = self.rows.shape
        if embeddings.shape[1] != width:
            raise ValueError(
                f"the queue holds embeddings of width {width}, but was given shape {tuple(embeddings.shape)}."
            )
        entered = unit_rows(embeddings.detach())[-size:].to(self.rows.dtype)
        places = (self.position + torch.arange(len(entered), device=self.rows.device)) % size
        rows = self.rows.index_copy(0, places, entered)
        return rows, (self.count + len(entered)).clamp(max=size), (self.position + len(entered)) % size

    def store(self, rows: torch.Tensor, count: torch.Tensor, position: torch.Tensor) -> None:
        """Take over what ``updated`` has returned."""
        with torch.no_grad():
            self.rows.copy_(rows)
            self.count.copy_(count)
            self.position.copy_(position)

    @staticmethod
    def similarities(unit: torch.Tensor, rows: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Return the (B, size) inner products with the rows; places not yet filled hold ``ABSENT``."""
        filled = torch.arange(len(rows), device=rows.device) < count
        return (unit @ rows.to(unit.dtype).t()).masked_fill(~filled, ABSENT)
