from .base_distillation_loss import BaseDistillationLoss, unit_rows


class CosineTeacherLoss(BaseDistillationLoss):
    r"""One minus the cosine of a sample's student and teacher embeddings.

    .. math:: L_i = 1 - \cos(f_s(x_i), f_t(x_i))

    In [0, 2]; half the squared Euclidean distance of the L2-normalised embeddings, so that its gradient fades as
    the student arrives, where that of ``AbsoluteTeacherLoss`` keeps its length. A zero embedding has no direction:
    its value is 1 and its gradient zero. The distance is not used, and ``indices_tuple`` has no meaning for single
    samples and is ignored. Student and teacher spaces end up aligned.

    Source: regression on the sphere, one of the settings compared by Budnik and Avrithis, "Asymmetric metric
    learning for knowledge transfer", CVPR 2021: for unit vectors it is half their squared distance.

    Args:
        **kwargs: ``reducer``, ``embedding_regularizer`` as in every PML loss.

    Shapes:
        embeddings and ref_emb: (B, D), of equal widths. Reducer input: ``loss``, one value per sample (``element``).

    Raises:
        ValueError: ``ref_emb`` is missing or differs in shape.

    Example:
        >>> import torch
        >>> CosineTeacherLoss()(-torch.eye(3), ref_emb=5 * torch.eye(3)).item()
        2.0
    """

    equal_widths = True
    takes_pairs = False

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        losses = 1 - (unit_rows(embeddings) * unit_rows(ref_emb)).sum(dim=1)
        return self.query_losses(losses, None, embeddings)
