import numpy as np
import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.metrics import average_precision_score

from pml_distill.evaluation import accuracy_by_width, asymmetric_accuracy, reid_accuracy, retrieval_accuracy
from pml_distill.evaluation import retrieval_values as values_of

METRICS = (
    "precision_at_1",
    "precision_at_5",
    "recall_at_1",
    "recall_at_5",
    "r_precision",
    "mean_average_precision_at_r",
    "mean_average_precision",
    "mean_reciprocal_rank",
)


def data(size=60, classes=9, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (size,), generator=generator)
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    return centers[labels] + torch.randn(size, width, generator=generator), labels


def by_hand(query, label, gallery, labels):
    """All metrics of one query by a loop over the items that it finds."""
    cosines = torch.nn.functional.cosine_similarity(query[None], gallery)
    hits = [bool(labels[j] == label) for j in cosines.argsort(descending=True)]
    relevant = sum(hits)
    precisions = [sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit]
    return {
        "precision_at_1": float(hits[0]),
        "precision_at_5": sum(hits[:5]) / 5,
        "recall_at_1": float(hits[0]),
        "recall_at_5": float(any(hits[:5])),
        "r_precision": sum(hits[:relevant]) / max(relevant, 1),
        "mean_average_precision_at_r": sum(precisions[: sum(hits[:relevant])]) / max(relevant, 1),
        "mean_average_precision": sum(precisions) / max(relevant, 1),
        "mean_reciprocal_rank": 1 / (hits.index(True) + 1) if relevant else 0.0,
    }


@pytest.mark.parametrize("batch_size", [None, 7])
def test_each_query_equals_a_loop_by_hand_without_its_own_row(batch_size):
    embeddings, labels = data()
    labels[-1] = 100  # alone in its class
    found = values_of(embeddings, labels, metrics=METRICS, batch_size=batch_size)
    for i in range(60):
        others = torch.arange(60) != i
        expected = by_hand(embeddings[i], labels[i], embeddings[others], labels[others])
        for name in METRICS:
            if i == 59:
                assert found[name][i].isnan()
            else:
                assert found[name][i].item() == pytest.approx(expected[name]), name


def test_means_equal_pmls_calculator_in_a_gallery_of_other_items():
    (query, labels), (gallery, gallery_labels) = data(20), data(80, seed=1)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r", "mean_average_precision")
    calculator = AccuracyCalculator(include=names, device=torch.device("cpu"))
    normalize = torch.nn.functional.normalize
    expected = calculator.get_accuracy(normalize(query), labels, normalize(gallery), gallery_labels)
    assert retrieval_accuracy(query, labels, gallery, gallery_labels, names) == pytest.approx(expected)


def test_the_average_precision_is_that_of_sklearn():
    (query, labels), (gallery, gallery_labels) = data(20), data(80, seed=1)
    cosines = torch.nn.functional.cosine_similarity(query[:, None], gallery[None], dim=2)
    expected = np.mean([average_precision_score(gallery_labels == labels[i], cosines[i]) for i in range(20)])
    found = retrieval_accuracy(query, labels, gallery, gallery_labels, ("mean_average_precision",))
    assert found["mean_average_precision"] == pytest.approx(expected)


def test_a_gallery_without_labels_holds_the_same_items():
    student, labels = data()
    teacher = student + torch.randn(student.shape, generator=torch.Generator().manual_seed(1))
    names = ("mean_average_precision_at_r", "precision_at_1")
    assert retrieval_accuracy(student, labels, teacher, metrics=names) == asymmetric_accuracy(student, teacher, labels)
    told = retrieval_accuracy(student, labels, teacher, labels, names, ref_includes_query=True)
    assert told == retrieval_accuracy(student, labels, teacher, metrics=names)
    assert retrieval_accuracy(student, labels, student, labels, ("precision_at_1",))["precision_at_1"] == 1


