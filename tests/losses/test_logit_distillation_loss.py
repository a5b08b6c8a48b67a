import pytest
import torch
from golden import cases

from pml_distill.losses import LogitDistillationLoss


@cases("cdd_kl")
def test_equals_the_authors_loss(case):
    case.check(LogitDistillationLoss(case.T)(case.student, ref_emb=case.teacher))


def test_gradient_hardly_depends_on_a_high_temperature():
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    gradients = [torch.autograd.grad(LogitDistillationLoss(t)(student, ref_emb=teacher), student)[0] for t in (50, 100)]
    assert torch.allclose(*gradients, rtol=0.05, atol=1e-3)


def test_other_classes_are_refused():
    with pytest.raises(ValueError, match=r"needs equal widths.*\(4, 3\).*\(4, 5\).*logits of the same classes"):
        LogitDistillationLoss()(torch.randn(4, 3), ref_emb=torch.randn(4, 5))


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature must be a positive number, but is 0"):
        LogitDistillationLoss(0)
