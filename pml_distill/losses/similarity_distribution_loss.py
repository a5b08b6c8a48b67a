from torch.nn import functional as F

from .base_distillation_loss import ABSENT, BaseDistillationLoss, entry, set_numbers, unit_rows
from .teacher_queue import TeacherQueue


class SimilarityDistributionLoss(BaseDistillationLoss):
    r"""Each query's softmax distribution over a queue of earlier embeddings (CompRess, SEED, RRD, CSD).

    .. math:: L_i = KL\big(softmax(Q_t t_i / \tau_t) \,\|\, softmax(Q s_i / \tau_s)\big)

    s and t are L2-normalised and Q_t is a ``TeacherQueue``. Q is the same queue, or with ``student_width`` a second one
    of the student's embeddings; then widths may differ and the spaces do not end up aligned. While the queue is empty
    the loss is zero. The distance is not used. Shapes: embeddings (B, ``student_width`` or ``width``), ref_emb (B,
    ``width``); one value per query. Settings:

    - CompRess (Koohpayegani et al., NeurIPS 2020): the defaults with a queue of 128000; or two queues;
    - SEED (Fang et al., ICLR 2021): ``student_temperature=0.2, teacher_temperature=0.01, include_batch=True``;
    - RRD (Giakoumoglou and Stathaki, 2024): 0.02, 0.1 and ``include_batch=True``, behind linear projections of both;
    - CSD (Wu et al., CVPR 2022): ``student_temperature=1, teacher_temperature=0.01, topk=...``.

    tau_s and tau_t are the temperatures; ``include_batch`` puts the batch itself among the candidates, and ``topk``
    counts only that many of the teacher's nearest.
    """

    takes_pairs = False

    def __init__(
        self,
        queue_size: int,
        width: int,
        student_temperature: float = 0.04,
        teacher_temperature: float = 0.04,
        include_batch: bool = False,
        topk: int | None = None,
        student_width: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        set_numbers(self, student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        if topk is not None and topk < 1:
            raise ValueError(f"topk must be None or at least 1, but is {topk}.")
        self.include_batch, self.topk = include_batch, topk
        self.equal_widths = student_width is None
        self.queue = TeacherQueue(queue_size, width)
        self.student_queue = None if student_width is None else TeacherQueue(queue_size, student_width)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        student, teacher = unit_rows(embeddings), unit_rows(ref_emb)
        rows, filled = self.queue.candidates(teacher, self.include_batch)
        teacher = (teacher @ rows.t()).masked_fill(~filled, ABSENT) / self.teacher_temperature
        if self.student_queue is not None:
            rows, filled = self.student_queue.candidates(student, self.include_batch)
        student = (student @ rows.t()).masked_fill(~filled, ABSENT) / self.student_temperature
        if self.topk is not None:
            teacher, nearest = teacher.topk(min(self.topk, teacher.shape[1]), dim=1)
            student = student.gather(1, nearest)
        log_student, log_teacher = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
        return {"loss": entry(F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1))}
