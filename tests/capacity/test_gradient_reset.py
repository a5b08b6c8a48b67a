from pathlib import Path

import numpy as np
import pytest
import torch

from pml_distill.capacity import GradientReset, add_lasso_gradient, group_lasso, shrink_rows

FOLDER = Path(__file__).parents[1] / "golden"


def cases(file):
    with np.load(FOLDER / f"{file}.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    names = sorted({key.split("_")[0] for key in arrays})
    found = [{k[4:].removeprefix("hp_"): v for k, v in arrays.items() if k.startswith(n + "_")} for n in names]
    return pytest.mark.parametrize("case", found, ids=names)


def rows(count, channels=16, seed=0):
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


@cases("crgr_mask_cosine")
def test_marks_what_the_authors_mark(case):
    student, teacher = torch.tensor(case["s"]), torch.tensor(case["t"])
    size, neighbors, ratio = int(case["queue_size"]), int(case["k"]), float(case["ratio"])
    reset = GradientReset(student.shape[1], size, neighbors, ratio).double()
    for batch in torch.tensor(case["history"]):
        reset.enqueue(torch.nn.functional.normalize(batch))
    reset.mask.copy_(torch.tensor(case["mask0"]).bool())
    assert np.array_equal(reset.update(student, teacher).numpy(), case["mask"].astype(bool))
    assert torch.allclose(
        reset.queue[: reset.count], torch.nn.functional.normalize(torch.tensor(case["queue_after"])[: reset.count])
    )


@cases("crgr_sequence")
def test_marks_stay_over_the_authors_sequence(case):
    for layer in range(3):
        students, teachers = torch.tensor(case[f"s_{layer}"]), torch.tensor(case[f"t_{layer}"])
        reset = GradientReset(students.shape[2], int(case["queue_size"]), int(case["k"]), float(case["ratio"])).double()
        for step, (student, teacher) in enumerate(zip(students, teachers)):
            assert np.array_equal(reset.update(student, teacher).numpy(), case[f"mask_{layer}"][step].astype(bool))


def by_definition(gallery, student, teacher, neighbors, lowest, metric):
    """Sample by sample, neighbour by neighbour."""
    normalize = torch.nn.functional.normalize if metric == "cosine" else lambda x: x
    gallery, student, teacher = normalize(gallery), normalize(student), normalize(teacher)
    marked = set(range(student.shape[1]))
    for s, t in zip(student, teacher):
        distances = (gallery - t).norm(dim=1)
        for place in distances.argsort()[:neighbors]:
            marked &= set((gallery[place] * s).abs().argsort()[:lowest].tolist())
    return torch.tensor([channel not in marked for channel in range(student.shape[1])])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("neighbors", [1, 3])
def test_equals_the_definition_with_a_queue_that_is_no_multiple_of_the_batch(metric, neighbors):
    reset = GradientReset(16, 11, neighbors, ratio=0.8, metric=metric, accumulate=False)
    gallery = torch.zeros(0, 16)
    for step in range(6):
        student, teacher = rows(4, seed=step), rows(4, seed=100 + step)
        gallery = torch.cat([gallery, teacher])[-11:]
        expected = by_definition(gallery, student, teacher, neighbors, 12, metric)
        assert torch.equal(reset.update(student, teacher), expected)


def test_marks_stay_are_taken_back_or_stand_alone():
    batches = [(rows(2, seed=i), rows(2, seed=50 + i)) for i in range(6)]
    settings = {"accumulate": {}, "alone": {"accumulate": False}, "refreshed": {"refresh_interval": 2}}
    for name, setting in settings.items():
        reset = GradientReset(16, 2, 1, ratio=0.8, **setting)
        single = [GradientReset(16, 2, 1, ratio=0.8).update(*batch).clone() for batch in batches]
        for step, batch in enumerate(batches):
            mask = reset.update(*batch)
            first = {"accumulate": 0, "alone": step, "refreshed": step - step % 2}[name]
            assert torch.equal(mask, torch.stack(single[first : step + 1]).all(dim=0)), (name, step)


def test_a_queue_shorter_than_the_neighbours_counts_what_is_there():
    reset = GradientReset(16, 100, neighbors=5, ratio=0.8)
    student, teacher = rows(2), rows(2, seed=1)
    expected = by_definition(teacher, student, teacher, 2, 12, "cosine")
    assert torch.equal(reset.update(student, teacher), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_halves_the_queue_and_works(dtype):
    reset = GradientReset(16, 32).to(dtype)
    mask = reset.update(rows(4).to(dtype), rows(4, seed=1))
    assert reset.queue.dtype == dtype and mask.dtype == torch.bool


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rows_that_are_not_finite_have_no_say_now_or_later(metric, value, side):
    reset = GradientReset(16, 32, 2, ratio=0.8, metric=metric, accumulate=False)
    batch = {"student": rows(6), "teacher": rows(6, seed=1)}
    finite = torch.tensor([0, 1, 4, 5])
    gallery = batch["teacher"][finite] if side == "teacher" else batch["teacher"].clone()
    expected = by_definition(gallery, batch["student"][finite], batch["teacher"][finite], 2, 12, metric)
    batch[side][2:4, 5] = value
    assert torch.equal(reset.update(**batch), expected) and not expected.all()
    later = rows(6, seed=2), rows(6, seed=3)
    assert torch.equal(reset.update(*later), by_definition(torch.cat([gallery, later[1]]), *later, 2, 12, metric))


def test_a_batch_that_says_nothing_marks_nothing():
    for batch in ((rows(0), rows(0)), (rows(4), torch.full((4, 16), torch.nan)), (rows(4) * torch.nan, rows(4))):
        for accumulate in (True, False):
            assert GradientReset(16, 32, accumulate=accumulate).update(*batch).all()


def test_a_half_queue_finds_the_neighbours_of_features_whose_squares_it_cannot_hold():
    student, teacher = rows(8) * 100, rows(8, seed=1) * 100
    half, whole = (GradientReset(16, 32, ratio=0.8, metric="euclidean") for _ in range(2))
    assert torch.equal(half.half().update(student, teacher), whole.update(student, teacher))


def test_autocast_of_the_caller_changes_no_neighbour():
    reset, other = GradientReset(64, 500), GradientReset(64, 500)
    for each in (reset, other):
        each.update(rows(480, 64).abs(), rows(480, 64, seed=1).abs())
    teacher = torch.nn.functional.normalize(rows(64, 64, seed=2).abs())
    with torch.autocast("cpu", torch.bfloat16):
        places, _ = reset.nearest(teacher)
    assert torch.equal(places, other.nearest(teacher)[0])


def test_a_mask_once_returned_stays_as_it_is():
    for accumulate in (True, False):
        reset = GradientReset(16, 64, ratio=0.8, accumulate=accumulate)
        mask = reset.update(rows(2), rows(2, seed=1))
        before = mask.clone()
        reset.update(rows(2, seed=2), rows(2, seed=3))
        assert torch.equal(mask, before) and not torch.equal(mask, reset.mask)


def test_a_checkpoint_holds_queue_and_marks():
    first, second = GradientReset(16, 10, ratio=0.8), GradientReset(16, 10, ratio=0.8)
    for step in range(3):
        first.update(rows(2, seed=step), rows(2, seed=9 + step))
    second.load_state_dict(first.state_dict())
    batch = rows(2, seed=20), rows(2, seed=21)
    assert torch.equal(first.update(*batch), second.update(*batch))


@cases("cdd_lasso")
def test_the_lasso_is_the_authors_and_finite_at_zero(case):
    weights = [torch.tensor(case[f"W_{i}"], requires_grad=True) for i in range(int(case["n_blocks"]))]
    loss = group_lasso(weights)
    gradients = torch.autograd.grad(loss, weights)
    assert loss.item() == pytest.approx(case["loss"].item(), rel=1e-8)
    for number, gradient in enumerate(gradients):
        official = torch.tensor(case[f"grad_{number}"])
        assert torch.allclose(gradient, official.nan_to_num(0.0), rtol=1e-8)


@cases("cdd_grad_reset")
def test_reset_and_lasso_change_the_gradient_as_the_authors_do(case):
    weight = torch.tensor(case["kernel"], requires_grad=True)
    weight.grad = torch.tensor(case["grad"]) * torch.tensor(case["mask"])
    masked = weight.grad.clone()
    add_lasso_gradient(weight, float(case["lasso_weight"]))
    official = torch.tensor(case["grad_out"])
    assert torch.allclose(weight.grad, torch.where(official.isnan(), masked, official), rtol=1e-8)


def test_the_proximal_step_shortens_rows_and_makes_short_ones_zero():
    weight = torch.diag(torch.tensor([1.0, 0.2, 0.05, 0.0])).view(4, 4, 1, 1)
    shrink_rows(weight, 0.1)
    assert torch.allclose(weight.flatten(1).norm(dim=1), torch.tensor([0.9, 0.1, 0.0, 0.0]))
    assert not weight[2:].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientReset(0), "num_channels must be a whole number, at least 1, but is 0"),
        (lambda: GradientReset(4, queue_size=0), "queue_size must be a whole number, at least 1, but is 0"),
        (lambda: GradientReset(4, queue_size=10.5), "queue_size must be a whole number, at least 1, but is 10.5"),
        (lambda: GradientReset(4, neighbors=0), "neighbors must be a whole number, at least 1, but is 0"),
        (lambda: GradientReset(4, ratio=1.5), "ratio must be from 0 to 1, but is 1.5"),
        (lambda: GradientReset(4, metric="l2"), "metric must be one of cosine, euclidean, but is 'l2'"),
        (
            lambda: GradientReset(4, refresh_interval=0),
            "refresh_interval must be None, or at least 1 with accumulate=True, but is 0 with accumulate=True",
        ),
        (
            lambda: GradientReset(4, accumulate=False, refresh_interval=3),
            "refresh_interval must be None, or at least 1 with accumulate=True, but is 3 with accumulate=False",
        ),
        (lambda: GradientReset(4, queue_size=2, neighbors=3), "neighbors must be at most queue_size, 2, but is 3"),
        (lambda: GradientReset(4).update(rows(2), rows(2)), r"\(batch, 4\), but have \(2, 16\) and \(2, 16\)"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
