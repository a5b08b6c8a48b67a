"""What every distillation loss promises, whatever it computes."""

import inspect

import pytest
import torch
from pytorch_metric_learning.distances import (
    CosineSimilarity,
    DotProductSimilarity,
    LpDistance,
    SNRDistance,
)
from pytorch_metric_learning.losses import CrossBatchMemory
from pytorch_metric_learning.reducers import (
    AvgNonZeroReducer,
    ClassWeightedReducer,
    DivisorReducer,
    DoNothingReducer,
    MeanReducer,
    PerAnchorReducer,
    SumReducer,
    ThresholdReducer,
)
from pytorch_metric_learning.regularizers import LpRegularizer
from torch._dynamo.testing import CompileCounter

from pml_distill.losses import (
    AbsoluteTeacherLoss,
    AsymmetricRegressionLoss,
    CollaborativeRankLoss,
    CorrelationCongruenceLoss,
    CosineTeacherLoss,
    DarkRankLoss,
    DecoupledDifferentialLoss,
    LogitDistillationLoss,
    MatryoshkaLoss,
    MultipleDistillationLosses,
    MutualDistanceLoss,
    ProbabilisticTransferLoss,
    RankPreservationLoss,
    RegressionTeacherLoss,
    RelativeTeacherLoss,
    RelaxedContrastiveLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    RKDLoss,
    SimilarityPreservingLoss,
    SimilarityRegressionLoss,
)

LOSSES = {
    "absolute": AbsoluteTeacherLoss,
    "relative": RelativeTeacherLoss,
    "relative_l2": lambda **kw: RelativeTeacherLoss("l2", **kw),
    "relative_huber": lambda **kw: RelativeTeacherLoss("huber", **kw),
    "relative_frobenius": lambda **kw: RelativeTeacherLoss("frobenius", **kw),
    "similarity_regression": SimilarityRegressionLoss,
    "soft": lambda **kw: DarkRankLoss("soft", list_length=3, **kw),
    "soft_without_tail": lambda **kw: DarkRankLoss("soft", list_length=3, tail=False, **kw),
    "hard": lambda **kw: DarkRankLoss("hard", list_length=3, **kw),
    "hard_whole_batch": lambda **kw: DarkRankLoss("hard", list_length=None, **kw),
    "logit": LogitDistillationLoss,
    "regression": RegressionTeacherLoss,
    "regression_smooth_l1": lambda **kw: RegressionTeacherLoss("smooth_l1", **kw),
    "cosine": CosineTeacherLoss,
    "rkd_distance": RKDDistanceLoss,
    "rkd_angle": RKDAngleLoss,
    "similarity_preserving": SimilarityPreservingLoss,
    "probabilistic_transfer": ProbabilisticTransferLoss,
    "correlation_congruence": CorrelationCongruenceLoss,
    "relaxed_contrastive": RelaxedContrastiveLoss,
    "asymmetric_regression": AsymmetricRegressionLoss,
    "mutual_distance": MutualDistanceLoss,
    "rank_preservation": RankPreservationLoss,
    "decoupled_differential": DecoupledDifferentialLoss,
    "collaborative_rank": CollaborativeRankLoss,
    "rkd": RKDLoss,
    "multiple": lambda **kw: MultipleDistillationLosses([RelativeTeacherLoss(**kw), DarkRankLoss(**kw)], [1, 0.5]),
    "matryoshka": lambda **kw: MatryoshkaLoss(RelativeTeacherLoss(**kw), widths=(3, 5)),
    "matryoshka_pointwise": lambda **kw: MatryoshkaLoss(CosineTeacherLoss(**kw), widths=(3, 5)),
}
SUB_LOSSES = {
    "asymmetric_regression": ["absolute", "teacher_student", "student_student"],
    "mutual_distance": ["own", "others"],
    "decoupled_differential": ["feature", "hard", "simple"],
    "collaborative_rank": ["nearest", "ranks"],
}
# They reduce nothing themselves: reducers and regularizers are those of the losses inside.
WRAPPERS = ("rkd", "multiple", "matryoshka", "matryoshka_pointwise")
POINTWISE = ("absolute", "logit", "regression", "regression_smooth_l1", "cosine")
EQUAL_WIDTHS = (*POINTWISE, "rank_preservation", "matryoshka_pointwise", *SUB_LOSSES)
PROPER_DISTANCE = ("rkd", "rkd_distance", "relaxed_contrastive")
PAIRWISE = (
    "relative",
    "relative_l2",
    "relative_huber",
    "similarity_regression",
    "rkd_distance",
    "correlation_congruence",
    "relaxed_contrastive",
)
every_loss = pytest.mark.parametrize("name", LOSSES)
every_plain_loss = pytest.mark.parametrize("name", [name for name in LOSSES if name not in WRAPPERS])


