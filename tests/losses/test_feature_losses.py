"""The losses on feature maps: formulas, precision, reducers, and a pair of real ResNets."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_metric_learning.reducers import (
    ClassWeightedReducer,
    DivisorReducer,
    DoNothingReducer,
    SumReducer,
    ThresholdReducer,
)

from pml_distill.losses import (
    AttentionTransferLoss,
    BaseFeatureLoss,
    HintLoss,
    PooledFeatureLoss,
    TokenLoss,
    UnambiguousGranularityLoss,
    VariationalInformationLoss,
)
from pml_distill.utils import FeatureTap

STUDENT, TEACHER = [4, 6], [5, 3]
LOSSES = {
    "hint": lambda **kw: HintLoss(STUDENT, TEACHER, **kw),
    "attention": AttentionTransferLoss,
    "variational": lambda **kw: VariationalInformationLoss(STUDENT, TEACHER, **kw),
    "token": lambda **kw: TokenLoss(STUDENT, TEACHER, **kw),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def make(name, **kwargs):
    torch.manual_seed(0)
    return LOSSES[name](**kwargs)


def maps(channels, batch=3, size=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, size // (i + 1), size, generator=generator).to(dtype) for i, c in enumerate(channels)]


def attention(array):
    energy = (array**2).sum(axis=1).reshape(len(array), -1)
    return energy / np.sqrt((energy**2).sum(axis=1, keepdims=True))


def expected(name, loss, students, teachers):
    """Values per sample, from the definition, with NumPy."""
    total = np.zeros(len(students[0]))
    for i, (s, t) in enumerate(zip(students, teachers)):
        s, t = s.double().numpy(), t.double().numpy()
        if name == "attention":
            total += ((attention(s) - attention(t)) ** 2).mean(axis=1)
            continue
        conv = loss.regressors[f"map_{i}"]
        weight, bias = conv.weight.detach().double().numpy()[:, :, 0, 0], conv.bias.detach().double().numpy()
        prediction = np.einsum("oc,bchw->bohw", weight, s) + bias[:, None, None]
        if name == "token":
            t = (t - t.mean(axis=1, keepdims=True)) / np.sqrt(t.var(axis=1, keepdims=True) + 1e-5)
            lengths = np.sqrt((prediction**2).sum(axis=1)) * np.sqrt((t**2).sum(axis=1))
            cosine = 1 - (prediction * t).sum(axis=1) / lengths
            gap = np.abs(prediction - t)
            smooth = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean(axis=1)
            total += (0.9 * cosine + 0.1 * smooth).mean(axis=(1, 2))
            continue
        errors = (prediction - t) ** 2
        if name == "variational":
            raw = loss.raw_variances[f"map_{i}"].detach().double().numpy()
            variance = (np.log1p(np.exp(raw)) + 1e-5)[:, None, None]
            errors = (np.log(variance) + errors / variance) / 2
        total += errors.mean(axis=(1, 2, 3))
    return total


@every_loss
def test_values_are_those_of_the_formula(name):
    loss = make(name, reducer=DoNothingReducer()).double()
    if name == "variational":
        for raw in loss.raw_variances.values():
            torch.nn.init.normal_(raw)
    students, teachers = maps(STUDENT, dtype=torch.float64), maps(TEACHER, seed=1, dtype=torch.float64)
    details = loss(students, teachers)["loss"]
    assert np.allclose(details["losses"].detach().numpy(), expected(name, loss, students, teachers), rtol=1e-12)
    assert details["reduction_type"] == "element" and details["indices"].tolist() == [0, 1, 2]


@every_loss
def test_reducers(name):
    labels, weights = torch.tensor([0, 1, 1]), torch.tensor([1.0, 3.0])
    students, teachers = maps(STUDENT), maps(TEACHER, seed=1)
    parts = make(name, reducer=DoNothingReducer())(students, teachers)["loss"]["losses"]
    assert make(name)(students, teachers).item() == pytest.approx(parts.mean().item())
    assert make(name, reducer=SumReducer())(students, teachers).item() == pytest.approx(parts.sum().item())
    weighted = make(name, reducer=ClassWeightedReducer(weights))(students, teachers, labels)
    assert weighted.item() == pytest.approx((parts * weights[labels]).mean().item())
    assert make(name, reducer=ThresholdReducer(low=1e6))(students, teachers) == 0


@every_loss
def test_gradients_are_correct(name):
    loss = make(name).double()
    parameters = dict(loss.named_parameters())
    students = [m.requires_grad_() for m in maps(STUDENT, batch=2, size=2, dtype=torch.float64)]
    teachers = maps(TEACHER, batch=2, size=2, seed=1, dtype=torch.float64)

    def value(first, second, *weights):
        return torch.func.functional_call(loss, dict(zip(parameters, weights)), ([first, second], teachers))

    assert torch.autograd.gradcheck(value, (*students, *parameters.values()))


@every_loss
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_degenerate_maps_have_finite_values_and_gradients(name, dtype, autocast):
    usual, other = maps(STUDENT), maps(TEACHER, seed=1)
    one_zero = [m.clone().index_fill_(0, torch.tensor(1), 0) for m in usual]
    cases = {
        "usual": (usual, other),
        "zero student": ([0 * m for m in usual], other),
        "zero teacher": (usual, [0 * m for m in other]),
        "all zero": ([0 * m for m in usual], [0 * m for m in other]),
        "one zero sample": (one_zero, other),
        "tiny": ([1e-6 * m for m in usual], other),
        "large": ([1000 * m for m in usual], [1000 * m for m in other]),
        "batch of one": ([m[:1] for m in usual], [m[:1] for m in other]),
    }
    for what, (students, teachers) in cases.items():
        loss = make(name)
        students = [m.to(dtype).requires_grad_() for m in students]
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            value = loss(students, [m.to(dtype) for m in teachers])
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), what
        value.backward()
        assert torch.isfinite(value), what
        assert all(torch.isfinite(p.grad).all() for p in (*students, *loss.parameters())), what


def test_a_zero_map_has_no_attention_to_learn():
    students = [torch.zeros(3, c, 4, 4, requires_grad=True) for c in STUDENT]
    AttentionTransferLoss()(students, [torch.rand(3, c, 4, 4) for c in TEACHER]).backward()
    assert all((m.grad == 0).all() for m in students)


@every_loss
def test_the_larger_map_is_pooled_to_the_smaller(name):
    small, large = maps([4], size=4), maps([4], size=8)
    channels = [4], [4]
    loss = AttentionTransferLoss() if name == "attention" else type(make(name))(*channels)
    pooled = [torch.nn.functional.avg_pool2d(large[0], 2)]
    assert torch.allclose(loss(large, small), loss(pooled, small), atol=1e-6)
    assert torch.allclose(loss(small, large), loss(small, pooled), atol=1e-6)
    tall, wide = torch.rand(2, 4, 8, 2), torch.rand(2, 4, 2, 8)
    assert torch.isfinite(loss([tall], [wide]))


def test_attention_ignores_strength_and_channels():
    teachers = maps([4], size=6)
    assert AttentionTransferLoss()([3 * teachers[0].repeat(1, 2, 1, 1)], teachers).item() == pytest.approx(0, abs=1e-9)


def test_attention_refuses_maps_of_one_place():
    students = maps([4, 6], size=4)
    with pytest.raises(ValueError, match=r"\[\(4, 4\), \(1, 1\)\]: one place .*use PooledFeatureLoss or HintLoss"):
        AttentionTransferLoss()(students, [maps([5], size=4)[0], torch.rand(3, 3, 1, 1)])


def test_the_first_variance_is_five():
    loss = VariationalInformationLoss([2], [3])
    zero_regressors = copy.deepcopy(loss)
    for parameter in zero_regressors.regressors.parameters():
        torch.nn.init.zeros_(parameter)
    value = zero_regressors([torch.rand(2, 2, 3, 3)], [torch.full((2, 3, 3, 3), 2.0)])
    assert value.item() == pytest.approx((np.log(5) + 4 / 5) / 2, rel=1e-5)


@every_loss
def test_the_teacher_gets_no_gradient_and_the_inputs_stay_as_they_are(name):
    students = [m.requires_grad_() for m in maps(STUDENT)]
    teachers = [m.requires_grad_() for m in maps(TEACHER, seed=1)]
    before = [m.detach().clone() for m in (*students, *teachers)]
    make(name)(students, teachers).backward()
    assert all(m.grad is not None for m in students) and all(m.grad is None for m in teachers)
    assert all(torch.equal(*pair) for pair in zip(before, (*students, *teachers)))


@every_loss
def test_compiles_to_a_single_graph(name):
    torch._dynamo.reset()
    students, teachers = [m.requires_grad_() for m in maps(STUDENT)], maps(TEACHER, size=8, seed=1)
    loss = make(name)
    values = torch.compile(loss, fullgraph=True, backend="aot_eager")(students, teachers), loss(students, teachers)
    wanted = (*students, *loss.parameters())
    gradients = [torch.autograd.grad(value, wanted) for value in values]
    assert torch.allclose(*values)
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*gradients))


@every_loss
def test_state_comes_back(name):
    loss, other = make(name), LOSSES[name]()
    other.load_state_dict(loss.state_dict())
    assert loss(maps(STUDENT), maps(TEACHER)) == other(maps(STUDENT), maps(TEACHER))


@every_loss
@pytest.mark.parametrize(
    ("students", "teachers", "message"),
    [
        (torch.zeros(2, 4, 3, 3), [torch.zeros(2, 5, 3, 3)], r"student_maps to be a list.*a tensor of shape \(2, 4"),
        ([torch.zeros(2, 4, 3, 3)], [], r"teacher_maps to be a list of feature maps, but it is \[\]"),
        ([torch.zeros(2, 4, 3, 3)], [torch.zeros(2, 5, 3, 3)] * 2, r"\[\(2, 4, 3, 3\)\].*their numbers differ"),
        ([torch.zeros(2, 4)], [torch.zeros(2, 5, 3, 3)], r"\(batch, channels, height, width\).*\[\(2, 4\)\]"),
        ([torch.zeros(2, 4)], [torch.zeros(2, 5, 3)], r"tokens of shape \(batch, tokens, channels\).*\[\(2, 4\)\]"),
        ([torch.zeros(2, 4, 3, 3)], [torch.zeros(3, 5, 3, 3)], r"same samples.*the numbers of rows differ"),
    ],
)
def test_wrong_maps_are_named(name, students, teachers, message):
    with pytest.raises(ValueError, match=f"{type(make(name)).__name__}.*{message}"):
        make(name)(students, teachers)


@pytest.mark.parametrize("name", ["hint", "variational", "token"])
def test_wrong_channels_are_named_with_the_right_ones(name):
    with pytest.raises(ValueError, match=r"are \[4\] and \[4, 5\]"):
        type(make(name))([4], [4, 5])
    with pytest.raises(ValueError, match=r"channels \[\(4, 5\), \(6, 3\)\], but has \[\(4, 5\), \(7, 3\)\]"):
        make(name)(maps([4, 7]), maps(TEACHER))


@every_loss
def test_on_resnets(name):
    from torchvision.models import resnet18, resnet34

    torch.manual_seed(0)
    names = ["layer1", "layer3"]
    student, teacher, images = resnet18(), resnet34().eval(), torch.rand(2, 3, 64, 64)
    with FeatureTap(student, names) as tap, FeatureTap(teacher, names) as teacher_tap:
        student(images), teacher(images)
    channels = [m.shape[1] for m in tap.features]
    loss = AttentionTransferLoss() if name == "attention" else type(make(name))(channels, channels)
    loss(tap.features, teacher_tap.features).backward()
    assert student.conv1.weight.grad.abs().sum() > 0 and teacher.conv1.weight.grad is None
    assert student.layer4[0].conv1.weight.grad is None


class ProductLoss(BaseFeatureLoss):
    def compute_loss(self, student_maps, teacher_maps):
        return (student_maps[0] * teacher_maps[0]).sum(dim=(1, 2, 3))


def test_a_loss_of_ones_own_learns_from_a_teacher_in_inference_mode():
    (student,), (teacher,) = maps([4]), maps([4], seed=1)
    with torch.inference_mode():
        inferred = teacher.clone()
    student.requires_grad_()
    values = [ProductLoss(reducer=SumReducer())([student], [t]) for t in (inferred, teacher)]
    gradients = [torch.autograd.grad(value, student)[0] for value in values]
    assert torch.equal(*values) and torch.equal(*gradients)


FOLDER = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["c00", "c02", "c04", "c06"])
def test_pooled_features_give_the_authors_figures(name):
    with np.load(FOLDER / "fitnet.npz") as archive:
        case = {key[4:]: archive[key] for key in archive.files if key.startswith(name)}
    layers = range(int(case["n_layers"]))
    students = [torch.tensor(case[f"s_{i}"], requires_grad=True) for i in layers]
    loss = PooledFeatureLoss()(
        [s[:, :, None, None].expand(-1, -1, 2, 3) for s in students],
        [torch.tensor(case[f"t_{i}"])[:, :, None, None] for i in layers],
    )
    assert loss.item() == pytest.approx(case["loss"].item(), rel=1e-8)
    for i, gradient in enumerate(torch.autograd.grad(loss, students)):
        assert torch.allclose(gradient, torch.tensor(case[f"grad_{i}"]), rtol=1e-8)


def test_pooled_features_need_equal_channels():
    with pytest.raises(ValueError, match=r"equal channels.*\[\(4, 5\)\]"):
        PooledFeatureLoss()(maps([4]), maps([5]))


def as_tokens(feature_map, prefix):
    tokens = feature_map.flatten(2).transpose(1, 2)
    return torch.cat([torch.full_like(tokens[:, :1], 7).expand(-1, prefix, -1), tokens], dim=1)


TAKE_TOKENS = {
    **{name: (lambda name=name: make(name)) for name in LOSSES},
    "pooled": PooledFeatureLoss,
}


@pytest.mark.parametrize("name", TAKE_TOKENS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("size", [6, 4])
def test_tokens_are_read_as_maps_between_different_grids(name, prefix, size):
    torch.manual_seed(0)
    channels = ([4], [4]) if name == "pooled" else (STUDENT, TEACHER)
    students = [torch.rand(2, c, 4, 4) for c in channels[0]]
    teachers = [torch.rand(2, c, size, size) for c in channels[1]]
    expected, loss = TAKE_TOKENS[name]()(students, teachers), TAKE_TOKENS[name]()
    tokens = [as_tokens(m, prefix).requires_grad_() for m in students]
    assert torch.allclose(loss(tokens, [as_tokens(m, prefix) for m in teachers]), expected)
    value = loss(tokens, teachers)
    value.backward()
    assert torch.allclose(value, expected)
    assert all((t.grad[:, :prefix] == 0).all() and t.grad.abs().sum() > 0 for t in tokens)


def test_grids_that_are_not_square_are_given():
    students, teachers = [torch.rand(2, 4, 2, 6)], [torch.rand(2, 4, 3, 6)]
    loss = AttentionTransferLoss(student_grid=(2, 6), teacher_grid=(3, 6))
    value = loss([as_tokens(students[0], 1)], [as_tokens(teachers[0], 5)])
    assert torch.allclose(value, AttentionTransferLoss()(students, teachers))
    with pytest.raises(ValueError, match=r"grid of 4 x 6 does not fit into the 13 tokens of \(2, 13, 4\)"):
        AttentionTransferLoss(student_grid=(4, 6))([as_tokens(students[0], 1)], teachers)


@every_loss
def test_an_empty_batch_is_a_zero_loss_that_back_propagates(name):
    students = [m.requires_grad_() for m in maps(STUDENT)]
    loss = make(name)
    value = loss([m[:0] for m in students], [m[:0] for m in maps(TEACHER, seed=1)])
    value.backward()
    assert value == 0 and all((p.grad == 0).all() for p in (*students, *loss.parameters()))


@every_loss
def test_reducers_that_want_more(name):
    students, teachers = maps(STUDENT), maps(TEACHER, seed=1)
    assert make(name, reducer=DivisorReducer())(students, teachers).item() == pytest.approx(
        make(name)(students, teachers).item()
    )
    with pytest.raises(ValueError, match="ClassWeightedReducer of .* needs a class"):
        make(name, reducer=ClassWeightedReducer(torch.ones(3)))(students, teachers)


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.classify = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)


def granularity(**kwargs):
    torch.manual_seed(0)
    head = Head().double().eval()
    return UnambiguousGranularityLoss(4, head.embed, head.classify, 7, grids=(4, 2), **kwargs).double()


def cells_by_hand(feature_map, grid):
    """Each cell's mean, sample by sample, from the definition."""
    array, step = feature_map.numpy(), feature_map.shape[2] // grid
    rows = [
        image[:, i * step : (i + 1) * step, j * step : (j + 1) * step].mean(axis=(1, 2))
        for image in array
        for i in range(grid)
        for j in range(grid)
    ]
    return np.stack(rows)


