import pytest
from golden import cases, closed_form, raw

from pml_distill.losses import RelaxedContrastiveLoss


@cases("relaxed_contrastive")
def test_equals_the_authors_loss_up_to_its_divisor(case):
    loss = RelaxedContrastiveLoss(case.sigma, case.delta, distance=raw())(case.student, ref_emb=case.teacher)
    case.check((len(case.student) - 1) * loss)


def test_figures_of_the_closed_form_example():
    student, teacher = closed_form()
    assert RelaxedContrastiveLoss()(student, ref_emb=teacher).item() == pytest.approx(0.272548, abs=1e-6)


@pytest.mark.parametrize("name", ["sigma", "delta"])
def test_parameters_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be a positive number, but is -1"):
        RelaxedContrastiveLoss(**{name: -1})
