"""What every hashing loss promises, and the authors' figures of those that are not in test_hashing_losses.py."""

import math

import pytest
import torch
from golden import FOLDER
from pytorch_metric_learning.reducers import (
    AvgNonZeroReducer,
    ClassWeightedReducer,
    DoNothingReducer,
    MeanReducer,
    PerAnchorReducer,
    SumReducer,
    ThresholdReducer,
)
from pytorch_metric_learning.regularizers import LpRegularizer
from test_hashing_losses import class_labels, read

from pml_distill.losses import (
    CentralSimilarityLoss,
    DeepCauchyHashingLoss,
    DPSHLoss,
    GreedyHashLoss,
    HashNetLoss,
    OrthoHashLoss,
    hash_centers,
)

BITS, CLASSES = 16, 4
LOSSES = {
    "dch": DeepCauchyHashingLoss,
    "csq": lambda **kw: CentralSimilarityLoss(CLASSES, BITS, **kw),
    "hashnet": HashNetLoss,
    "dpsh": DPSHLoss,
    "dpsh_memory": lambda **kw: Remembering(num_samples=50, embedding_size=BITS, **kw),
    "greedy": lambda **kw: seeded(GreedyHashLoss, CLASSES, BITS, **kw),
    "ortho": lambda **kw: OrthoHashLoss(CLASSES, BITS, **kw),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
PAIRWISE = ("dch", "hashnet")
ONE_TERM = ("hashnet", "ortho")


def seeded(make, *args, **kwargs):
    torch.manual_seed(0)
    return make(*args, **kwargs)


class Remembering(DPSHLoss):
    """Gives the batch the first rows."""

    def forward(self, embeddings, labels=None, *others):
        rows = torch.arange(len(embeddings), device=embeddings.device)
        return super().forward(embeddings, labels, *others, index=rows)


def outputs(size=8, dtype=torch.float32, seed=0):
    return torch.randn(size, BITS, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labels(size=8):
    return torch.arange(size) % CLASSES


def official(value, expected):
    assert (value - expected).abs().max() <= 1e-10 * expected.abs().max()


@read("hashnet")
@pytest.mark.parametrize("labels_of", [class_labels, lambda y: y, None], ids=["class", "multi_hot", "similarity"])
def test_hashnet_equals_the_published_code(case, labels_of):
    loss, u = HashNetLoss(case["hp_alpha"].item(), case["hp_scale"].item()), case["u"].requires_grad_()
    given = {"similarity": case["y"] @ case["y"].T > 0} if labels_of is None else {"labels": labels_of(case["y"])}
    value = loss(u, **given)
    official(value, case["loss"])
    official(torch.autograd.grad(value, u)[0], case["grad"])


@read("dpsh")
def test_dpsh_equals_the_published_code(case):
    size, classes = case["Y_prev"].shape
    loss = DPSHLoss(case["hp_alpha"].item(), size, case["u"].shape[1], classes).double()
    loss.outputs, loss.labels = case["U_prev"], case["Y_prev"]
    u = case["u"].requires_grad_()
    value = loss(u, case["y"], index=case["ind"])
    official(value, case["loss"])
    # Where a product is exactly 0, the published code has the gradient -s in place of 1/2 - s.
    at_zero = (u @ loss.outputs.T == 0).double() @ loss.outputs / (4 * len(u) * size)
    official(torch.autograd.grad(value, u)[0], case["grad"] + at_zero.detach())
    assert torch.equal(loss.outputs[case["ind"]], u)


@read("greedyhash")
def test_greedy_hash_equals_the_published_code(case):
    loss = GreedyHashLoss(*case["W"].shape, case["hp_alpha"].item()).double()
    loss.W.data = case["W"]
    u = case["u"].requires_grad_()
    value = loss(u, case["y"].argmax(dim=1))
    official(value, case["loss"])
    gradients = torch.autograd.grad(value, (u, loss.W))
    official(gradients[0], case["grad"])
    official(gradients[1], case["grad_W"])


@pytest.mark.parametrize("multi_hot", [False, True])
def test_ortho_hash_equals_its_formula_by_loops(multi_hot):
    u, chosen = outputs(dtype=torch.float64), labels()
    own = torch.eye(CLASSES)[chosen]
    if multi_hot:
        own[0, 1], own[3] = 1, 0
    centers, values = hash_centers(CLASSES, BITS).double(), []
    for i in range(8):
        logits = []
        for c in range(CLASSES):
            cosine = float(u[i] @ centers[c]) / (float(u[i].norm()) * BITS**0.5)
            logits.append(8 * (cosine - 0.2 * float(own[i, c])))
        norm = math.log(sum(map(math.exp, logits)))
        own_logits = [norm - logit for logit, is_own in zip(logits, own[i]) if is_own]
        values.append(sum(own_logits) / max(len(own_logits), 1))
    value = OrthoHashLoss(CLASSES, BITS)(u, own if multi_hot else chosen)
    assert value.item() == pytest.approx(sum(values) / 8, rel=1e-10)


def test_the_files_of_the_published_figures_are_here():
    assert all((FOLDER / f"{name}.npz").exists() for name in ("hashnet", "dpsh", "greedyhash", "dch", "csq"))


def test_dch_from_a_similarity_matrix_is_that_of_its_labels():
    u = outputs()
    similarity = labels()[:, None] == labels()
    for loss in (DeepCauchyHashingLoss(), HashNetLoss()):
        for matrix in (similarity, similarity.float()):
            assert loss(u, similarity=matrix) == loss(u, labels())
        with pytest.raises(ValueError, match=r"similarity must be \(8, 8\), but has shape \(7, 8\)"):
            loss(u, similarity=similarity[:7])
        with pytest.raises(ValueError, match="similarity must be 0 or 1"):
            loss(u, similarity=2 * similarity.float())
        with pytest.raises(ValueError, match="needs labels"):
            loss(u)


def test_dpsh_remembers_what_it_has_seen():
    u, v = outputs(4), outputs(4, seed=1)
    loss = DPSHLoss(0, num_samples=8, embedding_size=BITS)
    loss(u, labels(4), index=torch.arange(4))
    second = loss(v, labels(4), index=torch.arange(4, 8))
    whole, own = torch.cat([u, v]), torch.cat([labels(4), labels(4)])
    products = v @ whole.T / 2
    similar = labels(4)[:, None] == own
    expected = (torch.nn.functional.softplus(products) - similar * products).mean()
    assert second.item() == pytest.approx(expected.item(), rel=1e-6)
    other = DPSHLoss(0, num_samples=8, embedding_size=BITS)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.outputs, whole)


def test_dpsh_can_look_twice_before_it_goes_back():
    loss, u = DPSHLoss(num_samples=8, embedding_size=BITS), outputs(4).requires_grad_()
    values = [loss(u, labels(4), index=rows) for rows in (torch.arange(4), torch.arange(4, 8))]
    sum(values).backward()
    assert u.grad.isfinite().all()


def test_dpsh_asks_for_rows_only_with_a_memory():
    with pytest.raises(ValueError, match="index is None, but num_samples is 8"):
        DPSHLoss(num_samples=8, embedding_size=BITS)(outputs(), labels())
    with pytest.raises(ValueError, match="index is given, but num_samples is None"):
        DPSHLoss()(outputs(), labels(), index=torch.arange(8))
    with pytest.raises(ValueError, match="needs embedding_size"):
        DPSHLoss(num_samples=8)


def test_greedy_hash_and_its_weights_learn():
    torch.manual_seed(0)
    u, loss = torch.randn(40, BITS, requires_grad=True), GreedyHashLoss(CLASSES, BITS)
    optimizer = torch.optim.Adam([u, *loss.parameters()], 0.05)
    own = torch.arange(40) % CLASSES
    before = loss(u, own).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss(u, own).backward()
        optimizer.step()
    assert loss(u, own).item() < before / 4
    with pytest.raises(ValueError, match=r"needs classes \(B,\), but labels has shape \(8, 4\)"):
        loss(outputs(), torch.eye(CLASSES)[labels()])


@pytest.mark.parametrize("name", ["greedy", "ortho", "csq"])
def test_labels_and_widths_that_do_not_fit_are_refused(name):
    loss = LOSSES[name]()
    for wrong, message in (
        ((outputs(), labels() + 1), "from 0 to num_classes - 1 = 3, but go from 1 to 4"),
        ((outputs()[:, :8], labels()), r"embeddings must be \(B, 16\)"),
        ((outputs(), torch.zeros(8, 3)), r"multi-hot labels must be \(B, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(*wrong)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "greedy"])
def test_gradients_are_correct(name):
    u = outputs(6, torch.float64).requires_grad_()
    loss = LOSSES[name]().double()
    if name == "dpsh_memory":
        # Within the memory the other side of each pair stands still.
        others = outputs(6, torch.float64, seed=1)
        loss(others, labels(6))
        moved = DPSHLoss(num_samples=50, embedding_size=BITS).double()

        def value(u):
            moved.outputs, moved.labels = loss.outputs, loss.labels
            return moved(u, labels(6), index=torch.arange(6, 12))

        (gradient,) = torch.autograd.grad(value(u), u)
        products = u @ torch.cat([others, u]).detach().T / 2
        similar = labels(6)[:, None] == torch.cat([labels(6), labels(6)])
        by_hand = torch.nn.functional.softplus(products).sum() - (similar * products).sum()
        by_hand = by_hand / 300 + 0.1 * (u - u.detach().sign()).square().mean()
        torch.testing.assert_close(gradient, torch.autograd.grad(by_hand, u)[0])
        return
    assert torch.autograd.gradcheck(lambda x: loss(x, labels(6)), u)
    if name != "csq":
        assert torch.autograd.gradcheck(lambda x: loss(x, torch.eye(CLASSES)[labels(6)]), u)


@every_loss
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_degenerate_batches_have_finite_values_and_gradients(name, dtype, autocast):
    usual = outputs()
    zero, twins = usual.clone(), usual.clone()
    zero[2], twins[1] = 0, twins[0]
    batches = {"usual": usual, "zero row": zero, "all zero": 0 * usual, "twins": twins, "large": 300 * usual}
    for what, batch in batches.items():
        for own in (labels(), torch.zeros(8).long(), torch.arange(8).clamp(max=3)):
            u = batch.to(dtype).requires_grad_()
            with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                value = LOSSES[name]()(u, own)
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), what
            value.backward()
            assert value.isfinite() and u.grad.isfinite().all(), what


@every_loss
def test_batches_of_one_and_of_none(name):
    for size in (1, 0):
        u = outputs(size).requires_grad_()
        value = LOSSES[name]()(u, labels(size))
        value.backward()
        assert value.isfinite() and u.grad.isfinite().all()
    assert value == 0


@every_loss
def test_the_order_of_the_batch_does_not_matter(name):
    u, order = outputs(9, torch.float64), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    value = LOSSES[name]()(u, labels(9))
    assert LOSSES[name]()(u[order], labels(9)[order]).item() == pytest.approx(value.item())


@every_loss
def test_one_hot_labels_are_classes(name):
    if name in ("greedy", "dpsh_memory"):
        return  # these take classes alone, or are told that labels are multi-hot
    one_hot = torch.eye(CLASSES)[labels()]
    assert LOSSES[name]()(outputs(), one_hot).item() == pytest.approx(LOSSES[name]()(outputs(), labels()).item())


@every_loss
@pytest.mark.parametrize(
    "reducer", [MeanReducer(), SumReducer(), AvgNonZeroReducer(), ThresholdReducer(low=0), PerAnchorReducer()]
)
def test_reducers(name, reducer):
    parts = LOSSES[name](reducer=DoNothingReducer())(outputs(), labels())
    value = LOSSES[name](reducer=reducer)(outputs(), labels())
    kind = torch.sum if isinstance(reducer, SumReducer) else torch.mean
    assert value.item() == pytest.approx(sum(kind(part["losses"]) for part in parts.values()).item(), rel=1e-5)
    assert list(parts) == ["similarity_loss", "quantization_loss"][: 1 if name in ONE_TERM else 2]
    assert parts["similarity_loss"]["reduction_type"] == ("pos_pair" if name in PAIRWISE else "element")


@every_loss
def test_class_weights(name):
    weights = torch.tensor([1.0, 3, 2, 5])
    parts = LOSSES[name](reducer=DoNothingReducer())(outputs(), labels())
    expected = 0
    for part in parts.values():
        rows = part["indices"][0] if part["reduction_type"] == "pos_pair" else part["indices"]
        expected += (part["losses"] * weights[labels()[rows]]).mean().item()
    value = LOSSES[name](reducer=ClassWeightedReducer(weights))(outputs(), labels())
    assert value.item() == pytest.approx(expected, rel=1e-5)


@every_loss
def test_embedding_regularizer(name):
    plain = LOSSES[name]()(outputs(), labels())
    regularized = LOSSES[name](embedding_regularizer=LpRegularizer(), embedding_reg_weight=0.5)
    expected = plain + 0.5 * outputs().norm(dim=1).mean()
    assert regularized(outputs(), labels()).item() == pytest.approx(expected.item(), rel=1e-5)


@every_loss
def test_what_hashing_losses_do_not_take_is_refused(name):
    with pytest.raises(ValueError, match="takes the whole batch by its labels, and no ref_emb"):
        LOSSES[name]()(outputs(), labels(), None, outputs())
    with pytest.raises(ValueError, match="and no indices_tuple"):
        LOSSES[name]()(outputs(), labels(), (torch.tensor([0]),) * 3)
    with pytest.raises(ValueError, match="needs labels of shape"):
        LOSSES[name]()(outputs())


@every_loss
def test_compiles_to_one_graph(name):
    torch._dynamo.reset()
    loss = LOSSES[name]()
    expected = LOSSES[name]()(outputs(), labels())
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert compiled(outputs(), labels()).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HashNetLoss(alpha=0), "alpha must be a positive number, but is 0"),
        (lambda: HashNetLoss(scale=-1), "scale must be a positive number, but is -1"),
        (lambda: DPSHLoss(-1), "quantization_weight must be zero or a positive number, but is -1"),
        (lambda: GreedyHashLoss(4, 8, -1), "quantization_weight must be zero or a positive number, but is -1"),
        (lambda: OrthoHashLoss(4, 8, scale=0), "scale must be a positive number, but is 0"),
        (lambda: OrthoHashLoss(4, 8, margin=-1), "margin must be zero or a positive number, but is -1"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