def embeddings(size, width=6, seed=0, dtype=torch.float32):
    return torch.randn(size, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def degenerate_batches():
    usual = embeddings(8)
    zero = usual.clone()
    zero[2] = 0
    twins = usual.clone()
    twins[1] = twins[0]
    other = embeddings(8, seed=1)
    return {
        "usual": (usual, other),
        "zero student row": (zero, other),
        "zero teacher row": (other, zero),
        "all zero": (torch.zeros(8, 6), torch.zeros(8, 6)),
        "duplicate student rows": (twins, other),
        "duplicate teacher rows": (other, twins),
        "student equals teacher": (usual, usual),
        "all rows equal": (usual[:1].repeat(8, 1), other),
        "more rows than 25": (embeddings(40), embeddings(40, seed=1)),
        "large": (300 * usual, 300 * other),
    }


@every_loss
@pytest.mark.parametrize(
    "indices_tuple",
    [None, ([0, 0, 5], [1, 2, 3], [0, 2, 2], [4, 1, 6]), ([0, 0, 5, 2], [1, 2, 3, 0], [4, 6, 1, 5])],
    ids=["all", "pairs", "triplets"],
)
def test_gradients_are_correct(name, indices_tuple):
    loss, teacher = LOSSES[name](), embeddings(7, seed=1, dtype=torch.float64)
    student = embeddings(7, dtype=torch.float64).requires_grad_()
    chosen = indices_tuple and tuple(map(torch.tensor, indices_tuple))
    assert torch.autograd.gradcheck(lambda s: loss(s, None, chosen, teacher), student)


@every_loss
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_degenerate_batches_have_finite_values_and_gradients(name, dtype, autocast):
    for what, (student, teacher) in degenerate_batches().items():
        student = student.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            value = LOSSES[name]()(student, ref_emb=teacher.to(dtype))
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), what
        value.backward()
        assert torch.isfinite(value), what
        assert torch.isfinite(student.grad).all(), what


@every_loss
def test_half_precision_stays_near_float32(name):
    student, teacher = embeddings(32), embeddings(32, seed=1)
    exact = LOSSES[name]()(student, ref_emb=teacher)
    assert LOSSES[name]()(student.half(), ref_emb=teacher.half()).item() == pytest.approx(exact.item(), rel=1e-2)


@every_loss
def test_a_batch_of_one_back_propagates(name):
    student = embeddings(1).requires_grad_()
    value = LOSSES[name]()(student, torch.tensor([3]), ref_emb=embeddings(1, seed=1))
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(student.grad).all()
    if name not in EQUAL_WIDTHS:
        assert value == 0


@every_loss
@pytest.mark.parametrize("kind", ["no rows", "no pairs", "no triplets"])
def test_an_empty_batch_and_empty_pairs_are_a_zero_loss_that_back_propagates(name, kind):
    rows, nothing = (0 if kind == "no rows" else 8), torch.empty(0, dtype=torch.long)
    student, loss = embeddings(8).requires_grad_(), LOSSES[name]()
    pairs = {"no pairs": (nothing,) * 4, "no triplets": (nothing,) * 3}.get(kind)
    value = loss(student[:rows], None, pairs, ref_emb=embeddings(8, seed=1)[:rows])
    value.backward()
    assert student.grad is not None and torch.isfinite(student.grad).all()
    if kind == "no rows" or (loss.takes_pairs and name != "asymmetric_regression"):
        assert value == 0 and (student.grad == 0).all()


@every_loss
def test_labels_are_optional_and_change_nothing(name):
    student, teacher = embeddings(8), embeddings(8, seed=1)
    given = (None, torch.arange(8), torch.zeros(8), torch.eye(8, 3))
    values = [LOSSES[name]()(student, labels, ref_emb=teacher) for labels in given]
    assert values[0] == values[1] == values[2] == values[3]


