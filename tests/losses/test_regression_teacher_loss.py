import pytest
import torch
from golden import cases

from pml_distill.losses import RegressionTeacherLoss


@cases("kd_mse")
def test_equals_the_mean_over_all_elements(case):
    case.check(RegressionTeacherLoss()(case.student, ref_emb=case.teacher))


@cases("darkrank_match")
def test_equals_the_match_operator_up_to_its_factor(case):
    size, width = case.student.shape
    case.check(size * width * (size // 2) * RegressionTeacherLoss()(case.student, ref_emb=case.teacher))


def test_smooth_l1_is_linear_beyond_one():
    value = RegressionTeacherLoss("smooth_l1")(torch.tensor([[0.0, 0.0]]), ref_emb=torch.tensor([[0.5, 3.0]]))
    assert value.item() == pytest.approx((0.5**2 / 2 + 2.5) / 2)


def test_unknown_penalty_is_refused():
    with pytest.raises(ValueError, match='penalty must be "mse" or "smooth_l1", but is \'l1\''):
        RegressionTeacherLoss("l1")


def test_other_widths_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"projection embedder, for example torch.nn.Linear\(3, 5\)"):
        RegressionTeacherLoss()(torch.zeros(2, 3), ref_emb=torch.zeros(2, 5))