def linear(x, layer):
    bias = 0 if layer.bias is None else layer.bias.detach().numpy()
    return x @ layer.weight.detach().numpy().T + bias


def test_granularity_is_the_mean_distance_of_the_cells_that_the_teacher_gets_right():
    loss, labels = granularity(), torch.tensor([0, 1, 2, 1])
    student, teacher = torch.randn(4, 4, 8, 8).double(), torch.randn(4, 5, 16, 16).double()
    expected, count = 0, 0
    for grid in (4, 2):
        found = cells_by_hand(student, grid)
        found = (found - found.mean(0)) / np.sqrt(found.var(0) + 1e-5)
        found = linear(found, loss.projections[f"grid_{grid}"].linear)
        found = (found - found.mean(0)) / np.sqrt(found.var(0) + 1e-5)
        target = linear(cells_by_hand(teacher, grid), loss.head[0])
        right = linear(target, loss.head[1]).argmax(1) == np.repeat(labels.numpy(), grid**2)
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (target, found)]
        expected += np.linalg.norm(unit[0] - unit[1], axis=1)[right].mean()
        count += right.sum()
    assert 0 < count < 80
    student.requires_grad_()
    value = loss([student], [teacher], labels)
    assert value.item() == pytest.approx(expected, rel=1e-9)
    value.backward()
    assert student.grad.abs().sum() > 0 and all(p.grad is not None for p in loss.parameters())
    parts = granularity(reducer=DoNothingReducer())([student], [teacher], labels)
    assert sum(part["losses"].mean() for part in parts.values()).item() == pytest.approx(expected, rel=1e-9)
    for name, part in parts.items():
        assert part["indices"].max() < 4 and len(part["indices"]) == len(part["losses"]), name


def test_granularity_keeps_the_teachers_head_out_of_its_state_and_needs_labels():
    loss = granularity()
    student, teacher = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 5, 8, 8).double()
    assert all(name.startswith("projections.") for name in loss.state_dict())
    nowhere = loss([student.requires_grad_()], [teacher], torch.tensor([-1, -1]))
    nowhere.backward()
    assert nowhere == 0
    empty = loss([student[:0]], [teacher[:0]], torch.empty(0, dtype=torch.long))
    empty.backward()
    assert empty == 0
    with pytest.raises(ValueError, match="UnambiguousGranularityLoss needs a class for each row, but labels are None"):
        loss([student], [teacher])
    with pytest.raises(ValueError, match="one map of each side, but was given 2"):
        loss([student] * 2, [teacher] * 2, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="must be in eval mode"):
        UnambiguousGranularityLoss(4, torch.nn.Linear(5, 7), torch.nn.Linear(7, 3), 7)
