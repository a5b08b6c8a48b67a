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
        (lambda: GradientReset(0), "num_channels must be at least 1, but is 0"),
        (lambda: GradientReset(4, queue_size=0), "queue_size must be at least 1, but is 0"),
        (lambda: GradientReset(4, neighbors=0), "neighbors must be at least 1, but is 0"),
        (lambda: GradientReset(4, ratio=1.5), "ratio must be from 0 to 1, but is 1.5"),
        (lambda: GradientReset(4, metric="l2"), "metric must be one of cosine, euclidean, but is 'l2'"),
        (lambda: GradientReset(4, refresh_interval=0), "refresh_interval must be None or at least 1, but is 0"),
        (lambda: GradientReset(4).update(rows(2), rows(2)), r"\(batch, 4\), but have \(2, 16\) and \(2, 16\)"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
