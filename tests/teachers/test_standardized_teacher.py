"""Standardised embeddings: their statistics, what is saved, several processes, the teachers they wrap."""

import io
import warnings

import pytest
import torch
from torch import nn

from pml_distill.datasets import SeededViews, Views
from pml_distill.teachers import (
    CachedTeacher,
    EnsembleTeacher,
    FrozenTeacher,
    StandardizedTeacher,
    TeacherCache,
)

KINDS = ("center", "pca", "whiten", "phi-s")


def embeddings(rows=2000, width=12, seed=0):
    """Rows with a large mean and very different variances along slanted directions."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64) * torch.logspace(1, -1, width)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return values @ rotation.T + 100


def fitted(values, width=None, kind="whiten", batch=300):
    return StandardizedTeacher(nn.Identity(), width, kind).fit(values.split(batch))


def covariance(values):
    return torch.cov(values.T, correction=0)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_the_statistics_it_promises(kind):
    values = embeddings()
    result = fitted(values, kind=kind).standardize(values)
    assert result.mean(0).abs().max() < 1e-4
    expected, found = torch.linalg.eigvalsh(covariance(values)).flip(0), covariance(result)
    if kind == "center":
        assert torch.allclose(found, covariance(values), rtol=1e-4, atol=1e-4)
    elif kind == "pca":
        assert torch.allclose(found, expected.diag(), rtol=1e-4, atol=1e-4)
    elif kind == "whiten":
        assert torch.allclose(found, torch.eye(12).double(), atol=0.02)
    else:
        assert torch.allclose(found.diagonal(), torch.ones(12).double(), atol=1e-4)
        assert torch.allclose(torch.linalg.eigvalsh(found).flip(0), expected / expected.mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["center", "pca", "phi-s"])
def test_distances_stay_but_for_one_scale(kind):
    values = embeddings(50)
    ratio = torch.pdist(fitted(values, kind=kind).standardize(values)) / torch.pdist(values)
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-4)


@pytest.mark.parametrize("kind", ["pca", "whiten", "phi-s"])
def test_a_smaller_width_keeps_the_main_directions(kind):
    values = embeddings()
    result = fitted(values, 4, kind).standardize(values)
    u, s, _ = torch.linalg.svd(values - values.mean(0), full_matrices=False)
    main = u[:, :4] * s[:4]
    assert result.shape == (2000, 4)
    # One space: each is a linear map of the other.
    assert (main - result @ torch.linalg.lstsq(result, main).solution).abs().max() < 1e-3 * main.abs().max()
    if kind != "phi-s":
        assert torch.allclose(
            fitted(values, kind=kind).standardize(values)[:, :4], result, atol=1e-2 if kind == "pca" else 1e-3
        )


def test_neither_batches_nor_precision_of_what_is_stored_matter():
    values = embeddings()
    whole, parts = fitted(values, batch=2000), fitted(values, batch=7)
    assert torch.allclose(whole.matrix, parts.matrix, rtol=1e-5, atol=1e-6) and torch.allclose(whole.mean, parts.mean)
    half = parts.standardize(values.half())
    assert half.dtype == torch.float32 and half.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(parts.standardize(values.float()), parts.standardize(values.float()))
        assert parts.standardize(values.float()).dtype == torch.float32


def test_what_is_fitted_is_saved_without_the_teacher_and_serves_another():
    values, teacher = torch.randn(200, 6), FrozenTeacher(nn.Linear(6, 8))
    ours = StandardizedTeacher(teacher, width=4).fit([values])
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()))
    assert set(state) == {"mean", "matrix"}
    theirs = StandardizedTeacher(lambda data: teacher(data))
    theirs.load_state_dict(state)
    assert torch.equal(ours(values), theirs(values))
    again = nn.ModuleDict({"teacher": StandardizedTeacher(teacher)})
    again.load_state_dict(nn.ModuleDict({"teacher": ours}).state_dict())
    assert torch.equal(again["teacher"](values), ours(values))
    with pytest.raises(ValueError, match="state is of a StandardizedTeacher of width 4, not 3"):
        StandardizedTeacher(teacher, width=3).load_state_dict(state)


def test_batches_with_labels_rows_and_views_reach_the_teacher(tmp_path):
    teacher = FrozenTeacher(nn.Linear(3, 5))
    dataset = SeededViews([(Views(torch.zeros(3), torch.randn(3)), i % 2) for i in range(40)], views=2)
    TeacherCache(tmp_path, teacher, dataset, batch_size=16).write()
    loader = torch.utils.data.DataLoader(dataset, 16)
    torch.manual_seed(0)
    cached = StandardizedTeacher(CachedTeacher(tmp_path, dataset), 2, "pca").fit(loader)
    torch.manual_seed(0)
    live = StandardizedTeacher(teacher, 2, "pca").fit(loader)
    assert cached.needs_index and not live.needs_index
    assert torch.allclose(cached.matrix, live.matrix, atol=1e-5)
    views, _, rows = next(iter(loader))
    assert torch.allclose(cached(views.student, rows), live(views.teacher), atol=1e-5)
    joint = EnsembleTeacher([cached, live])
    assert joint.needs_index and joint(views.teacher, rows).shape == (16, 4)


def fit_a_share(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # Shares of unequal size, then one that has nothing at all.
    values = embeddings()
    share = values[:700] if rank == 0 else values[700:]
    torch.save(fitted(share).state_dict(), f"{folder}/{rank}.pt")
    empty = StandardizedTeacher(nn.Identity(), kind="phi-s").fit([] if rank == 0 else [values])
    assert torch.equal(empty.mean, values.mean(0).float())
    torch.distributed.destroy_process_group()


def test_several_processes_have_the_result_of_one(tmp_path):
    torch.multiprocessing.spawn(fit_a_share, args=(tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    single = fitted(embeddings()).state_dict()
    for name in ("mean", "matrix"):
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], single[name], rtol=1e-5, atol=1e-6)


def test_directions_without_variance_are_not_blown_up():
    values = embeddings()
    values[:, 3] = 7
    teacher = fitted(values)
    assert teacher.standardize(values + 1e-3 * torch.randn_like(values)).abs().max() < 10
    with pytest.warns(UserWarning, match="whitens 12 coordinates by 10 rows"):
        assert fitted(values[:10]).standardize(values).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(values[:10], width=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StandardizedTeacher(nn.Identity(), kind="zca"), "kind must be one of center, pca.*but is 'zca'"),
        (lambda: StandardizedTeacher(nn.Identity(), 0), "width must be at least 1.*given are 0"),
        (lambda: StandardizedTeacher(nn.Identity(), 3, "center"), "width must be.*given are 3 and 'center'"),
        (lambda: StandardizedTeacher(nn.Linear(2, 2)), "teacher, a Linear, has parameters that require gradients"),
        (lambda: fitted(embeddings(width=6), 7), "width must be at most 6, the teacher's, but is 7"),
        (lambda: fitted(embeddings(width=6), kind="phi-s"), "No Hadamard matrix of width 6.*Give width=4"),
        (lambda: fitted(torch.ones(5, 4)), "All 5 embeddings are alike"),
        (lambda: fitted(torch.tensor([[1.0, torch.nan]])), r"returned \(1, 2\), with 1 values that are NaN"),
        (lambda: fitted(torch.ones(5)), r"finite embeddings \(B, Dt\), but returned \(5,\)"),
        (lambda: StandardizedTeacher(nn.Identity()).fit([]), "loader is empty"),
        (lambda: StandardizedTeacher(nn.Identity())(torch.ones(2, 2)), r"no statistics yet. Call fit\(loader\)"),
        (lambda: fitted(embeddings()).standardize(torch.ones(2, 5)), r"must be \(B, 12\), but are \(2, 5\)"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
