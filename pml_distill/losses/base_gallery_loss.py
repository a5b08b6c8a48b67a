import torch
from pytorch_metric_learning.distances import CosineSimilarity

from .base_distillation_loss import BaseDistillationLoss
from .teacher_queue import TeacherQueue

# What the authors' codes take for the distance of two equal embeddings.
LEAST_DISTANCE = 1e-6


class BaseGalleryLoss(BaseDistillationLoss):
    """Base of the losses that compare a student's query with a gallery of teacher embeddings, both (B, D).

    The gallery is the teacher's batch, the query's own row included, or, with ``queue_size``, a ``TeacherQueue``. While
    the queue is empty the loss is zero. Student and teacher spaces end up aligned.

    Args:
        queue_size: how many embeddings of earlier batches the queue holds; None for the batch as the gallery.
        width: width of the teacher's embeddings; needed for a queue only.
        include_batch: whether the batch enters the queue before the gallery is read.
        **kwargs: as in ``BaseDistillationLoss``; ``distance`` is ``CosineSimilarity()`` by default.
    """

    default_distance = CosineSimilarity
    equal_widths = True
    takes_pairs = False

    def __init__(self, queue_size: int | None = None, width: int | None = None, include_batch: bool = False, **kwargs):
        super().__init__(**kwargs)
        if (queue_size is None) != (width is None):
            raise ValueError(f"A queue needs both, but queue_size is {queue_size} and width is {width}.")
        if include_batch and queue_size is None:
            raise ValueError("include_batch is True, but there is no queue; without queue_size the batch is all.")
        self.queue = None if queue_size is None or width is None else TeacherQueue(queue_size, width)
        self.include_batch = include_batch

    def closeness(self, embeddings: torch.Tensor, ref_emb: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the (B, G) closeness of student and of teacher to the gallery, and which places are filled."""
        if self.queue is None:
            gallery, filled = ref_emb, torch.ones(len(ref_emb), dtype=torch.bool, device=ref_emb.device)
        else:
            gallery, filled = self.queue.candidates(ref_emb, self.include_batch)
        return self.closeness_to(gallery, embeddings), self.closeness_to(gallery, ref_emb), filled

    def closeness_to(self, gallery: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Return the (B, G) values of ``self.distance``; if it grows with dissimilarity its negative, at most -1e-6."""
        values = self.distance(self.directed(queries), gallery)
        return values if self.distance.is_inverted else -values.clamp(min=LEAST_DISTANCE)

    def nearest(self, embeddings: torch.Tensor, ref_emb: torch.Tensor, topk: int) -> tuple[torch.Tensor, ...]:
        """Return the (B, k) closeness of student and teacher to the teacher's nearest, and which are filled, (k,)."""
        student, teacher, filled = self.closeness(embeddings, ref_emb)
        count = torch.sym_min(topk, len(filled))  # without a graph of its own for galleries smaller than topk
        _, places = teacher.masked_fill(~filled, -torch.inf).topk(count, dim=1)
        filled = torch.arange(count, device=filled.device) < filled.sum()
        return student.gather(1, places), teacher.gather(1, places), filled
