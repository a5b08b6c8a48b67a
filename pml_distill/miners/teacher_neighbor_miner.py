from typing import Any

import torch

from .base_teacher_miner import BaseTeacherMiner


class TeacherNeighborMiner(BaseTeacherMiner):
    """Pairs (a1, p, a2, n) of each sample with its nearest ``neighbors`` in the teacher's space.

    Most pairs of a batch are far apart and carry little; these are where the ranking is decided. Without labels all
    are positive pairs. With labels a neighbour of another class makes a negative pair, one that even the teacher
    finds hard. A distillation loss counts both kinds.
    """

    def __init__(self, neighbors: int = 8, **kwargs: Any):
        super().__init__(**kwargs)
        if neighbors < 1:
            raise ValueError(f"neighbors must be at least 1, but is {neighbors}.")
        self.neighbors = neighbors
        self.add_to_recordable_attributes(list_of_names=["neighbors"], is_stat=False)

    def mine(self, embeddings, labels, ref_emb, ref_labels):
        size = len(embeddings)
        count = min(self.neighbors, size - 1)
        others = self.farness(ref_emb).topk(count, dim=1, largest=False).indices.flatten()
        anchors = torch.arange(size, device=others.device).repeat_interleave(count)
        if labels is None:
            return anchors, others, anchors[:0], others[:0]
        same = labels[anchors] == labels[others]
        return anchors[same], others[same], anchors[~same], others[~same]
