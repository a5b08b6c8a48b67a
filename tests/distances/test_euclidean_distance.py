import pytest
import torch
from pytorch_metric_learning.distances import LpDistance

from pml_distill.distances import EuclideanDistance


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("power", [1, 2])
def test_equals_lp_distance_in_value_and_gradient(normalize, power):
    embeddings = torch.randn(30, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(30, 30, dtype=torch.float64).fill_diagonal_(0)
    results = []
    for cls in (EuclideanDistance, LpDistance):
        mat = cls(normalize_embeddings=normalize, power=power)(embeddings)
        off_diagonal = mat * (1 - torch.eye(30))
        results.append((off_diagonal, torch.autograd.grad((weights * mat).sum(), embeddings)[0]))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-9)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-9)


def test_two_batches_are_left_to_lp_distance():
    query, reference = torch.randn(5, 3), torch.randn(8, 3)
    assert torch.equal(EuclideanDistance()(query, reference), LpDistance()(query, reference))


def test_gradient_is_correct_and_zero_at_distance_zero():
    distance = EuclideanDistance(normalize_embeddings=False)
    assert torch.autograd.gradcheck(distance, torch.randn(6, 3, dtype=torch.float64, requires_grad=True))
    twins = torch.ones(3, 2, requires_grad=True)
    mat = distance(twins)
    mat.sum().backward()
    assert torch.equal(mat, torch.zeros(3, 3)) and torch.equal(twins.grad, torch.zeros(3, 2))


def test_its_diagonal_is_zero_where_cdist_has_rounding():
    assert EuclideanDistance()(torch.randn(64, 128)).diagonal().abs().max() == 0
