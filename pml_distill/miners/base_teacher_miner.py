import torch
from pytorch_metric_learning.miners import BaseMiner

from ..distances import EuclideanDistance
from ..utils.tensors import in_float32


class BaseTeacherMiner(BaseMiner):
    """Base of the miners that ask the teacher: ``miner(embeddings, labels, ref_emb=teacher_embeddings)``.

    ``ref_emb`` (B, Dt) holds the teacher's embeddings of the same samples as embeddings (B, Ds); labels are (B,) or
    None, where the miner does not need them. A miner returns places in the batch, for any PML or distillation loss.
    The trainers pass the teacher's embeddings. ``distance`` is any PML distance, by default ``EuclideanDistance()`` of
    L2-normalised embeddings. Subclasses implement ``mine`` and never return a sample paired with itself.
    """

    #: Tells a loss with miners of its own which of them to give the teacher's embeddings.
    asks_teacher = True
    #: Whether there is nothing to mine without labels.
    needs_labels = False

    def forward(self, embeddings, labels=None, ref_emb=None, ref_labels=None):
        """Return a tuple of pairs (a1, p, a2, n) or of triplets (a, p, n)."""
        self.reset_stats()
        name, shape = type(self).__name__, tuple(embeddings.shape)
        if ref_emb is None:
            raise ValueError(
                f"{name} needs the teacher's embeddings: pass ref_emb=teacher_embeddings, row for row of {shape}. "
                "MultipleLosses passes none to its miners: mine once and pass what is found as indices_tuple, or give "
                "the miner to MultipleDistillationLosses or to a trainer as tuple_miner."
            )
        if len(ref_emb) != len(embeddings):
            given = f"embeddings has shape {shape} and ref_emb {tuple(ref_emb.shape)}"
            raise ValueError(f"{name} compares student and teacher row for row, but {given}.")
        if labels is not None and labels.shape != embeddings.shape[:1]:
            given = f"embeddings has shape {shape} and labels {tuple(labels.shape)}"
            raise ValueError(f"{name} needs one class label for each row of embeddings, but {given}.")
        student = in_float32(embeddings)
        with torch.no_grad(), torch.autocast(embeddings.device.type, enabled=False):
            labels = None if labels is None else labels.to(student.device)
            output = self.mine(student, labels, ref_emb.to(student), ref_labels)
        self.output_assertion(output)
        return output

    def get_default_distance(self):
        return EuclideanDistance()

    def farness(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the (B, B) matrix of ``self.distance``, turned where it is a similarity; infinite on the diagonal."""
        mat = self.distance(embeddings)
        return (-mat if self.distance.is_inverted else mat).fill_diagonal_(torch.inf)
