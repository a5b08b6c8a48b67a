from typing import Any

import torch

from .base_teacher_miner import BaseTeacherMiner

#: How many triplets are looked at together, which bounds the memory for large batches.
TRIPLETS_AT_ONCE = 2**23


class TeacherRankMiner(BaseTeacherMiner):
    """Triplets (a, p, n) that the teacher orders one way and the student the other.

    p is among the ``neighbors`` nearest of a for the teacher (of all others if None) and nearer than n, and the student
    has n nearer than p. Labels are not used. At most ``max_triplets`` are returned, drawn at random from all by torch's
    global generator; None for no bound. Memory grows with B * B and the triplets returned. A sample may be p in one
    triplet and n in another: triplet and distillation losses take that, PML's losses on matrices of pairs, such as
    ``MultiSimilarityLoss``, refuse it.
    """

    def __init__(self, neighbors: int | None = 8, max_triplets: int | None = 100_000, **kwargs: Any):
        super().__init__(**kwargs)
        for name, value in (("neighbors", neighbors), ("max_triplets", max_triplets)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be None or at least 1, but is {value}.")
        self.neighbors, self.max_triplets = neighbors, max_triplets
        self.add_to_recordable_attributes(list_of_names=["max_triplets"], is_stat=False)

    def mine(self, embeddings, labels, ref_emb, ref_labels):
        size = len(embeddings)
        count = min(self.neighbors or size, size - 1)
        student, teacher = self.farness(embeddings), self.farness(ref_emb)
        near, nearest = teacher.topk(count, dim=1, largest=False)
        # Infinite on the diagonal: no sample is its own n.
        student_near, student = student.gather(1, nearest), student.fill_diagonal_(-torch.inf)
        teacher = teacher.fill_diagonal_(-torch.inf)
        found = torch.empty(0, dtype=torch.long, device=teacher.device)
        keys = torch.empty(0, dtype=torch.float64, device=teacher.device)
        step = max(1, TRIPLETS_AT_ONCE // (size * max(1, count)))
        for first in range(0, size, step):
            rows = slice(first, first + step)
            differ = teacher[rows, None, :] > near[rows, :, None]
            differ &= student[rows, None, :] < student_near[rows, :, None]
            new = differ.flatten().nonzero().flatten() + first * count * size
            found = torch.cat([found, new])
            if self.max_triplets is not None:
                # The triplets with the largest of random keys are a uniform draw, whatever the chunks.
                keys = torch.cat([keys, torch.rand(len(new), dtype=keys.dtype, device=keys.device)])
                if len(found) > self.max_triplets:
                    keys, drawn = keys.topk(self.max_triplets)
                    found = found[drawn]
        anchors, places, negatives = torch.unravel_index(found, (size, count, size))
        return anchors, nearest[anchors, places], negatives
