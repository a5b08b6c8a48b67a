import torch
from torch.nn import functional as F

from .base_distillation_loss import BaseDistillationLoss, already_reduced, off_diagonal

PAIR_NORMS = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}


class RelativeTeacherLoss(BaseDistillationLoss):
    r"""The difference between the student's and the teacher's distances, over pairs of samples (relative teacher).

    .. math:: L_{ij} = |d_s(x_i, x_j) - d_t(x_i, x_j)|, \quad i \neq j

    For a similarity (cosine, dot product) similarities are compared. ``norm`` is ``"l1"``; ``"l2"``, the square;
    ``"huber"``, smooth L1 with its turn at 1; or ``"frobenius"``, the root of the sum of squares over all pairs.
    Shapes: embeddings (B, Ds), ref_emb (B, Dt); one value per ordered pair, with ``"frobenius"`` one in all. Source: Yu
    et al., "Learning Metrics from Teachers", CVPR 2019. Their code has the Frobenius norm, about 40 times the ``"l1"``
    mean at B = 32, and weights for it: 0.3 (CUB), 0.1 (Cars), 1.0 (SOP).
    """

    def __init__(self, norm: str = "l1", **kwargs):
        super().__init__(**kwargs)
        if norm not in (*PAIR_NORMS, "frobenius"):
            raise ValueError(f'norm must be one of "l1", "l2", "huber", "frobenius", but is {norm!r}.')
        self.norm = norm

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        student, teacher = self.distance_matrix(embeddings), self.distance_matrix(ref_emb)
        if self.norm != "frobenius":
            losses = PAIR_NORMS[self.norm](student, teacher, reduction="none")
            return self.pair_losses(losses, indices_tuple, embeddings)
        if len(student) < 2:
            return self.zero_losses()
        if not self.distance.is_inverted:
            student, teacher = student.clamp(min=1e-6), teacher.clamp(min=1e-6)
        difference = student - teacher
        if indices_tuple is not None:
            difference = difference.masked_fill(~self.pair_mask(indices_tuple, student), 0)
        # PML's trainers weight a loss in place, which would spoil what the backward of a norm has saved.
        return {"loss": already_reduced(torch.linalg.vector_norm(off_diagonal(difference)).clone())}
