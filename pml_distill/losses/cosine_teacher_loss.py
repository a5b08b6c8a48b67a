from .base_distillation_loss import BaseDistillationLoss, unit_rows


class CosineTeacherLoss(BaseDistillationLoss):
    r"""One minus the cosine of a sample's student and teacher embeddings (regression on the sphere).

    .. math:: L_i = 1 - \cos(f_s(x_i), f_t(x_i))

    Half the squared Euclidean distance of the L2-normalised embeddings, so that the gradient fades as the student
    arrives; that of ``AbsoluteTeacherLoss`` keeps its length. A zero embedding has the value 1.

    Source: Budnik and Avrithis, "Asymmetric metric learning for knowledge transfer", CVPR 2021.

    Shapes: embeddings and ref_emb (B, D). One value per sample (``element``).
    """

    equal_widths = True
    takes_pairs = False

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        losses = 1 - (unit_rows(embeddings) * unit_rows(ref_emb)).sum(dim=1)
        return self.query_losses(losses, None, embeddings)