@every_loss
def test_the_order_of_the_batch_does_not_matter(name):
    student, teacher = embeddings(9, dtype=torch.float64), embeddings(9, seed=1, dtype=torch.float64)
    order = torch.randperm(9)
    value = LOSSES[name]()(student, ref_emb=teacher)
    assert LOSSES[name]()(student[order], ref_emb=teacher[order]).item() == pytest.approx(value.item())


@every_loss
def test_the_teacher_gets_no_gradient_and_the_inputs_stay_as_they_are(name):
    student, teacher = embeddings(8).requires_grad_(), embeddings(8, seed=1).requires_grad_()
    before = student.detach().clone(), teacher.detach().clone()
    LOSSES[name]()(student, ref_emb=teacher).backward()
    assert teacher.grad is None and student.grad is not None
    assert torch.equal(before[0], student) and torch.equal(before[1], teacher)


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in EQUAL_WIDTHS])
@pytest.mark.parametrize(
    "distance", [LpDistance, CosineSimilarity, DotProductSimilarity, SNRDistance], ids=lambda d: d.__name__
)
def test_widths_may_differ_under_any_distance(name, distance):
    if name in PROPER_DISTANCE and distance().is_inverted:
        with pytest.raises(ValueError, match=f"distance is the similarity {distance.__name__}"):
            LOSSES[name](distance=distance())
        return
    student = embeddings(8, 6).requires_grad_()
    value = LOSSES[name](distance=distance())(student, ref_emb=embeddings(8, 11, seed=1))
    value.backward()
    assert torch.isfinite(value) and student.grad.abs().sum() > 0


@every_plain_loss
@pytest.mark.parametrize(
    "reducer", [MeanReducer(), SumReducer(), AvgNonZeroReducer(), ThresholdReducer(low=0), PerAnchorReducer()]
)
def test_reducers(name, reducer):
    student, teacher = embeddings(8).requires_grad_(), embeddings(8, seed=1)
    parts = LOSSES[name](reducer=DoNothingReducer())(student, ref_emb=teacher)
    value = LOSSES[name](reducer=reducer)(student, ref_emb=teacher)
    reduce = torch.sum if isinstance(reducer, SumReducer) else torch.mean
    expected = sum(reduce(details["losses"]) for details in parts.values())
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    if name in SUB_LOSSES:
        assert list(parts) == SUB_LOSSES[name]
        return
    (details,) = parts.values()
    losses = details["losses"]
    if name in PAIRWISE:
        assert details["reduction_type"] == "pos_pair" and len(losses) == 8 * 7
        assert bool((details["indices"][0] != details["indices"][1]).all())
    elif name != "relative_frobenius":
        assert details["reduction_type"] == "element" and details["indices"].tolist() == list(range(8))


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("relative_frobenius", *SUB_LOSSES, *WRAPPERS)])
def test_class_weights(name):
    labels, weights = torch.arange(8) % 2, torch.tensor([1.0, 3.0])
    student, teacher = embeddings(8), embeddings(8, seed=1)
    details = LOSSES[name](reducer=DoNothingReducer())(student, labels, ref_emb=teacher)["loss"]
    rows = details["indices"][0] if name in PAIRWISE else details["indices"]
    expected = (details["losses"] * weights[labels[rows]]).mean()
    value = LOSSES[name](reducer=ClassWeightedReducer(weights))(student, labels, ref_emb=teacher)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in WRAPPERS])
def test_class_weights_without_labels_are_refused(name):
    loss = LOSSES[name](reducer=ClassWeightedReducer(torch.tensor([1.0, 3.0])))
    for labels in (None, torch.eye(8, 2)):
        with pytest.raises(ValueError, match=f"ClassWeightedReducer of {type(loss).__name__} needs a class"):
            loss(embeddings(8), labels, ref_emb=embeddings(8, seed=1))
    assert loss.needs_labels


