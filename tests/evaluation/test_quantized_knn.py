import numpy as np
import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import FaissKNN, InferenceModel

from pml_distill.evaluation import QuantizedKNN


def clustered(size=3000, width=64, queries=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(100, width, generator=generator)
    labels = torch.randint(100, (size + queries,), generator=generator)
    rows = torch.nn.functional.normalize(centers[labels] + 0.6 * torch.randn(len(labels), width, generator=generator))
    return rows[:queries], rows[queries:], labels[:queries], labels[queries:]


def recall(found, query, reference):
    exact = torch.cdist(query.double(), reference.double()).topk(found.shape[1], largest=False).indices
    return float(np.mean([len(set(a.tolist()) & set(b.tolist())) / len(a) for a, b in zip(found, exact)]))


@pytest.mark.parametrize(
    ("bits", "rescore", "rescore_with", "least"),
    [(8, 4, None, 1), (8, 1, "int8", 0.95), (1, 16, None, 0.99), (1, 16, "int8", 0.95), (1, 16, "bits", 0.3)],
)
def test_finds_the_exact_neighbours(bits, rescore, rescore_with, least):
    query, reference, _, _ = clustered()
    distances, indices = QuantizedKNN(bits, rescore, rescore_with)(query, 10, reference)
    assert recall(indices, query, reference) >= least
    assert (distances.diff(dim=1) >= 0).all()
    if rescore_with is None:
        exact = torch.cdist(query, reference).square().gather(1, indices)
        torch.testing.assert_close(distances, exact, atol=1e-5, rtol=1e-4)


def test_more_candidates_find_more():
    query, reference, _, _ = clustered()
    found = [recall(QuantizedKNN(1, r)(query, 10, reference)[1], query, reference) for r in (1, 4, 16)]
    assert found[0] < found[1] < found[2]


def test_values_of_one_sign_have_bits_too():
    query, reference, _, _ = clustered()
    shifted = [rows.relu() + 3 for rows in (query, reference)]
    assert recall(QuantizedKNN(1, 16)(shifted[0], 10, shifted[1])[1], *shifted) > 0.9


@pytest.mark.parametrize(("bits", "rescore_with", "bytes_of_a_row"), [(8, None, 64), (1, "int8", 72), (1, "bits", 8)])
def test_a_kept_database_grows_and_is_saved(bits, rescore_with, bytes_of_a_row, tmp_path):
    query, reference, _, _ = clustered()
    knn = QuantizedKNN(bits, 8, rescore_with)
    knn.calibrate(reference)
    for part in reference.split(700):
        knn.add(part)
    whole = QuantizedKNN(bits, 8, rescore_with)
    whole.train(reference)
    expected = whole(query, 5)
    knn.save(tmp_path / "index.pt")
    other = QuantizedKNN(bits, 8, rescore_with)
    other.load(tmp_path / "index.pt")
    for search in (knn, other):
        assert len(search) == 3000 and search.memory == 3000 * bytes_of_a_row
        assert all(torch.equal(*pair) for pair in zip(search(query, 5), expected))
    other.add(query)
    assert torch.equal(other(query, 1)[1][:, 0], 3000 + torch.arange(40))


@pytest.mark.parametrize("originals", [torch.as_tensor, lambda x: x.numpy().astype("float16")], ids=["tensor", "half"])
def test_originals_on_disk_make_it_exact(originals, tmp_path):
    query, reference, _, _ = clustered()
    knn = QuantizedKNN(1, 16)
    knn.train(reference)
    before = recall(knn(query, 10)[1], query, reference)
    knn.originals = originals(reference)
    assert recall(knn(query, 10)[1], query, reference) > before
    knn.originals = knn.originals[:10]
    with pytest.raises(ValueError, match="originals is 10 rows for a database of 3000 rows"):
        knn(query, 1)


@pytest.mark.parametrize("bits", [8, 1])
def test_pmls_calculator_gets_nearly_the_exact_figures(bits):
    _, reference, _, labels = clustered()
    include = ("precision_at_1", "mean_average_precision_at_r")
    settings = {"include": include, "k": "max_bin_count", "device": torch.device("cpu")}
    exact = AccuracyCalculator(knn_func=FaissKNN(), **settings).get_accuracy(reference, labels)
    found = AccuracyCalculator(knn_func=QuantizedKNN(bits, 8), **settings).get_accuracy(reference, labels)
    assert found == pytest.approx(exact, abs=0.01)


def test_the_query_itself_is_left_out():
    _, reference, _, _ = clustered(300)
    reference[:20] = reference[0]
    for bits in (8, 1):
        _, indices = QuantizedKNN(bits)(reference, 5, reference, ref_includes_query=True)
        assert indices.shape == (300, 5) and (indices != torch.arange(300)[:, None]).all()


def test_serves_pmls_inference_model(tmp_path):
    query, reference, _, _ = clustered()
    search = InferenceModel(torch.nn.Identity(), knn_func=QuantizedKNN(8))
    search.train_knn(reference)
    search.add_to_knn(query)
    search.save_knn_func(tmp_path / "index.pt")
    other = InferenceModel(torch.nn.Identity(), knn_func=QuantizedKNN(8))
    other.load_knn_func(tmp_path / "index.pt")
    assert torch.equal(other.get_nearest_neighbors(query, 1)[1][:, 0], 3000 + torch.arange(40))


def test_wrong_settings_and_input_are_refused(tmp_path):
    for settings in ({"bits": 4}, {"rescore": 0}):
        with pytest.raises(ValueError, match="bits must be 8 or 1 and rescore at least 1"):
            QuantizedKNN(**settings)
    for settings in ({"rescore_with": "bits"}, {"bits": 1, "rescore_with": "half"}):
        with pytest.raises(ValueError, match="rescore_with must be 'float', 'int8'"):
            QuantizedKNN(**settings)
    query, reference, _, _ = clustered(50)
    knn = QuantizedKNN(1, rescore_with="bits")
    with pytest.raises(ValueError, match="of a database of 0 rows; call train first"):
        knn(query, 1)
    with pytest.raises(ValueError, match="no database is kept"):
        knn.save(tmp_path / "index.pt")
    knn.train(reference)
    with pytest.raises(ValueError, match="k = 51 neighbours are wanted of a database of 50 rows"):
        knn(query, 51)
    with pytest.raises(ValueError, match=r"query has shape \(40, 3\), but the database is 64 wide"):
        knn(query[:, :3], 1)
    with pytest.raises(ValueError, match=r"query \(40, 64\) must be finite"):
        knn(query * torch.nan, 1)
    with pytest.raises(ValueError, match=r"reference \(50, 64\) must be finite"):
        knn.add(reference * torch.inf)
    knn.save(tmp_path / "index.pt")
    for bits, message in ((8, "was saved with bits=1, but this search has bits=8"), (1, "has bits alone")):
        other = QuantizedKNN(bits)
        with pytest.raises(ValueError, match=message):
            other.load(tmp_path / "index.pt")
            other(query, 1)
    torch.save({"weight": 0}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt must be a file of QuantizedKNN.save"):
        QuantizedKNN().load(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="originals is None"):
        other = QuantizedKNN(8, rescore_with="float")
        other.train(reference)
        other(query, 1)
