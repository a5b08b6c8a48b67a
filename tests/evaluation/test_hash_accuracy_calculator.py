from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pytorch_metric_learning.utils.inference import FaissKNN

from pml_distill.evaluation import HashAccuracyCalculator, pack_codes

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "calc_top_map.npz")
CPU = torch.device("cpu")
MAP = ("mean_average_precision",)


def calculator(**kwargs):
    return HashAccuracyCalculator(device=CPU, **kwargs)


def problem(queries=20, size=200, bits=8, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(queries + size, bits, generator=generator).sign()
    labels = torch.randint(classes, (queries + size,), generator=generator)
    return codes[:queries], labels[:queries], codes[queries:], labels[queries:]


def golden(case):
    """Codes, labels and the length of the ranking; published code drops the last item of the whole ranking."""
    names, k = ("qB", "qL", "rB", "rL"), int(GOLDEN[f"{case}_hp_topk"])
    query, labels, reference, reference_labels = (torch.from_numpy(GOLDEN[f"{case}_{n}"]).float() for n in names)
    return (query, labels, reference, reference_labels), len(reference) - 1 if k == -1 else k


@pytest.mark.parametrize("case", ["c00", "c02", "c04", "c06"])
def test_equals_the_published_code(case):
    arguments, k = golden(case)
    value = calculator(k=k, ties="stable", include=MAP).get_accuracy(*arguments)
    assert value[MAP[0]] == pytest.approx(GOLDEN[f"{case}_map_stable"].item(), rel=1e-9)


@pytest.mark.parametrize("case", ["c00", "c02", "c04", "c06"])
@pytest.mark.parametrize("first", ["best", "worst"])
def test_equals_the_published_code_with_relevant_items_first_or_last(case, first):
    (query, labels, reference, reference_labels), k = golden(case)
    counter, values = calculator(k=k, ties="stable", include=MAP), []
    for code, label in zip(query, labels):
        relevant = (reference_labels * label).any(dim=1) if label.ndim else reference_labels == label
        order = relevant.int().argsort(descending=first == "best", stable=True)
        arguments = code[None], label[None], reference[order], reference_labels[order]
        values.append(counter.get_accuracy(*arguments)[MAP[0]])
    assert np.mean(values) == pytest.approx(GOLDEN[f"{case}_map_ties_{first}"].item(), rel=1e-9)


@pytest.mark.parametrize("case", ["c00", "c02"])
@pytest.mark.parametrize("ties", ["best", "worst"])
def test_the_bounds_equal_the_published_code_where_no_tie_is_cut(case, ties):
    names = ("qB", "qL", "rB", "rL")
    query, labels, reference, reference_labels = (torch.from_numpy(GOLDEN[f"{case}_{n}"]).float() for n in names)
    k = len(reference) - 1 if int(GOLDEN[f"{case}_hp_topk"]) == -1 else len(reference)
    value = calculator(k=k, ties=ties, include=MAP).get_accuracy(query, labels, reference, reference_labels)
    assert value[MAP[0]] == pytest.approx(GOLDEN[f"{case}_map_ties_{ties}"].item(), rel=1e-9)


def all_orders(groups, k):
    """Average precision, and the number of relevant items, within k of every order of tied groups."""
    from itertools import permutations, product

    averages, counts = [], []
    for order in product(*(set(permutations(group)) for group in groups)):
        found = np.array(sum(order, ()))[:k]
        hits = found.cumsum()
        averages.append((found * hits / np.arange(1, len(found) + 1)).sum() / max(hits[-1], 1))
        counts.append(hits[-1])
    return averages, counts


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 9, None])
def test_best_and_worst_are_the_bounds_over_all_orders(k):
    generator = np.random.RandomState(0)
    cases = [[[1], [0], [1, 0]]] + [[list(generator.randint(2, size=s)) for s in (2, 4, 3)] for _ in range(12)]
    for groups in cases:
        flat = sum(groups, [])
        # Group g is at distance g from the query of ones.
        codes = torch.tensor([[-1.0] * g + [1] * (4 - g) for g, group in enumerate(groups) for _ in group])
        labels = torch.tensor([1 - r for r in flat])
        averages, counts = all_orders([tuple(group) for group in groups], k or len(flat))
        for ties, bound in (("best", max), ("worst", min)):
            values = calculator(k=k, ties=ties, include=("mean_average_precision", "recall_at_k")).get_accuracy(
                torch.ones(1, 4), torch.tensor([0]), codes, labels
            )
            assert values[MAP[0]] == pytest.approx(bound(averages)), (groups, ties)
            assert values["recall_at_k"] == pytest.approx(bound(counts) / max(sum(flat), 1)), (groups, ties)