def test_queries_without_relevant_items_are_skipped_or_counted_zero():
    embeddings, labels = data()
    labels = torch.cat([100 + torch.arange(30), torch.arange(30) // 3])
    skipped = retrieval_accuracy(embeddings, labels, metrics=METRICS)
    counted = retrieval_accuracy(embeddings, labels, metrics=METRICS, lone_queries="zero")
    for name in METRICS:
        assert counted[name] == pytest.approx(skipped[name] / 2)


def test_unlabelled_items_are_neither_queries_nor_in_the_gallery():
    embeddings, labels = data()
    unlabelled = torch.arange(60) % 3 == 0
    some = labels.where(~unlabelled, -1)
    expected = retrieval_accuracy(embeddings[~unlabelled], labels[~unlabelled], metrics=METRICS)
    assert retrieval_accuracy(embeddings, some, metrics=METRICS) == pytest.approx(expected)
    assert values_of(embeddings, some)["precision_at_1"].isnan().equal(unlabelled)
    assert not values_of(embeddings, some, ignore_label=None)["precision_at_1"].isnan().any()


def test_multi_hot_labels_are_relevant_where_they_share_one():
    embeddings, labels = data()
    multi_hot = torch.nn.functional.one_hot(labels)
    assert retrieval_accuracy(embeddings, multi_hot, metrics=METRICS) == pytest.approx(
        retrieval_accuracy(embeddings, labels, metrics=METRICS)
    )


def test_labels_of_one_column_are_classes():
    embeddings, labels = data()
    assert retrieval_accuracy(embeddings, labels[:, None]) == retrieval_accuracy(embeddings, labels)
    with pytest.raises(ValueError, match="labels must be 0 or 1 if multi-hot, but go from 0 to 8"):
        retrieval_accuracy(embeddings, labels[:, None].repeat(1, 2))


def test_a_gallery_shorter_than_k_is_searched_whole():
    found = retrieval_accuracy(torch.eye(4), torch.arange(4) // 2, metrics=("recall_at_10", "precision_at_10"))
    assert found == {"recall_at_10": 1.0, "precision_at_10": pytest.approx(0.1)}


def loop_of_a_reid_evaluation(cosines, people, cameras, gallery_people, gallery_cameras):
    """CMC and mAP as the usual evaluation of Market-1501 does: sort, remove, count."""
    curves, averages = [], []
    for i in range(len(people)):
        order = cosines[i].argsort(descending=True)
        junk = (gallery_people[order] == people[i]) & (gallery_cameras[order] == cameras[i])
        kept = order[~junk & (gallery_people[order] != -1)]
        matches = (gallery_people[kept] == people[i]).double()
        if matches.any():
            curves.append(matches.cumsum(0).clamp(max=1))
            averages.append((matches * matches.cumsum(0) / torch.arange(1, len(kept) + 1)).sum() / matches.sum())
    cmc = [float(np.mean([curve[rank - 1].item() for curve in curves])) for rank in (1, 5, 10)]
    return [*cmc, float(np.mean(averages))]


def test_reid_leaves_out_the_same_person_before_the_same_camera():
    (query, people), (gallery, gallery_people) = data(30, 12), data(100, 12, seed=1)
    generator = torch.Generator().manual_seed(2)
    cameras, gallery_cameras = (torch.randint(3, (n,), generator=generator) for n in (30, 100))
    gallery_people[:10] = -1  # junk
    people[0] = 50  # not in the gallery
    cosines = torch.nn.functional.cosine_similarity(query[:, None], gallery[None], dim=2)
    expected = loop_of_a_reid_evaluation(cosines, people, cameras, gallery_people, gallery_cameras)
    found = reid_accuracy(query, people, cameras, gallery, gallery_people, gallery_cameras)
    assert list(found) == ["cmc_1", "cmc_5", "cmc_10", "mean_average_precision"]
    assert list(found.values()) == pytest.approx(expected)


def test_reid_of_a_fixture_made_by_hand():
    # One query of person 1, camera 1. Ranking: own camera (out), wrong, right, distractor, right, junk (out).
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    gallery = torch.stack([angles.cos(), angles.sin()], dim=1)
    people, cameras = torch.tensor([1, 2, 1, 0, 1, -1]), torch.tensor([1, 1, 2, 3, 2, 1])
    found = reid_accuracy(
        torch.tensor([[1.0, 0.0]]), torch.tensor([1]), torch.tensor([1]), gallery, people, cameras, ranks=(1, 2, 3)
    )
    assert found == {"cmc_1": 0, "cmc_2": 1, "cmc_3": 1, "mean_average_precision": pytest.approx((1 / 2 + 2 / 4) / 2)}


def test_widths_equal_embeddings_that_were_cut():
    embeddings, labels = data()
    found = accuracy_by_width(embeddings, labels, (2, 8), metrics=METRICS)
    assert found == {w: retrieval_accuracy(embeddings[:, :w], labels, metrics=METRICS) for w in (2, 8)}
    teacher = data(seed=1)[0]
    across = accuracy_by_width(embeddings, labels, (3,), teacher)
    assert across[3] == retrieval_accuracy(embeddings[:, :3], labels, teacher[:, :3])
    for widths in ((0, 4), (9,), ()):
        with pytest.raises(ValueError, match="widths must be from 1 to 8"):
            accuracy_by_width(embeddings, labels, widths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": torch.full((6, 4), torch.nan)}, r"queries \(6, 4\) must be finite"),
        ({"gallery": torch.full((6, 4), torch.inf)}, r"gallery \(6, 4\) must be finite"),
        ({"gallery": torch.zeros(6, 3)}, r"\(6, 4\) and \(6, 3\); where widths differ, project"),
        ({"gallery": torch.zeros(5, 4)}, "5 rows for 6 queries.*give gallery_labels"),
        ({"labels": torch.zeros(5)}, "labels must have one entry for each of 6 rows, but has 5"),
        ({"cameras": torch.zeros(5), "gallery_cameras": torch.zeros(6)}, "cameras must have one entry"),
        ({"cameras": torch.zeros(6), "gallery": torch.zeros(7, 4), "gallery_labels": torch.zeros(7)}, "both be given"),
        ({"gallery_labels": torch.zeros(6, 2)}, r"labels and gallery_labels must both be classes.*\(6,\) and \(6, 2\)"),
        ({"metrics": ("precision_at_0",)}, "metrics has 'precision_at_0', but can have precision_at_K"),
        ({"lone_queries": "drop"}, "lone_queries must be 'skip' or 'zero', but is 'drop'"),
        ({"labels": torch.arange(6)}, "No query has a relevant item"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {"queries": torch.ones(6, 4), "labels": torch.zeros(6)}
    with pytest.raises(ValueError, match=message):
        retrieval_accuracy(**(arguments | changes))
