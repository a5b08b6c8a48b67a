import pytest
import torch
from golden import cases, raw
from pytorch_metric_learning.distances import CosineSimilarity

from pml_distill.losses import RelativeTeacherLoss


def embeddings(size, width, seed=0):
    return torch.randn(size, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cases("relative_teacher")
def test_frobenius_equals_the_authors_loss(case):
    case.check(RelativeTeacherLoss("frobenius", distance=raw())(case.student, ref_emb=case.teacher))


def test_figures_of_the_closed_form_example():
    i, j = torch.arange(8, dtype=torch.float64)[:, None], torch.arange(6, dtype=torch.float64)
    student, teacher = torch.sin(0.7 * i + 1.3 * j + 0.11 * i * j), torch.cos(0.3 * i - 0.9 * j + 0.17 * i * j)
    assert RelativeTeacherLoss("frobenius")(student, ref_emb=teacher).item() == pytest.approx(3.468006, abs=1e-6)
    assert RelativeTeacherLoss("l1")(student, ref_emb=teacher).item() == pytest.approx(0.353811, abs=1e-6)


@pytest.mark.parametrize(
    ("norm", "value"),
    [
        ("l1", lambda d: d.abs()),
        ("l2", lambda d: d**2),
        ("huber", lambda d: torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5)),
    ],
)
def test_mean_over_all_pairs_of_different_widths(norm, value):
    student, teacher = 3 * embeddings(6, 4), 3 * embeddings(6, 9, seed=1)
    expected = [
        value((student[i] - student[j]).norm() - (teacher[i] - teacher[j]).norm())
        for i in range(6)
        for j in range(6)
        if i != j
    ]
    loss = RelativeTeacherLoss(norm, distance=raw())(student, ref_emb=teacher)
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item())


@pytest.mark.parametrize("norm", ["l1", "frobenius"])
def test_only_a_miners_pairs_count_each_once(norm):
    student, teacher = embeddings(6, 4), embeddings(6, 4, seed=1)
    triplets = tuple(torch.tensor(x) for x in ([0, 0, 3], [1, 1, 4], [2, 5, 5]))
    distance = RelativeTeacherLoss().distance
    difference = (distance(student) - distance(teacher)).abs()
    chosen = torch.stack([difference[pair] for pair in ((0, 1), (0, 2), (0, 5), (3, 4), (3, 5))])
    expected = chosen.mean() if norm == "l1" else chosen.norm()
    assert RelativeTeacherLoss(norm)(student, None, triplets, teacher).item() == pytest.approx(expected.item())


def test_similarities_are_compared_for_an_inverted_distance():
    student, teacher = embeddings(6, 4), embeddings(6, 4, seed=1)
    cosine = CosineSimilarity()
    difference = (cosine(student) - cosine(teacher)).abs()
    expected = difference.sum() / 30 - difference.diagonal().sum() / 30
    loss = RelativeTeacherLoss(distance=CosineSimilarity())(student, ref_emb=teacher)
    assert loss.item() == pytest.approx(expected.item())


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match='norm must be one of "l1", "l2", "huber", "frobenius", but is \'l3\''):
        RelativeTeacherLoss("l3")
