import pytest
import torch
from golden import cases, raw
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.reducers import DoNothingReducer

from pml_distill.losses import AbsoluteTeacherLoss


@cases("absolute_teacher")
def test_equals_the_authors_loss(case):
    case.check(AbsoluteTeacherLoss(distance=raw())(case.student, ref_emb=case.teacher))


def test_default_distance_is_that_of_unit_vectors():
    student, teacher = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [5.0, 0.0]])
    losses = AbsoluteTeacherLoss(reducer=DoNothingReducer())(student, ref_emb=teacher)["loss"]["losses"]
    assert torch.allclose(losses, torch.tensor([0.0, 2**0.5]), atol=3e-6)


@pytest.mark.parametrize("distance", [CosineSimilarity(), DotProductSimilarity()])
def test_an_inverted_distance_counts_the_similarity_that_is_missing(distance):
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [5.0, 0.0]])
    assert AbsoluteTeacherLoss(distance=distance)(student, ref_emb=teacher).item() == pytest.approx(0.5)


def test_the_power_of_the_distance_counts():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    losses = [
        AbsoluteTeacherLoss(distance=raw_distance, reducer=DoNothingReducer())(student, ref_emb=teacher)["loss"][
            "losses"
        ]
        for raw_distance in (LpDistance(), LpDistance(power=2))
    ]
    assert torch.allclose(losses[0] ** 2, losses[1])


def test_other_widths_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 5\).*projection embedder.*torch.nn.Linear\(3, 5\)"):
        AbsoluteTeacherLoss()(torch.randn(4, 3), ref_emb=torch.randn(4, 5))


def test_a_dot_product_without_a_lower_bound_is_refused():
    with pytest.raises(ValueError, match="DotProductSimilarity with normalize_embeddings=False.*no lower bound"):
        AbsoluteTeacherLoss(distance=DotProductSimilarity(normalize_embeddings=False))
