import numpy as np
import pytest
import torch

from pml_distill.evaluation import bootstrap_interval, compare, retrieval_accuracy, retrieval_values


def spaces(noise, size=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) // 5
    centers = torch.randn(size // 5, 12, generator=torch.Generator().manual_seed(9))
    return centers[labels] + noise * torch.randn(size, 12, generator=generator), labels


def test_the_interval_covers_the_mean_as_often_as_it_says():
    covered, random = 0, np.random.RandomState(0)
    for seed in range(200):
        low, high = bootstrap_interval(
            torch.tensor(random.rand(60) < 0.3).double(), level=0.9, resamples=300, seed=seed
        )
        covered += low <= 0.3 <= high
    assert 0.83 < covered / 200 < 0.95


def test_the_interval_is_the_normal_one_for_many_queries_and_wider_for_groups():
    values = torch.rand(400, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_interval(values)
    error = values.std().item() / 20
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert (low + high) / 2 == pytest.approx(values.mean().item(), abs=0.2 * error)
    grouped = torch.arange(400) // 4
    low, high = bootstrap_interval(values[grouped], grouped)
    alone = bootstrap_interval(values[grouped])
    assert high - low == pytest.approx(2 * (alone[1] - alone[0]), rel=0.15)


def test_queries_that_do_not_count_change_nothing():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).double()
    some = torch.cat([values, torch.full((7,), torch.nan).double()])
    assert bootstrap_interval(some) == bootstrap_interval(values)
    with pytest.raises(ValueError, match="no query that counts"):
        bootstrap_interval(some[50:])
    with pytest.raises(ValueError, match="level must be between 0 and 1, but is 95"):
        bootstrap_interval(values, level=95)
    with pytest.raises(ValueError, match="groups must have one entry for each of 50 values, but has 3"):
        bootstrap_interval(values, torch.zeros(3))


def test_two_networks_on_the_same_queries():
    (good, labels), (bad, _) = spaces(0.8), spaces(1.6, seed=1)
    found = compare(good, bad, labels)
    name = "mean_average_precision_at_r"
    assert found.a == pytest.approx(retrieval_accuracy(good, labels)[name])
    assert found.b == pytest.approx(retrieval_accuracy(bad, labels)[name])
    assert found.difference == pytest.approx(found.a - found.b)
    a, b = (retrieval_values(x, labels)[name] for x in (good, bad))
    shares = ((a > b).double().mean(), (a == b).double().mean(), (a < b).double().mean())
    assert (found.won, found.tied, found.lost) == pytest.approx([share.item() for share in shares])
    assert 0 < found.interval[0] < found.difference < found.interval[1]
    other_way = compare(bad, good, labels)
    assert other_way.difference == pytest.approx(-found.difference) and other_way.won == found.lost


def test_equal_networks_are_tied():
    embeddings, labels = spaces(1.0)
    found = compare(embeddings, 3 * embeddings, labels, "precision_at_1", groups=labels)
    assert (found.difference, found.interval, found.tied) == (0, (0, 0), 1)


def test_both_search_the_teachers_gallery():
    (teacher, labels), (student, _) = spaces(0.8), spaces(1.6, seed=1)
    found = compare(teacher, student, labels, "recall_at_5", gallery_a=teacher)
    assert found.b == pytest.approx(
        retrieval_accuracy(student, labels, teacher, metrics=("recall_at_5",))["recall_at_5"]
    )
    with pytest.raises(ValueError, match="200 and 100 rows"):
        compare(teacher, student[:100], labels)
