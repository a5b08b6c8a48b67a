"""The losses of a student's query against a gallery of the teacher's: the authors' numbers, and the queue."""

import numpy as np
import pytest
import torch
from golden import FOLDER, cases, raw
from pytorch_metric_learning.distances import CosineSimilarity

from pml_distill.losses import (
    CollaborativeRankLoss,
    DecoupledDifferentialLoss,
    MutualDistanceLoss,
    RankPreservationLoss,
)

LOSSES = {
    "mutual_distance": MutualDistanceLoss,
    "rank_preservation": lambda **kw: RankPreservationLoss(topk=5, **kw),
    "decoupled_differential": lambda **kw: DecoupledDifferentialLoss(topk=5, **kw),
    "collaborative_rank": lambda **kw: CollaborativeRankLoss(topk=5, **kw),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def embeddings(size, seed=0, dtype=torch.float32):
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(name, rows, **kwargs):
    """A loss whose queue of 16 has seen ``rows``, and stays as it is."""
    loss = LOSSES[name](queue_size=16, width=6, **kwargs).to(rows.dtype)
    loss(rows, ref_emb=rows)
    return loss.eval()


@cases("rop")
def test_equals_rop(case):
    case.check(
        RankPreservationLoss(int(case.topk), case.temperature, case.rank_weight)(case.student, ref_emb=case.teacher)
    )


@cases("d3")
def test_equals_d3still(case):
    loss = DecoupledDifferentialLoss(int(case.topk), case.alpha, case.beta, case.gamma)
    case.check(loss(case.student, ref_emb=case.teacher))


def attention(maps, power, height):
    maps = torch.nn.functional.adaptive_avg_pool2d(maps, height)
    return maps.pow(power).mean(dim=1).flatten(1)


def map_cases(file):
    with np.load(FOLDER / f"{file}.npz") as archive:
        arrays = dict(archive)
    names = sorted({key.split("_")[0] for key in arrays})
    found = [{k[4:].removeprefix("hp_"): v for k, v in arrays.items() if k.startswith(n + "_")} for n in names]
    return pytest.mark.parametrize("case", found, ids=names)


def check(loss, student, case):
    (gradient,) = torch.autograd.grad(loss, student)
    official = torch.tensor(case["grad"])
    assert loss.item() == pytest.approx(case["loss"].item(), rel=1e-6)
    assert (gradient - official).norm() <= 1e-6 * official.norm()


@pytest.mark.parametrize("weights", [{"beta": 5, "gamma": 0}, {"beta": 0, "gamma": 2}])
def test_d3still_keeps_its_divisor_where_the_gallery_has_fewer_rows(weights):
    student, teacher = embeddings(8, dtype=torch.float64), embeddings(8, 1, torch.float64)
    whole, fewer = (DecoupledDifferentialLoss(topk, alpha=0, **weights)(student, ref_emb=teacher) for topk in (8, 20))
    assert whole > 0 and fewer.item() == pytest.approx(whole.item() * 7 / 19, rel=1e-12)


def test_mkd_takes_equal_rows_for_a_millionth_apart():
    teacher = embeddings(5, dtype=torch.float64)
    teacher[1] = teacher[0]
    student = (teacher + 0.01 * embeddings(5, 1, torch.float64)).requires_grad_()
    unit = torch.nn.functional.normalize
    between, within = (
        (unit(rows)[:, None] - unit(teacher)).square().sum(dim=2).clamp(min=1e-12).sqrt() for rows in (student, teacher)
    )
    errors = (between - within).square()
    expected = errors.diagonal().mean() + (errors.sum() - errors.trace()) / 20
    found = MutualDistanceLoss()(student, ref_emb=teacher)
    assert found.item() == pytest.approx(expected.item(), rel=1e-8)
    gradients = [torch.autograd.grad(value, student)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)
    assert MutualDistanceLoss()(teacher, ref_emb=teacher) == 0


@map_cases("mkd")
def test_equals_mkd_on_attention_maps(case):
    student, teacher = torch.tensor(case["f_s"], requires_grad=True), torch.tensor(case["f_t"])
    height = min(student.shape[2], teacher.shape[2])
    maps = [attention(f, int(case["p"]), height) for f in (student, teacher)]
    loss = MutualDistanceLoss(
        case["alpha"].item(),
        case["beta"].item() * (len(student) - 1),
        distance=None if case["cosine"] else raw(),
    )
    check(loss(maps[0], ref_emb=maps[1]), student, case)


@map_cases("acrd")
def test_equals_acrd_on_pooled_maps(case):
    student, teacher = torch.tensor(case["f_s"], requires_grad=True), torch.tensor(case["f_t"])
    gallery = torch.tensor(case["gallery"])
    pools = {0: lambda f: f.mean(dim=(2, 3)), 1: lambda f: f.mean(dim=1).flatten(1), 2: lambda f: f.flatten(1)}
    pool = pools[int(case["pool"])]
    loss = CollaborativeRankLoss(
        int(case["k"]),
        case["alpha"].item(),
        case["beta"].item(),
        queue_size=len(gallery),
        width=gallery.shape[1],
        distance=CosineSimilarity() if case["cosine"] else raw(),
    ).double()
    loss(gallery, ref_emb=gallery)
    check(loss(pool(student), ref_emb=pool(teacher)), student, case)


@every_loss
def test_a_queue_that_holds_the_batch_is_the_batch_as_gallery(name):
    student, teacher = embeddings(16), embeddings(16, seed=1)
    loss = LOSSES[name](queue_size=16, width=6, include_batch=True)
    value, expected = loss(student, ref_emb=teacher), LOSSES[name]()(student, ref_emb=teacher)
    if name == "mutual_distance":
        # In a queue the own row is one of the others, too.
        other = MutualDistanceLoss(beta=0)(student, ref_emb=teacher)
        expected = other + (expected - other) * 15 / 16 + other / 16
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)


