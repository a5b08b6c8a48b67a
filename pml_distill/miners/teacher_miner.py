import torch
from pytorch_metric_learning.miners import BaseMiner

from .base_teacher_miner import BaseTeacherMiner


class TeacherMiner(BaseTeacherMiner):
    """Any miner of PML, run on the teacher's embeddings.

    What is hard, or easy, is then judged by the teacher's space, which does not change while the student learns. The
    miner's own distance counts. Of a miner of triplets at most ``max_triplets`` are returned, if it is given, drawn at
    random from all by torch's global generator; pairs are at most B * B and all returned.
    """

    needs_labels = True

    def __init__(self, miner: BaseMiner, max_triplets: int | None = None):
        super().__init__()
        if not isinstance(miner, BaseMiner) or isinstance(miner, BaseTeacherMiner):
            raise ValueError(f"miner must be a miner of pytorch-metric-learning, but is a {type(miner).__name__}.")
        if max_triplets is not None and max_triplets < 1:
            raise ValueError(f"max_triplets must be None or at least 1, but is {max_triplets}.")
        self.miner, self.max_triplets = miner, max_triplets

    def mine(self, embeddings, labels, ref_emb, ref_labels):
        if labels is None:
            raise ValueError(f"TeacherMiner needs labels for its {type(self.miner).__name__}, but they are None.")
        found = self.miner(ref_emb, labels)
        if self.max_triplets is None or len(found) != 3:
            return found
        drawn = torch.randperm(len(found[0]), device=found[0].device)[: self.max_triplets]
        return tuple(column[drawn] for column in found)
