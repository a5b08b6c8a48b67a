import pytest
import torch
from golden import cases, closed_form

from pml_distill.losses import ProbabilisticTransferLoss


@cases("pkt")
def test_equals_the_authors_loss_up_to_the_batch_size(case):
    loss = ProbabilisticTransferLoss()(case.student, ref_emb=case.teacher) / len(case.student)
    case.check(loss)


def test_figure_of_the_closed_form_example():
    student, teacher = closed_form()
    value = ProbabilisticTransferLoss()(student, ref_emb=teacher) / 8
    assert value.item() == pytest.approx(0.023785869, rel=1e-5)


def test_a_miners_pairs_are_the_candidates():
    student, teacher = closed_form()
    chosen = torch.tensor([0, 1, 3])
    kernels = [1 + x[0] @ x[chosen].t() for x in (student, teacher)]
    p_student, p_teacher = (kernel / kernel.sum() for kernel in kernels)
    value = ProbabilisticTransferLoss()(student, None, tuple(torch.tensor([x]) for x in (0, 1, 3)), teacher)
    assert value.item() == pytest.approx((p_teacher * (p_teacher / p_student).log()).sum().item(), rel=1e-5)
