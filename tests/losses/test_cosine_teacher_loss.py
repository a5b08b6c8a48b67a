import pytest
import torch
from golden import closed_form

from pml_distill.losses import CosineTeacherLoss


def test_is_half_the_squared_distance_of_unit_rows():
    student, teacher = closed_form()
    expected = (student - teacher).square().sum(dim=1).mean() / 2
    assert CosineTeacherLoss()(3 * student, ref_emb=7 * teacher).item() == pytest.approx(expected.item())


def test_a_zero_row_costs_one_and_gets_no_gradient():
    student = torch.zeros(1, 3, requires_grad=True)
    value = CosineTeacherLoss()(student, ref_emb=torch.ones(1, 3))
    value.backward()
    assert value == 1 and not student.grad.any()