@every_plain_loss
@pytest.mark.parametrize("mined", [False, True])
def test_the_divisor_is_the_number_of_values(name, mined):
    pairs = (torch.tensor([0, 1, 5]), torch.tensor([1, 2, 6]), torch.tensor([2]), torch.tensor([7])) if mined else None
    values = [
        LOSSES[name](reducer=reducer)(embeddings(8), None, pairs, ref_emb=embeddings(8, seed=1)).item()
        for reducer in (DivisorReducer(), MeanReducer())
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@every_plain_loss
def test_embedding_regularizer(name):
    student, teacher = embeddings(8), embeddings(8, seed=1)
    plain = LOSSES[name]()(student, ref_emb=teacher)
    regularized = LOSSES[name](embedding_regularizer=LpRegularizer(), embedding_reg_weight=0.5)
    expected = plain + 0.5 * student.norm(dim=1).mean()
    assert regularized(student, ref_emb=teacher).item() == pytest.approx(expected.item(), rel=1e-5)


@every_loss
def test_a_teacher_in_inference_mode_teaches_the_same(name):
    student, teacher = embeddings(8).requires_grad_(), embeddings(8, seed=1)
    with torch.inference_mode():
        inferred = teacher.clone()
    for distance in (None, LpDistance(normalize_embeddings=False)):
        loss = LOSSES[name](distance=distance)
        values = loss(student, ref_emb=inferred), loss(student, ref_emb=teacher)
        gradients = [torch.autograd.grad(value, student)[0] for value in values]
        assert torch.equal(*values) and torch.equal(*gradients)


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("rkd_angle", "rkd")])
def test_function_transforms_give_the_same_gradient(name):
    # The angles: torch.func cannot go through an operator with register_autograd (pytorch/pytorch#168393).
    student, teacher, loss = embeddings(8).requires_grad_(), embeddings(8, seed=1), LOSSES[name]()
    expected = torch.autograd.grad(loss(student, ref_emb=teacher), student)[0]
    assert torch.equal(torch.func.grad(lambda s: loss(s, ref_emb=teacher))(student.detach()), expected)


@every_loss
def test_compiles_to_a_single_graph(name):
    torch._dynamo.reset()
    student, teacher = embeddings(8).requires_grad_(), embeddings(8, seed=1)
    loss = LOSSES[name]()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    values = compiled(student, ref_emb=teacher), loss(student, ref_emb=teacher)
    gradients = [torch.autograd.grad(value, student)[0] for value in values]
    assert torch.allclose(*values) and torch.allclose(*gradients, atol=1e-6)


@every_loss
def test_a_miners_pairs_compile_to_a_single_graph(name):
    torch._dynamo.reset()
    student, teacher, loss = embeddings(8).requires_grad_(), embeddings(8, seed=1), LOSSES[name]()
    pairs = tuple(map(torch.tensor, ([0, 0, 5], [1, 2, 3], [0, 2, 2], [4, 1, 6])))
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    values = compiled(student, None, pairs, teacher), loss(student, None, pairs, teacher)
    gradients = [torch.autograd.grad(value, student)[0] for value in values]
    assert torch.allclose(*values) and torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "hard_whole_batch"])
def test_all_batch_sizes_share_a_graph(name):
    # hard_whole_batch: the passes over a list of the whole batch grow with the logarithm of its length.
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(LOSSES[name](), backend=counter, dynamic=True)
    for size in (10, 11, 16, 21):
        compiled(embeddings(size).requires_grad_(), ref_emb=embeddings(size, seed=1))
    assert counter.frame_count == 1


@every_loss
@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((8, 6), None, r"needs the teacher's embeddings: pass ref_emb=.*\(8, 6\)"),
        ((8, 6), (7, 6), r"row for row.*embeddings has shape \(8, 6\) and ref_emb has shape \(7, 6\)"),
        ((8, 6), (8,), r"2-D.*\(8, 6\).*\(8,\)"),
        ((8, 2, 3), (8, 2, 3), r"2-D.*\(8, 2, 3\)"),
    ],
)
def test_wrong_shapes_are_named(name, student, teacher, message):
    teacher = None if teacher is None else torch.zeros(teacher)
    with pytest.raises(ValueError, match=message):
        LOSSES[name]()(torch.zeros(student), ref_emb=teacher)


@every_plain_loss
def test_it_is_logged_like_a_pml_loss_and_has_no_parameters(name):
    loss = LOSSES[name]()
    assert list(loss.parameters()) == []
    arguments = inspect.signature(type(loss)).parameters
    recorded = getattr(loss, "_record_these", [])
    assert {key for key, argument in arguments.items() if isinstance(argument.default, float)} <= set(recorded)
    # PML sets what is missing to 0, so that a misspelt name would be logged.
    assert all(getattr(loss, key) == arguments[key].default for key in recorded)


def test_cross_batch_memory_refuses_with_pmls_own_message():
    with pytest.raises(Exception, match="supported"):
        CrossBatchMemory(RelativeTeacherLoss(), 6)