def shuffled_average_precision(distances, relevant, k, times, seed=0):
    """Mean and standard error over random orders of the tied items, by sorting."""
    random = np.random.RandomState(seed)
    places, values = np.arange(1, k + 1), []
    for _ in range(times):
        order = np.lexsort((random.rand(*distances.shape), distances), axis=1)[:, :k]
        found = np.take_along_axis(relevant, order, axis=1)
        hits = found.cumsum(axis=1)
        values.append(((found * hits / places).sum(axis=1) / np.maximum(hits[:, -1], 1)).mean())
    return np.mean(values), np.std(values, ddof=1) / times**0.5


@pytest.mark.parametrize("k", [None, 1, 7, 30])
def test_expectation_is_the_mean_over_random_tie_orders(k):
    query, labels, reference, reference_labels = problem(5, 60, 6, 3)
    distances = ((6 - query @ reference.T) / 2).numpy()
    relevant = (labels[:, None] == reference_labels).numpy()
    mean, error = shuffled_average_precision(distances, relevant, k or 60, 10_000)
    values = {
        ties: calculator(k=k, ties=ties, include=MAP).get_accuracy(query, labels, reference, reference_labels)[MAP[0]]
        for ties in ("expected", "best", "worst")
    }
    assert values["worst"] <= values["expected"] <= values["best"]
    assert abs(values["expected"] - mean) < 3 * error


@pytest.mark.parametrize("k", [1, 5, 11, 12])
def test_expectation_is_exact(k):
    """All orders of a small database, whose codes are all tied in two groups."""
    from itertools import permutations

    groups = [[1, 0, 1, 0], [1, 1, 0]]
    reference = torch.tensor([[1.0, 1, 1]] * 4 + [[1.0, 1, -1]] * 3)
    labels = torch.tensor([1 - r for group in groups for r in group])
    k, values = min(k, 7), []
    for first in permutations(groups[0]):
        for second in permutations(groups[1]):
            found = np.array(first + second)[:k]
            hits = found.cumsum()
            values.append((found * hits / np.arange(1, k + 1)).sum() / max(hits[-1], 1))
    value = calculator(k=k, include=MAP).get_accuracy(torch.ones(1, 3), torch.tensor([0]), reference, labels)
    assert value[MAP[0]] == pytest.approx(np.mean(values), rel=1e-12)


@pytest.mark.parametrize("ties", ["expected", "stable", "best", "worst"])
def test_without_ties_all_rules_agree_with_sklearn(ties):
    from sklearn.metrics import average_precision_score

    reference = 2.0 * torch.tril(torch.ones(32, 32)) - 1
    labels = torch.randint(2, (32,), generator=torch.Generator().manual_seed(0))
    value = calculator(ties=ties, include=MAP).get_accuracy(torch.ones(1, 32), torch.tensor([1]), reference, labels)
    assert value[MAP[0]] == pytest.approx(average_precision_score(labels, torch.arange(32)), rel=1e-12)


@pytest.mark.parametrize("ties", ["expected", "stable"])
def test_other_metrics(ties):
    query, labels = torch.ones(2, 4), torch.tensor([0, 7])
    reference = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, -1], [-1, -1, -1, -1]])
    values = calculator(k=2, ties=ties).get_accuracy(query, labels, reference, torch.tensor([0, 1, 0, 0]))
    assert values == pytest.approx(
        {
            "mean_average_precision": 0.5,
            "precision_within_radius": 1 / 3,
            "precision_at_k": 1 / 4,
            "recall_at_k": 1 / 6,
        }
    )


