import torch
from pytorch_metric_learning.miners import BaseMiner

from ..distances import EuclideanDistance
from ..utils.tensors import in_float32


class BaseTeacherMiner(BaseMiner):
    """Base of the miners that ask the teacher: ``miner(embeddings, labels, ref_emb=teacher_embeddings)``.

    ``ref_emb`` holds the teacher's embeddings of the same samples in the same order. A miner returns places in the
    batch, which serve for both sides: pass them to any PML loss or distillation loss. The trainers pass the teacher's
    embeddings. Subclasses implement ``mine`` and never return a sample paired with itself.

    Args:
        distance: any PML distance; default ``EuclideanDistance()``, of L2-normalised embeddings.

    Shapes: embeddings (B, Ds), ref_emb (B, Dt), labels (B,) or None, where the miner does not need them.

    Raises:
        ValueError: ``ref_emb`` is missing, or it or ``labels`` has another number of rows.
    """

    #: Tells a loss with miners of its own which of them to give the teacher's embeddings.
    asks_teacher = True
    #: Whether there is nothing to mine without labels.
    needs_labels = False

    def forward(self, embeddings, labels=None, ref_emb=None, ref_labels=None):
        """Return a tuple of pairs (a1, p, a2, n) or of triplets (a, p, n)."""
        self.reset_stats()
        name = type(self).__name__
        if ref_emb is None:
            raise ValueError(
                f"{name} needs the teacher's embeddings: pass ref_emb=teacher_embeddings, a tensor with one row for "
                f"each row of embeddings {tuple(embeddings.shape)}. MultipleLosses passes none to its miners: mine "
                "once and pass what is found as indices_tuple, or give the miner to MultipleDistillationLosses or "
                "to a trainer as tuple_miner."
            )
        if len(ref_emb) != len(embeddings):
            raise ValueError(
                f"{name} compares student and teacher row for row, but embeddings has shape "
                f"{tuple(embeddings.shape)} and ref_emb {tuple(ref_emb.shape)}."
            )
        if labels is not None and labels.shape != embeddings.shape[:1]:
            raise ValueError(
                f"{name} needs one class label for each row of embeddings, but embeddings has shape "
                f"{tuple(embeddings.shape)} and labels {tuple(labels.shape)}."
            )
        student = in_float32(embeddings)
        with torch.no_grad(), torch.autocast(embeddings.device.type, enabled=False):
            labels = None if labels is None else labels.to(student.device)
            output = self.mine(student, labels, ref_emb.to(student), ref_labels)
        self.output_assertion(output)
        return output

    def get_default_distance(self) -> EuclideanDistance:
        """Return the distance to use where none is given."""
        return EuclideanDistance()

    def farness(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the (B, B) matrix of ``self.distance``, turned where it is a similarity; infinite on the diagonal."""
        mat = self.distance(embeddings)
        return (-mat if self.distance.is_inverted else mat).fill_diagonal_(torch.inf)
