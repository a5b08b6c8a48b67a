import faiss
import numpy as np
import pytest
import torch

from pml_distill.evaluation import quantize


def rows(size=400, width=24, seed=0):
    return torch.randn(size, width, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.2, 2, width)


def exact(query, reference):
    return torch.cdist(query, reference).topk(5, largest=False).indices


def recall(found, expected):
    return np.mean([len(set(a.tolist()) & set(b.tolist())) / 5 for a, b in zip(found, expected)])


def test_faiss_searches_the_bytes():
    reference, query = rows(), rows(20, seed=1)
    index = faiss.IndexScalarQuantizer(24, faiss.ScalarQuantizer.QT_8bit)
    index.train(reference.numpy())
    codes = quantize(reference)
    index.add_sa_codes(codes)
    assert codes.dtype == np.uint8 and codes.shape == (400, 24)
    assert recall(index.search(query.numpy(), 5)[1], exact(query, reference)) > 0.95
    assert np.array_equal(quantize(query, calibration=reference), index.sa_encode(query.numpy()))


def test_faiss_searches_the_bits():
    reference, query = rows(), rows(20, seed=1)
    index = faiss.IndexBinaryFlat(24)
    index.add(quantize(reference, bits=1))
    distances, _ = index.search(quantize(query, bits=1, calibration=reference), 5)
    above, asked = (x > reference.mean(dim=0) for x in (reference, query))
    expected = (asked[:, None] != above).sum(dim=2).sort(dim=1).values[:, :5]
    assert np.array_equal(distances, expected)


@pytest.mark.parametrize("layout", ["usearch", "qdrant"])
def test_stores_that_compare_integers_keep_the_euclidean_order(layout):
    reference, query = rows(), rows(20, seed=1)
    stored = quantize(reference, layout=layout, calibration=reference)
    asked = quantize(query, layout=layout, calibration=reference)
    assert stored.dtype == (np.int8 if layout == "usearch" else np.uint8)
    found = exact(torch.from_numpy(asked).float(), torch.from_numpy(stored).float())
    assert recall(found, exact(query, reference)) > 0.9


def test_usearch_and_pgvector_have_the_first_bit_first():
    reference = rows(50)
    strings, packed = (quantize(reference, 1, layout) for layout in ("pgvector", "usearch"))
    above = (reference > reference.mean(dim=0)).int().tolist()
    assert strings == ["".join(map(str, row)) for row in above]
    assert np.unpackbits(packed, axis=1).tolist() == above


def test_what_a_store_does_not_take_is_refused():
    for bits, layout in ((8, "pgvector"), (1, "qdrant"), (4, "faiss"), (8, "milvus")):
        with pytest.raises(ValueError, match=f"layout '{layout}' with bits={bits} is none of those known: faiss"):
            quantize(rows(), bits, layout)
    with pytest.raises(ValueError, match=r"embeddings \(400, 24\) must be finite"):
        quantize(rows() * torch.nan)
