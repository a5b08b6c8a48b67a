import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.utils.inference import InferenceModel

from pml_distill.distances import HammingDistance, pack_codes, unpack_codes
from pml_distill.evaluation import HammingKNN
from pml_distill.evaluation.hamming_knn import search_on_gpu


def codes(size, bits, seed=0):
    return torch.randn(size, bits, generator=torch.Generator().manual_seed(seed)).sign()


@pytest.mark.parametrize("bits", [8, 13, 48, 64, 100, 512])
def test_packing_is_reversible(bits):
    assert torch.equal(unpack_codes(pack_codes(codes(10, bits)), bits), codes(10, bits))
    assert pack_codes(codes(10, bits)).shape == (10, -(-bits // 8))


@pytest.mark.parametrize("bits", [8, 64, 512])
def test_the_order_of_bits_is_faisss_and_numpys_little(bits):
    import faiss

    outputs = torch.randn(10, bits)
    theirs = np.zeros((10, bits // 8), dtype="uint8")
    faiss.real_to_binary(outputs.numel(), faiss.swig_ptr(outputs.numpy()), faiss.swig_ptr(theirs))
    assert np.array_equal(pack_codes(outputs).numpy(), theirs)
    assert np.array_equal(np.packbits(outputs.numpy() > 0, axis=1, bitorder="little"), theirs)


@pytest.mark.parametrize("bits", [13, 64])
def test_a_packed_database_is_searched_as_it_is(bits):
    query, reference = codes(20, bits), codes(300, bits, seed=1)
    expected = HammingKNN()(query, 5, reference)
    for packed in (pack_codes(reference), pack_codes(reference).numpy()):
        found = HammingKNN()(query, 5, packed)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_codes_packed_in_another_order_are_refused_where_it_shows():
    packed = np.packbits(codes(300, 13).numpy() > 0, axis=1)
    with pytest.raises(ValueError, match="must be packed codes of 13 bits, lowest bit first"):
        HammingKNN()(codes(5, 13), 1, packed)


@pytest.mark.parametrize("bits", [8, 13, 48, 64, 100])
@pytest.mark.parametrize("search", ["faiss", "torch"])
def test_search_is_exact(bits, search, monkeypatch):
    if search == "torch":
        # The way of a GPU, on the CPU.
        monkeypatch.setattr("pml_distill.evaluation.hamming_knn.search_on_cpu", search_on_gpu)
    query, reference = codes(20, bits), codes(300, bits, seed=1)
    distances, indices = HammingKNN()(3 * query, 10, reference)
    exact = (bits - query @ reference.T) / 2
    assert torch.equal(distances, exact.sort(dim=1).values[:, :10])
    assert torch.equal(distances, exact.gather(1, indices))


def test_the_query_itself_is_left_out():
    reference = codes(50, 8)
    reference[:3] = reference[0]
    distances, indices = HammingKNN()(reference, 5, reference, ref_includes_query=True)
    exact = ((8 - reference @ reference.T) / 2).fill_diagonal_(100)
    assert torch.equal(distances, exact.sort(dim=1).values[:, :5])
    assert (indices != torch.arange(50)[:, None]).all()


def test_a_kept_database_grows():
    knn, reference = HammingKNN(), codes(60, 32)
    knn.train(reference[:40])
    knn.add(reference[40:])
    distances, _ = knn(reference[:5], 3)
    assert torch.equal(distances, HammingKNN()(reference[:5], 3, reference)[0])


def test_adding_does_not_copy_what_is_there():
    knn, reference = HammingKNN(), codes(400, 64)
    places = []
    for part in reference.split(100):
        knn.add(part)
        places.append(knn.parts[0].data_ptr())
    assert len(set(places)) == 1
    assert torch.equal(knn(reference[:5], 3)[0], HammingKNN()(reference[:5], 3, reference)[0])
    knn.add(reference[:5])
    assert torch.equal(knn(reference[:5], 2)[0], torch.zeros(5, 2))


def test_files_of_the_former_order_are_converted(tmp_path):
    reference = codes(60, 12)
    database = torch.from_numpy(np.packbits(reference.numpy() > 0, axis=1))
    torch.save({"database": database, "bits": 12}, tmp_path / "former.pth")
    knn = HammingKNN()
    knn.load(tmp_path / "former.pth")
    assert torch.equal(knn.database, pack_codes(reference))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda knn: knn(codes(2, 16), 1), r"\(2, 16\), but the database was built with 32 bits"),
        (lambda knn: knn.add(codes(2, 16)), r"\(2, 16\), but the database was built with 32 bits"),
        (lambda knn: knn(torch.ones(32), 1), r"\(32,\), but the database was built with 32 bits"),
        (lambda knn: knn.add(torch.ones(32)), r"\(32,\), but the database was built with 32 bits"),
        (lambda knn: knn(codes(2, 32), 11), "k = 11 neighbours are wanted of a database of 10 codes"),
        (lambda knn: knn(codes(2, 32), 1, torch.zeros(0, 32)), r"reference must be .* not empty.*\(0, 32\)"),
        (lambda knn: knn(torch.full((2, 32), torch.nan), 1), r"query \(2, 32\) must be finite"),
        (lambda knn: HammingKNN()(codes(2, 32), 1), "no database is kept"),
    ],
)
def test_what_cannot_be_searched_is_refused(call, message):
    knn = HammingKNN()
    knn.train(codes(10, 32))
    with pytest.raises(ValueError, match=message):
        call(knn)


def test_hamming_distance_of_codes_and_of_packed_codes():
    query, reference = codes(5, 24), codes(7, 24, seed=1)
    exact = (query[:, None] != reference).sum(dim=2).float()
    assert torch.equal(HammingDistance()(query, reference), exact)
    assert torch.equal(HammingDistance()(pack_codes(query), pack_codes(reference)), exact)
    assert torch.equal(HammingDistance().pairwise_distance(query, reference[:5]), exact[:, :5].diagonal())
    query, reference = codes(5, 512), codes(7, 512, seed=1)
    assert torch.equal(
        HammingDistance()(query.to(torch.int8), reference.to(torch.int8)), HammingDistance()(query, reference)
    )
    assert ContrastiveLoss(distance=HammingDistance())(query, torch.arange(5) % 2) > 0


def test_hamming_distance_is_linear_between_codes_with_gradients():
    outputs, other = torch.rand(3, 8, requires_grad=True), codes(2, 8)
    distances = HammingDistance()(outputs, other)
    assert torch.allclose(distances, (8 - outputs @ other.t()) / 2)
    (gradient,) = torch.autograd.grad(distances.sum(), outputs)
    assert torch.allclose(gradient, (-other.sum(dim=0) / 2).expand(3, 8))


def test_packed_codes_are_refused():
    packed = pack_codes(codes(5, 24))
    with pytest.raises(ValueError, match="query must be outputs or codes .* but is uint8; unpack_codes"):
        HammingKNN()(packed, 2, codes(5, 3))
    with pytest.raises(ValueError, match="reference must be .* but is uint8"):
        HammingKNN()(codes(5, 3), 2, packed)


def test_hamming_distance_refuses_what_differs():
    with pytest.raises(ValueError, match=r"uint8 \(5, 3\).*float32 \(5, 24\)"):
        HammingDistance()(pack_codes(codes(5, 24)), codes(5, 24))


def test_an_index_is_saved_and_read(tmp_path):
    reference, added = codes(60, 12), codes(5, 12, seed=1)
    search = InferenceModel(torch.nn.Identity(), knn_func=HammingKNN())
    search.train_knn(reference)
    search.save_knn_func(tmp_path / "index.pth")
    other = InferenceModel(torch.nn.Identity(), knn_func=HammingKNN())
    other.load_knn_func(tmp_path / "index.pth")
    other.add_to_knn(added)
    for query in (reference[:3], added):
        assert torch.equal(other.get_nearest_neighbors(query, 1)[0], torch.zeros(len(query), 1))
    with pytest.raises(ValueError, match="no database is kept that could be saved"):
        HammingKNN().save(tmp_path / "nothing.pth")
    torch.save({"weight": 0}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth must be a file of HammingKNN.save"):
        HammingKNN().load(tmp_path / "other.pth")