def test_the_radius_is_counted_in_bits():
    codes = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, -1], [-1, -1, -1, -1]])
    for radius, precision in ((0, 1), (1, 1 / 2), (2, 2 / 3), (4, 3 / 4)):
        counter = calculator(radius=radius, include=("precision_within_radius",))
        values = counter.get_accuracy(codes[:1], torch.tensor([0]), codes, torch.tensor([0, 1, 0, 0]))
        assert values["precision_within_radius"] == pytest.approx(precision)


def test_nothing_within_the_radius_counts_zero():
    values = calculator().get_accuracy(torch.ones(1, 8), torch.tensor([0]), -torch.ones(3, 8), torch.tensor([0, 0, 1]))
    assert values["precision_within_radius"] == 0


@pytest.mark.parametrize("ties", ["expected", "stable"])
def test_the_query_itself_is_left_out(ties):
    codes, labels, _, _ = problem(30)
    values = calculator(ties=ties).get_accuracy(codes, labels)
    each = []
    for i in range(30):
        others = torch.arange(30) != i
        each.append(calculator(ties=ties).get_accuracy(codes[[i]], labels[[i]], codes[others], labels[others]))
    for name, value in values.items():
        assert value == pytest.approx(np.mean([e[name] for e in each]), rel=1e-6)


def everything(students, labels, gallery, own, **settings):
    """Values of our metrics and of two of PML's."""
    include = ("mean_average_precision", "precision_within_radius", "precision_at_k", "recall_at_k", "r_precision")
    return calculator(include=include, **settings).get_accuracy(students, labels, gallery, labels, own)


@pytest.mark.parametrize("ties", ["expected", "stable", "best", "worst"])
@pytest.mark.parametrize("k", [None, 5])
def test_a_students_query_does_not_find_its_own_row_of_the_teachers_gallery(ties, k):
    generator = torch.Generator().manual_seed(0)
    gallery, labels = torch.randn(50, 64, generator=generator), torch.arange(50) // 5
    students = gallery + 1.5 * torch.randn(50, 64, generator=generator)
    found = everything(students, labels, gallery, True, ties=ties, k=k, radius=26)
    each = []
    for i in range(50):
        others = torch.arange(50) != i
        one = calculator(ties=ties, k=k, radius=26, include=tuple(found)).get_accuracy(
            students[[i]], labels[[i]], gallery[others], labels[others]
        )
        each.append(one)
    for name in found:
        # Ties at the last place are broken in an order of the search for PML's metrics.
        tolerance = 0.02 if name == "r_precision" else 1e-9
        assert found[name] == pytest.approx(np.mean([e[name] for e in each]), abs=tolerance), name
    assert found["mean_average_precision"] < everything(students, labels, gallery, False)["mean_average_precision"]


def test_own_rows_have_their_querys_label():
    with pytest.raises(ValueError, match="query i is item i, but .* their labels differ"):
        calculator().get_accuracy(torch.ones(2, 8), torch.tensor([0, 1]), torch.ones(3, 8), torch.zeros(3), True)


PML = ("precision_at_1", "r_precision", "mean_average_precision_at_r", "mean_reciprocal_rank")
OURS = (*MAP, "mean_average_precision_within_radius", "precision_within_radius", "precision_at_k", "recall_at_k")


