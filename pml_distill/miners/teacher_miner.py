from typing import Any

import torch
from pytorch_metric_learning.miners import BaseMiner

from .base_teacher_miner import BaseTeacherMiner


class TeacherMiner(BaseTeacherMiner):
    """Any miner of PML, run on the teacher's embeddings.

    What is hard, or easy, is then judged by the teacher's space, which does not change while the student learns.

    Args:
        miner: a PML miner, such as ``MultiSimilarityMiner()``; its own distance counts.

    Returns:
        what ``miner`` returns for the teacher's embeddings.

    Raises:
        ValueError: ``miner`` is no PML miner, or is a miner of this package; labels are None; what
            ``BaseTeacherMiner`` refuses.

    Example:
        >>> from pytorch_metric_learning.miners import BatchHardMiner
        >>> teacher, labels = torch.eye(4)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])
        >>> [t.tolist() for t in TeacherMiner(BatchHardMiner())(torch.rand(4, 2), labels, ref_emb=teacher)][:2]
        [[0, 1, 2, 3], [1, 0, 3, 2]]
    """

    needs_labels = True

    def __init__(self, miner: BaseMiner):
        super().__init__()
        if not isinstance(miner, BaseMiner) or isinstance(miner, BaseTeacherMiner):
            raise ValueError(f"miner must be a miner of pytorch-metric-learning, but is a {type(miner).__name__}.")
        self.miner = miner

    def mine(
        self, embeddings: torch.Tensor, labels: torch.Tensor | None, ref_emb: torch.Tensor, ref_labels: Any
    ) -> tuple[torch.Tensor, ...]:
        if labels is None:
            raise ValueError(f"TeacherMiner needs labels for its {type(self.miner).__name__}, but they are None.")
        return self.miner(ref_emb, labels)
