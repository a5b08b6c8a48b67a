import pytest
import torch
from golden import cases, raw
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.reducers import DoNothingReducer

from pml_distill.losses import SimilarityRegressionLoss


@cases("darkrank_listmse")
def test_equals_the_authors_loss(case):
    loss = SimilarityRegressionLoss(case.scale**case.power, 2 * case.power, distance=raw(), reducer=DoNothingReducer())
    result = loss(case.student, ref_emb=case.teacher)["loss"]
    case.check(result["losses"][result["indices"][0] < len(case.student) // 2].sum())


def test_default_is_the_papers_squared_distance():
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    difference = torch.cdist(student, student) ** 2 - torch.cdist(teacher, teacher) ** 2
    loss = SimilarityRegressionLoss(distance=raw())(student, ref_emb=teacher)
    assert loss.item() == pytest.approx((difference**2).sum().item() / 20)


def test_scores_of_a_similarity_keep_their_sign():
    student, teacher = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss = SimilarityRegressionLoss(alpha=1, beta=2, distance=CosineSimilarity())
    assert loss(student, ref_emb=teacher).item() == pytest.approx(4.0)


@pytest.mark.parametrize("arguments", [{"alpha": 0}, {"beta": 0}])
def test_errors_name_the_argument(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must be a positive number, but is 0"):
        SimilarityRegressionLoss(**arguments)
