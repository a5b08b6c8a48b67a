from .base_distillation_loss import BaseDistillationLoss, entry, unit_rows


class CosineTeacherLoss(BaseDistillationLoss):
    r"""One minus the cosine of a sample's student and teacher embeddings (regression on the sphere).

    .. math:: L_i = 1 - \cos(f_s(x_i), f_t(x_i))

    Unlike that of ``AbsoluteTeacherLoss`` its gradient fades as the student arrives. Shapes: both (B, D); one value per
    sample. Source: Budnik and Avrithis, "Asymmetric metric learning for knowledge transfer", CVPR 2021.
    """

    equal_widths = True
    takes_pairs = False

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        return {"loss": entry(1 - (unit_rows(embeddings) * unit_rows(ref_emb)).sum(dim=1))}
