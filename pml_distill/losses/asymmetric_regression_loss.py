from .base_distillation_loss import BaseDistillationLoss, entry, set_numbers, unit_rows

# Added to each difference before it is squared, as in the authors' code.
EPSILON = 1e-6


class AsymmetricRegressionLoss(BaseDistillationLoss):
    r"""Regression of the embedding and of its similarities, for a gallery indexed by the teacher (RAML).

    .. math:: L^{abs}_i = (1 - s_i^\top t_i)^2, \quad
        L^{ts}_{ij} = \lambda_1 (s_i^\top t_j - t_i^\top t_j)^2, \quad
        L^{ss}_{ij} = \lambda_2 (s_i^\top s_j - t_i^\top t_j)^2, \quad i \neq j

    s and t are L2-normalised; the distance is not used. lambda_1 is ``teacher_weight``, lambda_2 ``student_weight``.
    Shapes: embeddings and ref_emb (B, D). ``absolute``: one value per sample; ``teacher_student`` and
    ``student_student``: one per ordered pair; all are reduced one by one and added. Source: Suma and Tolias,
    "Large-to-small Image Resolution Asymmetry in Deep Metric Learning", WACV 2023, whose scale this is. Their weights:
    0.7718 and 0.6684 (CUB), 0.6371 and 0.7731 (Cars), 0.7482 and 0.6778 (SOP).
    """

    equal_widths = True
    part_names = "absolute", "teacher_student", "student_student"

    def __init__(self, teacher_weight: float = 0.7482, student_weight: float = 0.6778, **kwargs):
        super().__init__(**kwargs)
        set_numbers(self, 0, teacher_weight=teacher_weight, student_weight=student_weight)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        student, teacher = unit_rows(embeddings), unit_rows(ref_emb)
        target = teacher @ teacher.t()
        absolute = (1 - (student * teacher).sum(dim=1) + EPSILON).square()
        crossed = self.teacher_weight * (student @ teacher.t() - target + EPSILON).square()
        own = self.student_weight * (student @ student.t() - target + EPSILON).square()
        return {
            "absolute": entry(absolute),
            **self.pair_losses(crossed, indices_tuple, embeddings, "teacher_student"),
            **self.pair_losses(own, indices_tuple, embeddings, "student_student"),
        }
