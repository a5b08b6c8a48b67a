from typing import Any

import torch
from torch.nn import functional as F

from .base_distillation_loss import BaseDistillationLoss
from .teacher_queue import TeacherQueue


class DistillationMemory(BaseDistillationLoss):
    """A memory of student and teacher rows, so that small batches see more pairs (XBM with a teacher).

    ``loss`` is computed on the batch joined with the last ``memory_size`` rows of both sides, over the pairs whose
    anchor is in the batch; time and memory grow with (B + memory_size)^2. Remembered rows get no gradient. The batch
    enters after that, in training mode only. Free places repeat rows of the batch, in no pair: only losses with a mean
    over all distances (``RKDDistanceLoss``, ``RelaxedContrastiveLoss``) notice. Shapes: embeddings (B,
    ``embedding_size``), ref_emb (B, ``ref_size``); a tuple restricts the pairs in the batch. Source: Wang et al.,
    "Cross-Batch Memory for Embedding Learning", CVPR 2020, and PML's ``CrossBatchMemory``; begin after a warm-up, since
    the student's rows age.

    Args:
        loss: a distillation loss that takes pairs, or several of them in ``MultipleDistillationLosses``.
        embedding_size: width of the student's embeddings.
        memory_size: how many rows are remembered; see ``TeacherQueue`` for several processes.
        ref_size: width of the teacher's embeddings; by default ``embedding_size``.
        miner: a miner of ``pml_distill.miners`` that needs no labels, run on the joined rows.
    """

    def __init__(
        self,
        loss: BaseDistillationLoss,
        embedding_size: int,
        memory_size: int = 1024,
        ref_size: int | None = None,
        miner: Any = None,
    ):
        super().__init__()
        parts = [part for part in loss.modules() if isinstance(part, BaseDistillationLoss)]
        without = [type(part).__name__ for part in parts or [loss] if not parts or not part.takes_pairs]
        if without:
            raise ValueError(f"loss must be a distillation loss on pairs, but {', '.join(without)} takes no pairs.")
        if getattr(miner, "needs_labels", miner is not None):
            kind = type(miner).__name__
            raise ValueError(f"miner must be one that needs no labels (TeacherNeighborMiner), but is a {kind}.")
        self.loss, self.miner, self.needs_labels = loss, miner, loss.needs_labels
        self.student_queue = TeacherQueue(memory_size, embedding_size)
        self.queue = TeacherQueue(memory_size, embedding_size if ref_size is None else ref_size)

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None):
        """Return the loss of the batch and the memory; the batch enters."""
        self.check_teacher(embeddings, ref_emb)
        size = len(embeddings)
        if size == 0:
            return self.loss(embeddings, labels, None, ref_emb)
        teacher = ref_emb.detach().to(embeddings.device)
        remembered, filled = self.student_queue.candidates(embeddings)
        remembered_teacher, _ = self.queue.candidates(teacher)
        free = torch.arange(len(filled), device=filled.device) % size
        joined = torch.cat([embeddings, remembered.where(filled[:, None], embeddings.detach()[free])])
        joined_teacher = torch.cat([teacher, remembered_teacher.where(filled[:, None], teacher[free])])
        among = torch.ones(size, size, dtype=torch.bool, device=filled.device)
        if indices_tuple is not None:
            among = self.pair_mask(indices_tuple, embeddings)
        mask = F.pad(torch.cat([among, filled.expand(size, -1)], dim=1), (0, 0, 0, len(filled)))
        if self.miner is not None:
            mask = mask & self.pair_mask(self.miner(joined, ref_emb=joined_teacher), joined)
        mask.diagonal().zero_()
        labels = None if labels is None or labels.ndim > 1 else F.pad(labels, (0, len(filled)))
        return self.loss(joined, labels, mask, joined_teacher)
