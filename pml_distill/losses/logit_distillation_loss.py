from torch.nn import functional as F

from .base_distillation_loss import BaseDistillationLoss, entry, set_numbers


class LogitDistillationLoss(BaseDistillationLoss):
    r"""Divergence of the student's softened class probabilities from the teacher's (classical KD).

    .. math:: L_i = T^2 \; KL(softmax(z_t / T) \,\|\, softmax(z_s / T))

    ``embeddings`` are the student's logits z_s and ``ref_emb`` the teacher's z_t, (B, C) of the same classes; one value
    per sample. A larger ``temperature`` T softens both. The distance is not used. Source: Hinton et al., "Distilling
    the Knowledge in a Neural Network", 2015, with the mean over the batch.
    """

    equal_widths = True
    takes_pairs = False
    width_advice = "Both must be logits of the same classes in the same order."

    def __init__(self, temperature: float = 4.0, **kwargs):
        super().__init__(**kwargs)
        set_numbers(self, temperature=temperature)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        student, teacher = (F.log_softmax(z / self.temperature, dim=1) for z in (embeddings, ref_emb))
        losses = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
        return {"loss": entry(self.temperature**2 * losses)}