@pytest.mark.parametrize("k", [None, 7, 1000, "max_bin_count"])
def test_any_metrics_go_together(k):
    problem_ = problem(bits=64)
    alone = {}
    for name in OURS if k != "max_bin_count" else ():
        alone |= calculator(k=k, include=(name,)).get_accuracy(*problem_)
    for name in PML:
        alone |= calculator(k=k, include=(name,)).get_accuracy(*problem_)
    for ours in OURS:
        for pmls in PML:
            found = calculator(k=k, include=(ours, pmls)).get_accuracy(*problem_)
            assert set(found) == {ours, pmls}
            for name, value in found.items():
                assert value == pytest.approx(alone.get(name, value)), (ours, pmls)
    found = calculator(k=k, include=(*OURS, *PML)).get_accuracy(*problem_)
    assert found == pytest.approx({name: alone.get(name, found[name]) for name in found})
    # What is left out may be of either kind.
    calculator(k=k, include=(*OURS, *PML)).get_accuracy(*problem_, exclude=OURS)


def test_pmls_usual_k_serves_its_metrics_and_ours_rank_everything():
    problem_ = problem(bits=64)
    include = ("mean_average_precision", "mean_average_precision_at_r")
    usual = calculator(include=include, k="max_bin_count").get_accuracy(*problem_)
    assert usual == pytest.approx(calculator(include=include).get_accuracy(*problem_))
    codes, labels = problem_[2:]
    assert calculator(include=include[1:], k="max_bin_count").get_accuracy(codes, labels)[include[1]] > 0


def shares(labels, others):
    return (labels * others).any(-1)


@pytest.mark.parametrize("k", [None, "max_bin_count"])
def test_labels_of_two_dimensions_with_a_comparison(k):
    codes = torch.randn(60, 64, generator=torch.Generator().manual_seed(0))
    labels = (torch.rand(60, 5, generator=torch.Generator().manual_seed(1)) < 0.3).long()
    include = ("mean_average_precision", "r_precision", "mean_average_precision_at_r")
    found = calculator(include=include, k=k, label_comparison_fn=shares).get_accuracy(codes, labels)
    assert found["mean_average_precision"] == pytest.approx(
        calculator(include=MAP).get_accuracy(codes, labels)["mean_average_precision"]
    )
    hits = []
    distances = ((64 - codes.sign() @ codes.sign().T) / 2).fill_diagonal_(99)
    for i in range(60):
        relevant = shares(labels[i], labels)
        relevant[i] = False
        if relevant.any():
            hits.append(relevant[distances[i].argsort()[: relevant.sum()]].double().mean().item())
    assert found["r_precision"] == pytest.approx(np.mean(hits), abs=0.02)


def test_a_comparison_decides_for_all_metrics():
    query, labels, reference, reference_labels = problem(bits=64)
    near = calculator(include=("mean_average_precision", "precision_at_1"), label_comparison_fn=lambda x, y: x != y)
    others = calculator(include=MAP)
    found = near.get_accuracy(query, labels, reference, reference_labels)
    # Of two classes those of the other one are relevant.
    for kept in (0, 1):
        rows, items = labels == kept, reference_labels < 2
        expected = others.get_accuracy(query[rows], 1 - labels[rows], reference[items], reference_labels[items])
        got = near.get_accuracy(query[rows], labels[rows], reference[items], reference_labels[items])
        assert got[MAP[0]] == pytest.approx(expected[MAP[0]])
    assert set(found) == {"mean_average_precision", "precision_at_1"}


@pytest.mark.parametrize("ties", ["expected", "stable", "best", "worst"])
@pytest.mark.parametrize("bits", [64, 13])
@pytest.mark.parametrize("kind", ["tensor", "memmap"])
def test_a_packed_database_gives_the_same(ties, bits, kind, tmp_path, monkeypatch):
    # Several blocks, the last one shorter.
    monkeypatch.setattr("pml_distill.evaluation.hamming_ranking.BLOCK", 77)
    query, labels, reference, reference_labels = problem(bits=bits)
    packed = pack_codes(reference)
    if kind == "memmap":
        np.save(tmp_path / "codes.npy", packed.numpy())
        packed = np.load(tmp_path / "codes.npy", mmap_mode="r")
    include = (*OURS, "r_precision")
    expected = calculator(ties=ties, include=include, radius=bits // 3).get_accuracy(
        query, labels, reference, reference_labels
    )
    found = calculator(ties=ties, include=include, radius=bits // 3).get_accuracy(
        query, labels, packed, reference_labels
    )
    assert found == expected
    own = calculator(ties=ties, include=include).get_accuracy(
        reference[:30], reference_labels[:30], packed, reference_labels, True
    )
    assert own == calculator(ties=ties, include=include).get_accuracy(
        reference[:30], reference_labels[:30], reference, reference_labels, True
    )


