import pytest
import torch
from golden import cases, closed_form, raw
from pytorch_metric_learning.reducers import DoNothingReducer

from pml_distill.losses import RKDDistanceLoss


@cases("rkd_distance")
def test_equals_the_authors_loss_up_to_the_diagonal(case):
    size = len(case.student)
    case.check((size - 1) / size * RKDDistanceLoss(distance=raw())(case.student, ref_emb=case.teacher))


def test_figure_of_the_closed_form_example():
    student, teacher = closed_form()
    assert RKDDistanceLoss()(student, ref_emb=teacher).item() * 7 / 8 == pytest.approx(0.050507, rel=1e-5)


def test_only_a_miners_pairs_count_under_the_batchs_means():
    student, teacher = closed_form()
    all_pairs = RKDDistanceLoss(reducer=DoNothingReducer())(student, ref_emb=teacher)["loss"]["losses"]
    value = RKDDistanceLoss()(student, None, tuple(torch.tensor([x]) for x in (0, 1, 3)), teacher)
    # Row 0 of the off-diagonal entries holds the pairs of sample 0 with 1, 2, 3.
    assert value.item() == pytest.approx((all_pairs[0] + all_pairs[2]).item() / 2)
