import numpy as np
import pytest
import torch
from golden import FOLDER
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.reducers import MultipleReducers, SumReducer

from pml_distill.losses import CentralSimilarityLoss, DeepCauchyHashingLoss, center_distances, hash_centers
from pml_distill.losses.hash_centers import hadamard
from pml_distill.regularizers import QuantizationRegularizer


def read(file):
    with np.load(FOLDER / f"{file}.npz") as archive:
        cases = {}
        for key, value in archive.items():
            name, _, rest = key.partition("_")
            cases.setdefault(name, {})[rest] = torch.from_numpy(np.asarray(value))
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


def check(loss, outputs, case):
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert (loss - case["loss"]).abs() <= 1e-6 * case["loss"].abs()
    assert (gradient - case["grad"]).norm() <= 1e-6 * case["grad"].norm()


def class_labels(multi_hot):
    """Class numbers where each row has just one label."""
    return multi_hot.argmax(dim=1) if (multi_hot.sum(dim=1) == 1).all() else multi_hot


@read("dch")
@pytest.mark.parametrize("labels_of", [class_labels, lambda y: y], ids=["class", "multi_hot"])
def test_deep_cauchy_equals_the_authors_loss(case, labels_of):
    loss = DeepCauchyHashingLoss(case["hp_gamma"].item(), case["hp_lam"].item())
    outputs = case["u"].requires_grad_()
    check(loss(outputs, labels_of(case["y"])), outputs, case)


def test_deep_cauchy_divides_by_at_least_the_authors_product_of_lengths():
    generator = torch.Generator().manual_seed(0)
    u = 1e-3 * torch.randn(6, 16, generator=generator, dtype=torch.float64)
    similar = torch.eye(3, dtype=torch.float64).repeat_interleave(2, 0).repeat_interleave(2, 1)
    lengths = u.norm(dim=1)
    near = 8 * (1 - (u @ u.T / (lengths[:, None] * lengths).clamp(min=1e-4)).clamp(max=0.99))
    pairs = similar * (near / 20).log() + (20 / near).log1p()
    pairs = pairs * torch.where(similar == 1, 1 / similar.mean(), 1 / (1 - similar.mean()))
    off = 8 * (1 - (u.abs().sum(dim=1) / (lengths * 4).clamp(min=1e-4)).clamp(max=0.99))
    expected = pairs.mean() + 0.1 * (off / 20).log1p().mean()
    torch.testing.assert_close(DeepCauchyHashingLoss()(u, torch.arange(6) // 2), expected, rtol=1e-9, atol=0)


@read("csq")
def test_central_similarity_equals_the_authors_loss(case):
    loss = CentralSimilarityLoss(case["y"].shape[1], case["u"].shape[1], case["hp_lambda"].item())
    loss.hash_centers = case["hash_targets"]
    loss.random_center = 2 * case["random_center"] - 1
    outputs = case["u"].requires_grad_()
    labels = class_labels(case["y"]) if case["hp_single_label"] else case["y"]
    assert torch.equal(loss.targets(labels), case["hash_center"])
    check(loss(outputs, labels), outputs, case)


@read("csq_label2center_multilabel")
def test_centers_of_multi_hot_labels_equal_the_authors(case):
    loss = CentralSimilarityLoss(*case["hash_targets"].shape)
    loss.hash_centers = case["hash_targets"]
    loss.random_center = 2 * case["random_center"] - 1
    labelled = case["y"].sum(dim=1) > 0
    assert torch.equal(loss.targets(case["y"])[labelled], case["center"][labelled])


@read("csq_hash_targets")
def test_hadamard_centers_equal_the_authors(case):
    centers = hash_centers(int(case["hp_n_class"]), int(case["hp_bit"]))
    rows = int(case["hadamard_rows"])
    assert torch.equal(centers[:rows].double(), case["hash_targets"][:rows])
    assert center_distances(centers)[0] >= case["min_dist"]
    assert center_distances(centers)[1] >= case["hp_bit"] / 2


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 48, 64, 96, 200, 512])
def test_hadamard_matrices_are_orthogonal(order):
    matrix = hadamard(order)
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