def test_codes_packed_in_another_order_are_refused_where_it_shows():
    query, labels, reference, reference_labels = problem(bits=13)
    packed = np.packbits(reference.numpy() > 0, axis=1)
    with pytest.raises(ValueError, match='must be packed codes of 13 bits, lowest bit first.*bitorder="little"'):
        calculator().get_accuracy(query, labels, packed, reference_labels)


@pytest.mark.parametrize("ties", ["expected", "stable", "best", "worst"])
def test_average_precision_within_the_radius_is_that_of_a_cut_database(ties):
    query, labels, reference, reference_labels = problem(bits=16)
    near = (16 - query @ reference.T) / 2 <= 5
    expected = []
    for i in range(len(query)):
        if near[i].any():
            arguments = query[[i]], labels[[i]], reference[near[i]], reference_labels[near[i]]
            expected.append(calculator(ties=ties, include=MAP).get_accuracy(*arguments)[MAP[0]])
        else:
            expected.append(0.0)
    name = "mean_average_precision_within_radius"
    counter = calculator(ties=ties, include=(name,), radius=5)
    assert counter.get_accuracy(query, labels, reference, reference_labels)[name] == pytest.approx(np.mean(expected))
    assert counter.by_query(query, labels, reference, reference_labels)[name].tolist() == pytest.approx(expected)


def test_unlabelled_items_are_neither_queries_nor_in_the_database():
    query, labels, reference, reference_labels = problem(bits=64)
    some, some_items = labels.clone(), reference_labels.clone()
    some[::3], some_items[::4] = -1, -1
    kept, kept_items = some >= 0, some_items >= 0
    include = (*OURS, "r_precision")
    expected = calculator(include=include).get_accuracy(
        query[kept], some[kept], reference[kept_items], some_items[kept_items]
    )
    assert calculator(include=include).get_accuracy(query, some, reference, some_items) == expected
    assert calculator(include=include).get_accuracy(query, some, pack_codes(reference), some_items) == expected
    counted = calculator(include=include, ignore_label=None).get_accuracy(query, some, reference, some_items)
    assert counted != expected
    own = calculator(include=include).get_accuracy(reference, some_items)
    assert own == calculator(include=include).get_accuracy(reference[kept_items], some_items[kept_items])


def test_large_labels_are_told_apart():
    labels = torch.tensor([2**24 + 1, 2**24])
    values = calculator(include=MAP).get_accuracy(torch.ones(1, 8), labels[:1], torch.ones(2, 8), labels)
    assert values[MAP[0]] == pytest.approx((1 + 1 / 2) / 2)


def test_multi_hot_relevance_is_a_shared_label():
    query, reference = torch.ones(1, 8), torch.ones(3, 8)
    labels = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]])
    values = calculator(include=("precision_at_k",)).get_accuracy(query, labels[:1], reference, labels[1:])
    assert values["precision_at_k"] == pytest.approx(1 / 3)


def test_metrics_of_pml_use_the_hamming_search():
    query, labels, reference, reference_labels = problem()
    names = ("precision_at_1", "r_precision")

    def values(query, reference, **kwargs):
        return calculator(include=names, **kwargs).get_accuracy(query, labels, reference, reference_labels)

    usual, codes = values(query, reference, knn_func=FaissKNN()), values(query, reference)
    assert set(codes) == set(names)
    # Both break ties in some order of their own.
    assert codes["r_precision"] == pytest.approx(usual["r_precision"], abs=0.05)
    # Only signs count.
    longer = [
        part * (torch.rand(part.shape, generator=torch.Generator().manual_seed(0)) + 0.1) for part in (query, reference)
    ]
    assert values(*longer) == codes