@every_loss
def test_a_query_never_finds_itself_unless_asked(name):
    student, teacher = embeddings(8), embeddings(8, seed=1)
    loss = filled(name, embeddings(8, seed=2)).train()
    reference = filled(name, embeddings(8, seed=2))
    assert loss(student, ref_emb=teacher) == reference(student, ref_emb=teacher)
    assert loss.queue.count == 16 and torch.equal(loss.queue.rows[8:], teacher)


@every_loss
def test_places_not_yet_filled_do_not_count(name):
    rows, student, teacher = embeddings(3, seed=2), embeddings(8), embeddings(8, seed=1)
    full = LOSSES[name](queue_size=3, width=6)
    full(rows, ref_emb=rows)
    value = filled(name, rows)(student, ref_emb=teacher)
    assert value.item() == pytest.approx(full.eval()(student, ref_emb=teacher).item(), rel=1e-5)


@every_loss
def test_an_empty_queue_gives_zero_and_fills(name):
    student = embeddings(8).requires_grad_()
    loss = LOSSES[name](queue_size=16, width=6)
    if name == "mutual_distance":
        loss = LOSSES[name](alpha=0, queue_size=16, width=6)
    value = loss(student, ref_emb=embeddings(8, seed=1))
    value.backward()
    assert value == 0 and not student.grad.any() and loss.queue.count == 8


@every_loss
def test_gradients_are_correct_with_a_queue(name):
    loss = filled(name, embeddings(16, seed=2, dtype=torch.float64))
    student, teacher = embeddings(7, dtype=torch.float64).requires_grad_(), embeddings(7, 1, torch.float64)
    assert torch.autograd.gradcheck(lambda s: loss(s, ref_emb=teacher), student)


@every_loss
def test_compiles_to_a_single_graph_with_a_queue(name):
    torch._dynamo.reset()
    student, teacher = embeddings(8).requires_grad_(), embeddings(8, seed=1)
    eager, compiled = filled(name, embeddings(8, seed=2)).train(), filled(name, embeddings(8, seed=2)).train()
    for _ in range(2):
        values = (
            eager(student, ref_emb=teacher),
            torch.compile(compiled, fullgraph=True, backend="eager")(student, ref_emb=teacher),
        )
        gradients = [torch.autograd.grad(value, student)[0] for value in values]
        assert torch.allclose(*values) and torch.allclose(*gradients, atol=1e-6)


@every_loss
def test_a_checkpoint_resumes_the_queue(name):
    first, second = filled(name, embeddings(8, seed=2)), LOSSES[name](queue_size=16, width=6).eval()
    second.load_state_dict(first.state_dict())
    assert first(embeddings(8), ref_emb=embeddings(8, seed=1)) == second(embeddings(8), ref_emb=embeddings(8, seed=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RankPreservationLoss(topk=0), "topk must be at least 1, but is 0"),
        (lambda: RankPreservationLoss(temperature=0), "temperature must be a positive number, but is 0"),
        (lambda: RankPreservationLoss(rank_weight=float("nan")), "rank_weight must be a finite number, but is nan"),
        (lambda: DecoupledDifferentialLoss(topk=1), "topk must be at least 2, but is 1"),
        (lambda: DecoupledDifferentialLoss(beta=-1), "beta must be zero or a positive number, but is -1"),
        (lambda: CollaborativeRankLoss(topk=1), "topk must be at least 2, but is 1"),
        (lambda: MutualDistanceLoss(alpha=-1), "alpha must be zero or a positive number, but is -1"),
        (lambda: MutualDistanceLoss(distance=CosineSimilarity()), "distance is the similarity CosineSimilarity"),
        (lambda: MutualDistanceLoss(queue_size=4), "queue_size is 4 and width is None"),
        (lambda: MutualDistanceLoss(include_batch=True), "include_batch is True, but there is no queue"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