@pytest.mark.parametrize(
    ("classes", "bits"),
    [(2, 8), (10, 12), (21, 48), (80, 32), (100, 24), (30, 13), (200, 50), (1000, 64), (1000, 48), (300, 512)],
)
def test_centers_are_far_apart(classes, bits):
    centers = hash_centers(classes, bits)
    assert centers.shape == (classes, bits) and centers.abs().eq(1).all()
    smallest, mean = center_distances(centers)
    assert smallest >= bits / 4 and mean >= bits / 2
    assert torch.equal(centers, hash_centers(classes, bits))


@pytest.mark.parametrize(("classes", "bits", "distance"), [(1000, 16, 4), (2048, 16, 4), (100, 8, 2), (128, 8, 2)])
def test_short_codes_are_as_far_apart_as_they_can_be(classes, bits, distance):
    centers = hash_centers(classes, bits)
    smallest, mean = center_distances(centers)
    assert centers.shape == (classes, bits) and smallest == distance
    assert mean == pytest.approx(bits / 2, rel=0.02)
    assert torch.equal(centers, hash_centers(classes, bits))
    assert torch.equal(centers[: 2 * bits], hash_centers(2 * bits, bits))


@pytest.mark.parametrize(("classes", "bits"), [(200, 17), (500, 20)])
def test_codes_of_odd_lengths_are_a_quarter_apart_where_a_linear_code_is(classes, bits):
    assert center_distances(hash_centers(classes, bits))[0] == 5


def test_more_classes_than_codes_share_them():
    centers = hash_centers(300, 8)
    assert centers.shape == (300, 8) and center_distances(centers)[0] == 0


@pytest.mark.parametrize("bits", [8, 13, 48, 512])
@pytest.mark.parametrize("name", ["dch", "csq"])
@pytest.mark.parametrize("multi_hot", [False, True])
def test_any_code_length_and_degenerate_rows_have_finite_gradients(name, bits, multi_hot):
    loss = DeepCauchyHashingLoss() if name == "dch" else CentralSimilarityLoss(5, bits)
    outputs = torch.randn(6, bits, generator=torch.Generator().manual_seed(0))
    outputs[0], outputs[2] = 0, outputs[1]
    labels = torch.arange(6) % 5
    if multi_hot:
        labels = torch.eye(5)[labels]
        labels[3] = 0
    for rows in (6, 1):
        batch = outputs[:rows].clone().requires_grad_()
        value = loss(batch, labels[:rows])
        value.backward()
        assert value.isfinite() and batch.grad.isfinite().all()


@pytest.mark.parametrize("loss", [DeepCauchyHashingLoss(), CentralSimilarityLoss(4, 16)], ids=["dch", "csq"])
def test_half_precision_and_autocast_give_the_float32_loss(loss):
    outputs, labels = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(outputs, labels), loss(outputs.clone(), labels))
    half = loss(outputs.bfloat16(), labels)
    assert half.dtype == torch.float32 and torch.equal(half, loss(outputs.bfloat16().float(), labels))


@pytest.mark.parametrize("loss", [DeepCauchyHashingLoss, lambda **kw: CentralSimilarityLoss(4, 16, **kw)])
def test_sub_losses_take_separate_reducers(loss):
    outputs, labels = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    usual = loss(quantization_weight=1)(outputs, labels)
    more = loss(quantization_weight=1, reducer=MultipleReducers({"quantization_loss": SumReducer()}))(outputs, labels)
    no_quantization = loss(quantization_weight=0)(outputs, labels)
    assert more - no_quantization == pytest.approx(8 * (usual - no_quantization).item(), rel=1e-3)