def test_precision_recall_curve_and_plot(tmp_path, monkeypatch):
    query, labels, reference, reference_labels = problem(bits=16)
    precision, recall = calculator().precision_recall_curve(query, labels, reference, reference_labels)
    assert precision.shape == recall.shape == (17,)
    assert recall[-1] == 1 and (recall.diff() >= 0).all()
    assert precision[-1] == pytest.approx((labels[:, None] == reference_labels).float().mean().item())
    distances, relevant = (16 - query @ reference.t()) / 2, labels[:, None] == reference_labels
    for radius in range(17):
        near = distances <= radius
        found, hits = near.sum(dim=1), (near & relevant).sum(dim=1)
        assert precision[radius].item() == pytest.approx((hits / found).nanmean().item(), nan_ok=True)
        assert recall[radius].item() == pytest.approx((hits / relevant.sum(dim=1)).mean().item())
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kw: drawn.append(figure) or save(figure, path, **kw))
    HashAccuracyCalculator.plot_precision_recall(tmp_path / "curve.png", {"random": (precision, recall)})
    assert (tmp_path / "curve.png").stat().st_size > 1000
    (line,) = drawn[0].axes[0].lines
    assert line.get_label() == "random" and np.array_equal(line.get_ydata(), precision, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_labels": torch.zeros(3)}, "query_labels must have one entry for each of 2 rows, but has 3"),
        ({"reference_labels": torch.zeros(3)}, "reference_labels must have one entry for each of 5 rows, but has 3"),
        ({"reference": torch.zeros(5, 16)}, r"\(2, 8\).*\(5, 16\).*same number of bits"),
        ({"reference": torch.zeros(0, 8), "reference_labels": torch.zeros(0)}, r"\(0, 8\) must not be empty"),
        ({"query_labels": torch.zeros(2, 3)}, r"same number of columns, but have shapes \(2, 3\) and \(5,\)"),
        ({"query_labels": 2 * torch.ones(2, 3)}, "query_labels must be 0 or 1 if multi-hot, but go from 2.0 to 2.0"),
        ({"reference": torch.full((5, 8), torch.nan)}, r"reference \(5, 8\) must be finite"),
        ({"reference_labels": None}, "reference is given, but reference_labels is None"),
        (
            {"query": torch.ones(6, 8), "query_labels": torch.zeros(6), "ref_includes_query": True},
            r"query i is item i, but of query \(6, 8\) and reference \(5, 8\) the query has more rows",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {
        "query": torch.ones(2, 8),
        "query_labels": torch.zeros(2),
        "reference": torch.ones(5, 8),
        "reference_labels": torch.zeros(5),
    }
    with pytest.raises(ValueError, match=message):
        calculator().get_accuracy(**(arguments | changes))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="ties must be one of .*'random'"):
        calculator(ties="random")
    with pytest.raises(ValueError, match="k must be an integer greater than 0, or None, or 'max_bin_count'"):
        calculator(k=0)
    with pytest.raises(ValueError, match="radius must be a whole number, not negative, but is 1.5"):
        calculator(radius=1.5)
    with pytest.raises(ValueError, match="return_per_class is for PML's metrics alone"):
        calculator(return_per_class=True)
    calculator(return_per_class=True, include=("precision_at_1",))
    with pytest.raises(
        ValueError, match=r"precision_at_1 need one class label .* \(4, 3\); .* mean_average_precision,"
    ):
        calculator(include=("precision_at_1",)).get_accuracy(torch.randn(4, 8), torch.eye(4)[:, :3])


def test_packed_codes_are_refused():
    with pytest.raises(ValueError, match="query must be outputs or codes .* but is uint8"):
        calculator().get_accuracy(torch.zeros(4, 2, dtype=torch.uint8), torch.arange(4))


def test_serves_in_inference_mode():
    arguments = problem()
    with torch.inference_mode():
        values = calculator().get_accuracy(*arguments)
    assert values == calculator().get_accuracy(*arguments)
