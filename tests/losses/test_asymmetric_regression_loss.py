import pytest
import torch
from golden import cases, closed_form

from pml_distill.losses import AsymmetricRegressionLoss


@cases("raml")
def test_equals_the_authors_loss(case):
    loss = AsymmetricRegressionLoss(case.lam1, case.lam2)(case.student, ref_emb=case.teacher)
    zero = (case.student == 0).all(dim=1)
    if not zero.any():
        return case.check(loss)
    # A zero row has no direction: its official gradient is 3e11, ours zero; the others agree.
    (gradient,) = torch.autograd.grad(loss, case.student)
    official = torch.tensor(case.arrays["grad"])[~zero]
    assert loss.item() == pytest.approx(case.arrays["loss"].item(), rel=1e-6)
    assert (gradient[~zero] - official).norm() <= 1e-6 * official.norm() and not gradient[zero].any()


@pytest.mark.parametrize(("weights", "value"), [((0, 0), 0), ((1, 0), 0.503074), ((0, 1), 0.320382)])
def test_figures_of_the_closed_form_example(weights, value):
    student, teacher = closed_form()
    loss = AsymmetricRegressionLoss(*weights)(student, ref_emb=teacher)
    assert loss.item() == pytest.approx(1.023899 + value, abs=1e-5)


def test_weights_must_not_be_negative():
    with pytest.raises(ValueError, match="student_weight must be zero or a positive number, but is -1"):
        AsymmetricRegressionLoss(student_weight=-1)