def test_centers_are_saved_with_the_loss():
    state = CentralSimilarityLoss(200, 100, seed=3).state_dict()
    other = CentralSimilarityLoss(200, 100, seed=0)
    assert not torch.equal(other.hash_centers, state["hash_centers"])
    other.load_state_dict(state)
    assert torch.equal(other.hash_centers, state["hash_centers"])
    assert torch.equal(other.random_center, state["random_center"])
    assert other.min_center_distance == center_distances(other.hash_centers)[0]


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (torch.zeros(4, 16), torch.zeros(3), r"\(4, 16\).*\(3,\)"),
        (torch.zeros(4, 16), None, "needs labels"),
        (torch.zeros(4, 16), torch.tensor([0, 1, 2, 5]), "from 0 to num_classes - 1 = 4, but go from 0 to 5"),
        (torch.zeros(4, 16), torch.tensor([0, 1, 2, -1]), "go from -1 to 2"),
        (torch.zeros(4, 8), torch.zeros(4), r"\(B, 16\).*\(4, 8\)"),
        (torch.zeros(4, 16), torch.zeros(4, 6), r"\(B, 5\).*num_classes.*\(4, 6\)"),
        (torch.zeros(4, 16), torch.zeros(4, 5) - 1, "labels must be 0 or 1 if multi-hot, but go from -1.0 to -1.0"),
    ],
)
def test_what_does_not_fit_is_refused(outputs, labels, message):
    with pytest.raises(ValueError, match=message):
        CentralSimilarityLoss(5, 16)(outputs, labels)


def test_multi_hot_labels_compile_to_a_single_graph():
    torch._dynamo.reset()
    outputs, labels = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), torch.eye(6, 3) + torch.eye(3)[0]
    labels = labels.clamp(max=1)
    compiled = torch.compile(DeepCauchyHashingLoss(), backend="eager", fullgraph=True)
    assert compiled(outputs, labels) == pytest.approx(DeepCauchyHashingLoss()(outputs, labels).item())


@pytest.mark.parametrize("loss", [DeepCauchyHashingLoss(), CentralSimilarityLoss(5, 16)])
def test_an_empty_batch_costs_nothing(loss):
    assert loss(torch.zeros(0, 16), torch.zeros(0).long()) == 0


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="gamma must be a positive number, but is 0"):
        DeepCauchyHashingLoss(gamma=0)
    with pytest.raises(ValueError, match="gamma must be a positive number, but is nan"):
        DeepCauchyHashingLoss(gamma=float("nan"))
    for make in (DeepCauchyHashingLoss, lambda **kw: CentralSimilarityLoss(5, 16, **kw)):
        with pytest.raises(ValueError, match="quantization_weight must be zero or a positive number, but is -1"):
            make(quantization_weight=-1)
    with pytest.raises(ValueError, match="distance must be CosineSimilarity.*LpDistance"):
        DeepCauchyHashingLoss(distance=LpDistance())
    with pytest.raises(ValueError, match="at least 1, but are 0 and 16"):
        hash_centers(0, 16)


def test_quantization_regularizer_goes_with_any_loss():
    outputs, labels = 0.5 * torch.ones(4, 8), torch.arange(4) % 2
    loss = ContrastiveLoss(embedding_regularizer=QuantizationRegularizer(), embedding_reg_weight=2)
    assert loss(outputs, labels) - ContrastiveLoss()(outputs, labels) == pytest.approx(0.5)


def test_quantization_regularizer_bears_large_outputs_in_half_precision():
    loss = QuantizationRegularizer()(torch.full((4, 8), 300.0, dtype=torch.float16))
    assert loss.item() == pytest.approx(299.0**2)


def test_distances_of_many_centers_are_those_of_all_pairs():
    centers = hash_centers(1500, 24, seed=3)
    pairs = ((24 - centers @ centers.T) / 2)[~torch.eye(1500, dtype=torch.bool)]
    smallest, mean = center_distances(centers)
    assert smallest == pairs.min() and mean == pytest.approx(pairs.double().mean().item(), rel=1e-12)
