import pytest
import torch
from golden import cases, closed_form

from pml_distill.losses import CorrelationCongruenceLoss


@cases("cckd_taylor")
def test_equals_the_papers_kernel_up_to_the_diagonal(case):
    size = len(case.student)
    loss = CorrelationCongruenceLoss(case.gamma, int(case.P_order))(case.student, ref_emb=case.teacher)
    # All student rows equal (c08): the true gradient is zero, the official 7e-17 is rounding.
    case.check((size - 1) / size * loss, rounding=1e-15 if (case.student[0] == case.student).all() else 0)


def test_figure_of_the_closed_form_example():
    student, teacher = closed_form()
    value = CorrelationCongruenceLoss()(student, ref_emb=teacher) * 7 / 8
    assert value.item() == pytest.approx(0.033161395, rel=1e-5)


def test_a_high_order_is_the_gaussian_kernel():
    student, teacher = closed_form()
    kernels = [(-0.4 * torch.cdist(x, x).square()).exp() for x in (student, teacher)]
    expected = (kernels[0] - kernels[1]).square().sum() / 56
    assert CorrelationCongruenceLoss(order=20)(student, ref_emb=teacher).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"gamma": 0}, "gamma must be a positive number, but is 0"), ({"order": 0}, "order must be at least 1, but is 0")],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CorrelationCongruenceLoss(**arguments)
