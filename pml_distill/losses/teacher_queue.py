import torch


class TeacherQueue(torch.nn.Module):
    """The last ``size`` embeddings seen, of ``width``, first in first out: candidates in addition to the batch.

    It is saved in checkpoints and follows the embeddings to their device. A row that is not finite enters as zeros, so
    that it spoils only the loss of its own step. Under ``DistributedLossWrapper`` let ``size`` be a multiple of the
    joined batch: every process holds its rows in another order, and all must forget the same ones.
    """

    rows: torch.Tensor
    position: torch.Tensor
    count: torch.Tensor

    def __init__(self, size: int, width: int):
        super().__init__()
        for name, value in (("size", size), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} of the queue must be at least 1, but is {value}.")
        self.register_buffer("rows", torch.zeros(size, width))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def candidates(self, embeddings: torch.Tensor, include_batch: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (size, width) rows and which are filled, with or without the batch, which enters in training."""
        if self.rows.device != embeddings.device:
            self.to(embeddings.device)
        size, width = self.rows.shape
        if embeddings.shape[1] != width:
            given = tuple(embeddings.shape)
            raise ValueError(f"the queue holds embeddings of width {width}, but was given shape {given}.")
        entering = embeddings.detach()[-size:].to(self.rows.dtype)
        entering = entering.masked_fill(~entering.isfinite().all(dim=1, keepdim=True), 0)
        places = (self.position + torch.arange(len(entering), device=self.rows.device)) % size
        count = (self.count + len(entering)).clamp(max=size)
        filled = torch.arange(size, device=self.rows.device) < (count if include_batch else self.count)
        # A copy, because a backward needs the rows that entering ones overwrite.
        rows = self.rows.clone()
        if include_batch:
            rows.index_copy_(0, places, entering)
        if self.training:
            self.rows.index_copy_(0, places, entering)
            self.count.copy_(count)
            self.position.copy_((self.position + len(entering)) % size)
        return rows.to(embeddings.dtype), filled
