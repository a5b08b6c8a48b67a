"""Writing a cache: what is stored, kills, damage, several writers, full disks."""

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pml_distill.datasets import CrossQuality, LabeledAndUnlabeled, SeededViews
from pml_distill.teachers import (
    CachedTeacher,
    EnsembleTeacher,
    FrozenTeacher,
    TeacherCache,
    array_folder,
    teacher_cache,
)
from pml_distill.teachers.array_folder import ArrayFolder


class Noisy(torch.utils.data.Dataset):
    """A number and noise that is drawn anew at each read."""

    def __init__(self, size=50, seconds=0.0):
        self.size, self.seconds = size, seconds

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        if not 0 <= i < self.size:
            raise IndexError(i)
        time.sleep(self.seconds)
        return float(i) + torch.randn(1, 4, 4), i % 5


class LoggingTeacher(FrozenTeacher):
    """Notes each of its batches in a file, from whatever process."""

    needs_index = True
    log: Path | None = None

    def forward(self, data, index=None):
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f"{int(index[0])}\n")
        return super().forward(data, index)


def make_teacher(width=6, seed=0):
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, width))
    return LoggingTeacher(trunk)


def make_dataset(size=50, views=2, seconds=0.0, seed=0):
    return SeededViews(Noisy(size, seconds), seed, views)


def expected(teacher, dataset):
    data = torch.stack([data for data, _, _ in dataset.read(range(dataset.num_rows))])
    return teacher(data)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_read_is_what_the_teacher_returned(tmp_path, dtype, num_workers):
    teacher, dataset = make_teacher(), make_dataset()
    TeacherCache(tmp_path, teacher, dataset, dtype, batch_size=8).write(num_workers)
    cached, rows = CachedTeacher(tmp_path, dataset, teacher), torch.randperm(100)
    embeddings = cached(torch.zeros(100, 1), rows)
    assert embeddings.dtype == dtype and embeddings.shape == (100, 6)
    atol = {torch.float32: 1e-5, torch.float16: 3e-2, torch.bfloat16: 3e-1}[dtype]
    assert torch.allclose(embeddings.float(), expected(teacher, dataset)[rows], atol=atol, rtol=0)
    repeated = torch.tensor([3, 99, 3])
    assert torch.equal(cached(torch.zeros(3, 1), repeated), embeddings[rows.argsort()][repeated])


def test_logits_and_pooled_features_are_stored_on_request(tmp_path):
    teacher, dataset, classifier = make_teacher(), make_dataset(), nn.Linear(6, 9)
    TeacherCache(tmp_path, teacher, dataset, classifier=classifier, features=["0", "2"]).write()
    cached, rows = CachedTeacher(tmp_path, dataset), torch.tensor([70, 2, 33])
    data = torch.stack([data for data, _, _ in dataset.read(rows.tolist())])
    assert torch.allclose(cached.logits(rows), classifier(teacher(data)), atol=1e-5)
    with teacher.tap(["2", "0"]) as live, cached.tap(["2", "0"]) as tap:
        teacher(data), cached(data, rows)
    for ours, theirs in zip(tap.features, live.features):
        assert ours.shape == (3, 3, 1, 1) and torch.allclose(ours, theirs.mean((2, 3), keepdim=True), atol=1e-5)


def test_the_teacher_sees_its_own_view(tmp_path):
    teacher = make_teacher()
    dataset = SeededViews(CrossQuality(Noisy(), torch.zeros_like))
    TeacherCache(tmp_path, teacher, dataset).write()
    clean = torch.stack([views.teacher for views, _, _ in dataset.read(range(50))])
    embeddings = CachedTeacher(tmp_path, dataset)(clean, torch.arange(50))
    assert torch.allclose(embeddings, teacher(clean), atol=1e-5)


def test_a_teacher_in_train_mode_writes_what_it_returns_in_eval_mode(tmp_path):
    torch.manual_seed(0)
    teacher = BareTeacher(nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5)))
    before = teacher.inner[2].running_mean.clone()
    TeacherCache(tmp_path, teacher, make_dataset(), batch_size=8).write()
    assert teacher.training and teacher.inner[2].training
    assert torch.equal(before, teacher.inner[2].running_mean)
    cached = CachedTeacher(tmp_path, make_dataset(), teacher)
    assert torch.allclose(
        cached(torch.zeros(100, 1), torch.arange(100)), expected(teacher.eval(), make_dataset()), atol=1e-5
    )


class BareTeacher(nn.Module):
    """A frozen module that nobody has put into eval mode; ``change`` makes other outputs of its own."""

    needs_index = True

    def __init__(self, inner, change=lambda outputs, index: outputs):
        super().__init__()
        self.inner, self.change = inner, change
        self.requires_grad_(False)

    def forward(self, data, index=None):
        return self.change(self.inner(data), index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, rows: x.reshape(-1, 4, 4), r"embeddings of 8 samples must have the shape \(8, width\).*\(8, 4, 4\)"),
        (lambda x, rows: x.repeat(2, 1), r"\(8, width\), but have \(16, 16\)"),
        (lambda x, rows: x.mean(1), r"\(8, width\), but have \(8,\)"),
        (
            lambda x, rows: x[:, : 16 - int(rows[0] == 24)],
            r"embeddings of the rows 24 to 31 must have the shape \(8, 16\), but have \(8, 15\)",
        ),
    ],
)
def test_outputs_of_another_shape_are_refused(tmp_path, change, message):
    cache = TeacherCache(tmp_path, BareTeacher(nn.Flatten(), change), make_dataset(), batch_size=8)
    with pytest.raises(ValueError, match=message):
        cache.write()


class Tokens(nn.Module):
    def forward(self, data):
        return data.flatten(2)


def test_features_that_are_vectors_are_stored_and_tokens_refused(tmp_path):
    teacher = FrozenTeacher(nn.Sequential(Tokens(), nn.Flatten(), nn.Linear(16, 3)))
    TeacherCache(tmp_path / "vectors", teacher, make_dataset(), features=["1", "1"]).write()
    cached = CachedTeacher(tmp_path / "vectors", make_dataset())
    (data, _, row) = make_dataset().read([30])[0]
    with cached.tap(["1"]) as tap:
        cached(data[None], torch.tensor([row]))
    assert torch.equal(tap.features[0].flatten(), data.flatten())
    with pytest.raises(ValueError, match=r"'0', whose output has the shape \(64, 1, 16\).*tokens are not pooled"):
        TeacherCache(tmp_path / "tokens", teacher, make_dataset(), features=["0"]).write()


def test_logits_of_a_classifier_that_does_nothing(tmp_path):
    TeacherCache(tmp_path, make_teacher(), make_dataset(), classifier=nn.Sequential()).write()
    cached, rows = CachedTeacher(tmp_path, make_dataset()), torch.tensor([3, 8])
    assert torch.equal(cached.logits(rows), cached(torch.zeros(2, 1), rows))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_callers_random_numbers_go_on_as_if_nothing_was_written(tmp_path, num_workers):
    torch.manual_seed(0)
    teacher, drawn = make_teacher(), torch.rand(())
    torch.manual_seed(0)
    teacher = make_teacher()
    TeacherCache(tmp_path, teacher, make_dataset()).write(num_workers)
    CachedTeacher(tmp_path, make_dataset())
    assert torch.rand(()) == drawn


@pytest.mark.parametrize(("batch_size", "processes", "times"), [(10, 1, 10), (400, 1, 1), (10, 5, 2)])
def test_the_time_of_the_first_batch_tells_that_of_all(tmp_path, monkeypatch, capsys, batch_size, processes, times):
    clock = iter([0, 10, 40])
    monkeypatch.setattr(teacher_cache, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    TeacherCache(tmp_path, make_teacher(), make_dataset(), batch_size=batch_size).open_or_create(processes)
    told = capsys.readouterr().err
    assert f"about {10 * times} s of reading, shared by the workers, and {30 * times} s of the teacher" in told


def test_size_and_time_are_told_before_it_begins(tmp_path, capsys):
    TeacherCache(tmp_path, make_teacher(), make_dataset(), batch_size=8).write()
    told = capsys.readouterr().err
    assert "100 rows, 0.0 MiB; about 0 s of reading" in told and "100/100" in told


def test_nothing_is_computed_twice(tmp_path):
    teacher, dataset = make_teacher(), make_dataset()
    cache = TeacherCache(tmp_path / "cache", teacher, dataset, batch_size=8)
    cache.write()
    before = contents(tmp_path / "cache")
    teacher.log = tmp_path / "log"
    cache.write()
    assert contents(tmp_path / "cache") == before and not teacher.log.exists()


def write_slowly(folder, num_workers, log):
    teacher = make_teacher()
    teacher.log = log
    TeacherCache(folder, teacher, make_dataset(100, 3, seconds=2e-3), batch_size=5).write(num_workers)


def num_written(folder):
    path = folder / "finished.npy"
    try:
        return np.count_nonzero(np.load(path, mmap_mode="r")) // 5
    except (OSError, ValueError, EOFError):
        return 0


def kill_twenty_times(folder, log):
    """Fork, write, kill; in a process of its own that has no threads, so that each fork starts at once."""
    draw = random.Random(0)
    for kill in range(20):
        goal = num_written(folder) + draw.randrange(3)
        child = os.fork()
        if child == 0:
            write_slowly(folder, 2 if kill % 5 == 4 else 0, log)
            os._exit(0)
        while num_written(folder) < goal and os.waitpid(child, os.WNOHANG)[0] == 0:
            time.sleep(1e-3)
        time.sleep(draw.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert num_written(folder) < 60, "it was done before it was killed"


def test_twenty_kills_cost_a_batch_each_and_leave_no_trace(tmp_path):
    folder, undisturbed, log = tmp_path / "killed", tmp_path / "whole", tmp_path / "log"
    code = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_teacher_cache import kill_twenty_times
kill_twenty_times(*map(Path, sys.argv[2:]))
"""
    arguments = [str(Path(__file__).parent), str(folder), str(log)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr.decode()
    write_slowly(folder, 0, log)
    write_slowly(undisturbed, 0, None)
    assert contents(folder) == contents(undisturbed)
    # At most one batch twice for each kill.
    assert len(log.read_text().split()) <= 60 + 20


def write_as_rank(rank, folder, processes):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    teacher = make_teacher()
    cache = TeacherCache(folder / "cache", teacher, make_dataset(), batch_size=8)
    teacher.log = folder / f"log{rank}"
    cache.write()
    assert np.load(folder / "cache" / "finished.npy").all()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_several_processes_share_the_work(tmp_path):
    (tmp_path / "several").mkdir()
    torch.multiprocessing.spawn(write_as_rank, args=(tmp_path / "several", 2), nprocs=2)
    TeacherCache(tmp_path / "single", make_teacher(), make_dataset(), batch_size=8).write()
    assert contents(tmp_path / "several" / "cache") == contents(tmp_path / "single")
    batches = [(tmp_path / "several" / f"log{rank}").read_text().split() for rank in range(2)]
    assert [len(b) for b in batches] == [7, 6] and not set(batches[0]) & set(batches[1])


def write_with_own_teacher(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    cache = TeacherCache(folder / "cache", make_teacher(seed=rank), make_dataset(), batch_size=8)
    if rank == 0:
        cache.write()
    else:
        with pytest.raises(ValueError, match="belongs to something else:\n  teacher: "):
            cache.write()
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_process_with_another_teacher_is_refused(tmp_path):
    torch.multiprocessing.spawn(write_with_own_teacher, args=(tmp_path,), nprocs=2)
    with pytest.raises(ValueError, match="incomplete: 52 of 100 rows"):
        CachedTeacher(tmp_path / "cache", make_dataset())
    TeacherCache(tmp_path / "cache", make_teacher(), make_dataset(), batch_size=8).write()
    embeddings = CachedTeacher(tmp_path / "cache", make_dataset())(torch.zeros(100, 1), torch.arange(100))
    assert torch.allclose(embeddings, expected(make_teacher(), make_dataset()), atol=1e-5)


def write_where_another_cache_is(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with pytest.raises(ValueError, match="belongs to something else:\n  teacher: "):
        TeacherCache(folder / "cache", make_teacher(seed=1), make_dataset(), batch_size=8).write()
    # Both processes have left it, so that they meet again.
    TeacherCache(folder / "new", make_teacher(), make_dataset(), batch_size=8).write()
    torch.distributed.destroy_process_group()


def test_what_the_first_process_refuses_is_refused_in_all(tmp_path):
    TeacherCache(tmp_path / "cache", make_teacher(), make_dataset(), batch_size=8).write()
    torch.multiprocessing.spawn(write_where_another_cache_is, args=(tmp_path,), nprocs=2)
    assert contents(tmp_path / "cache") == contents(tmp_path / "new")


def hold(folder, ready, done):
    with array_folder.locked(folder):
        ready.set()
        done.wait()


def test_two_writers_are_refused(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done), daemon=True)
    other.start()
    ready.wait()
    with pytest.raises(RuntimeError, match=f"Another process is writing the teacher cache in {tmp_path}"):
        TeacherCache(tmp_path, make_teacher(), make_dataset()).write()
    done.set()
    other.join()
    TeacherCache(tmp_path, make_teacher(), make_dataset()).write()


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def without(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", without)
    with pytest.raises(OSError, match="No locks available"):
        TeacherCache(tmp_path, make_teacher(), make_dataset()).write()


def test_a_second_writer_in_one_process_is_refused(tmp_path):
    with array_folder.locked(tmp_path):
        with pytest.raises(RuntimeError, match="This process is already writing the teacher cache in"):
            TeacherCache(tmp_path / ".." / tmp_path.name, make_teacher(), make_dataset()).write()
    TeacherCache(tmp_path, make_teacher(), make_dataset()).write()


CHANGES = {
    "teacher": ({"teacher": make_teacher(seed=1)}, "teacher: "),
    "ensemble": ({"teacher": EnsembleTeacher([make_teacher()])}, "teacher: "),
    "shorter": ({"dataset": make_dataset(49)}, "length: 50 in the cache, 49 now"),
    "longer": ({"dataset": make_dataset(51)}, "length: 50 in the cache, 51 now"),
    "views": ({"dataset": make_dataset(views=3)}, "views: 2 in the cache, 3 now"),
    "seed": ({"dataset": make_dataset(seed=7)}, "seed: 0 in the cache, 7 now"),
    "precision": ({"dtype": torch.float16}, "dtype: torch.float32 in the cache, torch.float16 now"),
    "arrays": ({"features": ["0"]}, r"arrays: \['embeddings'\] in the cache, \['embeddings', 'features.0'\] now"),
    "classifier": ({"classifier": nn.Linear(6, 2)}, "classifier: None in the cache"),
    "pixels": (
        {"dataset": SeededViews(torch.utils.data.TensorDataset(torch.zeros(50, 1, 4, 4), torch.zeros(50)), 0, 2)},
        "samples: what the dataset yields for the rows 0, 3, 6",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_teacher_or_dataset_is_refused_with_what_differs(tmp_path, name):
    TeacherCache(tmp_path, make_teacher(), make_dataset()).write()
    before = contents(tmp_path)
    changes, message = CHANGES[name]
    given = {"teacher": make_teacher(), "dataset": make_dataset()} | changes
    with pytest.raises(ValueError, match=f"belongs to something else:(.|\n)*{message}"):
        TeacherCache(tmp_path, **given).write()
    if name in ("shorter", "longer", "views", "seed", "pixels"):
        with pytest.raises(ValueError, match=message):
            CachedTeacher(tmp_path, given["dataset"])
    if name in ("teacher", "ensemble"):
        with pytest.raises(ValueError, match=message):
            CachedTeacher(tmp_path, given["dataset"], given["teacher"])
    assert contents(tmp_path) == before


def test_other_transforms_are_refused(tmp_path):
    TeacherCache(tmp_path, make_teacher(), make_dataset()).write()
    dataset = make_dataset()
    dataset.dataset.transform = nn.Identity()
    with pytest.raises(ValueError, match=r"transform: \[\] in the cache, \['transform: Identity\(\)'\] now"):
        CachedTeacher(tmp_path, dataset)


def test_other_versions_are_noted_where_what_is_computed_again_agrees(tmp_path, monkeypatch):
    TeacherCache(tmp_path, make_teacher(), make_dataset()).write()
    monkeypatch.setattr("pml_distill.teachers.fingerprint.version", lambda name: "0.1")
    teacher = make_teacher()
    teacher.log = tmp_path / "log"
    with pytest.warns(
        UserWarning, match="other libraries, but what was computed again agrees: version of torch: .* 0.1"
    ):
        CachedTeacher(tmp_path, make_dataset())
    with pytest.warns(UserWarning, match="other libraries"):
        TeacherCache(tmp_path, teacher, make_dataset()).write()
    assert len(teacher.log.read_text().split()) == 1
    monkeypatch.setattr("torch.randn", lambda *shape: torch.rand(*shape))
    with pytest.raises(ValueError, match="samples: what the dataset yields for the rows"):
        CachedTeacher(tmp_path, make_dataset())
    with pytest.warns(UserWarning, match="belongs to something else"):
        CachedTeacher(tmp_path, make_dataset(), strict=False)


def test_a_set_in_a_transform_is_the_same_in_every_process():
    code = """
from pml_distill.teachers.fingerprint import described
class Only:
    def __init__(self):
        self.names = {"bird", "cat", "dog"}
print(described(Only()))
"""
    texts = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        texts.append(subprocess.check_output([sys.executable, "-c", code], env=environment, text=True))
    assert texts[0] == texts[1] and "'bird', 'cat', 'dog'" in texts[0]


class Flip:
    """Turns some samples upside down, and says nothing of how many."""

    def __init__(self, share):
        self.share = share

    def __call__(self, data):
        return -data if random.random() < self.share else data


class Rows(torch.utils.data.Dataset):
    def __init__(self, values, labels, transform=None):
        self.values, self.labels, self.transform = values, labels, transform
        self.targets = None  # as in torchvision's datasets without labels

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        return self.values[i] if self.transform is None else self.transform(self.values[i]), self.labels[i]


def compose(share):
    from torchvision.transforms import v2

    return v2.Compose([Flip(share)])


VALUES, SWAPPED = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)), list(range(400))
SWAPPED[7], SWAPPED[8] = 8, 7


def test_a_changed_order_is_right(tmp_path):
    teacher, data = FrozenTeacher(nn.Linear(2, 2)), Rows(VALUES, [0] * 400)
    TeacherCache(tmp_path, teacher, SeededViews(torch.utils.data.Subset(data, range(400)))).write()
    cached = CachedTeacher(tmp_path, SeededViews(torch.utils.data.Subset(data, SWAPPED)), teacher)
    assert torch.allclose(cached(VALUES, torch.arange(400)), teacher(VALUES[SWAPPED]), atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "other", "message"),
    [
        (Rows(VALUES, [0] * 400), Rows(VALUES, [0] * 399 + [1]), "labels: .'labels of Rows: "),
        (Rows(VALUES, torch.arange(400)), Rows(VALUES, torch.arange(400) + 1), "labels: .'labels of Rows: "),
        (Rows(VALUES, [0] * 400, Flip(0)), Rows(VALUES, [0] * 400, Flip(1e-9)), r"transform: .*{'share': 0}.*1e-09}"),
        (Rows(VALUES, [0] * 400, compose(0)), Rows(VALUES, [0] * 400, compose(1e-9)), "transform: "),
        (
            torch.utils.data.ConcatDataset([Rows(VALUES, [0] * 400), Rows(VALUES, [0] * 400, Flip(0))]),
            torch.utils.data.ConcatDataset([Rows(VALUES, [0] * 400), Rows(VALUES, [0] * 400, Flip(1e-9))]),
            r"transform: .*{'share': 0}.*1e-09}",
        ),
        (
            LabeledAndUnlabeled(Rows(VALUES, torch.zeros(400)), Rows(VALUES, [0] * 400, Flip(0))),
            LabeledAndUnlabeled(Rows(VALUES, torch.zeros(400)), Rows(VALUES, [0] * 400, Flip(1e-9))),
            r"transform: .*{'share': 0}.*1e-09}",
        ),
    ],
    ids=["labels", "tensor of labels", "transform", "composed transform", "joined", "labeled and not"],
)
def test_small_differences_are_refused(tmp_path, ours, other, message):
    teacher = FrozenTeacher(nn.Linear(2, 2))
    TeacherCache(tmp_path, teacher, SeededViews(ours)).write()
    CachedTeacher(tmp_path, SeededViews(ours), teacher)
    with pytest.raises(ValueError, match=f"belongs to something else:\n  {message}"):
        CachedTeacher(tmp_path, SeededViews(other))


def test_a_file_with_another_content_is_noticed_and_files_may_move(tmp_path):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    (tmp_path / "images" / "class").mkdir(parents=True)
    generator = np.random.RandomState(0)
    for number in range(100):
        pixels = generator.randint(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "class" / f"{number:03}.png")
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def views():
        return SeededViews(ImageFolder(str(tmp_path / "images"), transform))

    teacher = FrozenTeacher(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)))
    TeacherCache(tmp_path / "cache", teacher, views()).write()
    moved = (tmp_path / "images").rename(tmp_path / "elsewhere")
    CachedTeacher(tmp_path / "cache", SeededViews(ImageFolder(str(moved), transform)), teacher)
    moved = moved.rename(tmp_path / "images")
    (moved / "class" / "001.png").rename(moved / "class" / "001b.png")
    cached = CachedTeacher(tmp_path / "cache", views(), teacher)
    dataset = views()
    data = torch.stack([data for data, _, _ in dataset.read(range(100))])
    assert torch.allclose(cached(data, torch.arange(100)), teacher(data), atol=1e-5)
    (moved / "class" / "002.png").write_bytes((moved / "class" / "003.png").read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="incomplete: 99 of 100 rows are written"):
        CachedTeacher(tmp_path / "cache", views(), teacher)


class Scaled(nn.Module):
    """Brings images to a mean and a scale that no state dict holds."""

    def __init__(self, mean=0.0, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.scale = nn.Linear(2, 3), scale
        self.register_buffer("mean", torch.full((2,), mean), persistent=False)

    def forward(self, data):
        return self.linear((data - self.mean) * self.scale)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Scaled(mean=0.5), "teacher: "),
        (Scaled(scale=2.0), "embedding: what the teacher returns for samples that are stored"),
    ],
)
def test_a_teacher_with_the_same_weights_that_returns_something_else_is_refused(tmp_path, other, message):
    dataset = SeededViews(Rows(VALUES, [0] * 400))
    TeacherCache(tmp_path, FrozenTeacher(Scaled()), dataset).write()
    CachedTeacher(tmp_path, dataset, FrozenTeacher(Scaled()))
    with pytest.raises(ValueError, match=f"belongs to something else:\n  (.|\n)*{message}"):
        CachedTeacher(tmp_path, dataset, FrozenTeacher(other))
    with pytest.raises(ValueError, match=message):
        TeacherCache(tmp_path, FrozenTeacher(other), dataset).write()


def test_a_quantised_teacher_can_be_cached(tmp_path):
    dataset = SeededViews(Rows(VALUES, [0] * 400))
    teachers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 3)), {nn.Linear})
        teachers.append(FrozenTeacher(quantised))
    TeacherCache(tmp_path, teachers[0], dataset).write()
    CachedTeacher(tmp_path, dataset, teachers[1])
    with pytest.raises(ValueError, match="teacher: "):
        CachedTeacher(tmp_path, dataset, teachers[2])


def test_what_only_the_student_sees_may_change(tmp_path):
    TeacherCache(tmp_path, make_teacher(), SeededViews(CrossQuality(Noisy(), lambda data: data / 2))).write()
    CachedTeacher(tmp_path, SeededViews(CrossQuality(Noisy(), lambda data: data / 4)))


def test_ensembles_of_caches_differ_by_what_these_hold(tmp_path):
    dataset, caches = make_dataset(), []
    for seed in range(2):
        TeacherCache(tmp_path / str(seed), make_teacher(seed=seed), dataset).write()
        caches.append(CachedTeacher(tmp_path / str(seed), dataset))
    TeacherCache(tmp_path / "joint", EnsembleTeacher(caches), dataset).write()
    CachedTeacher(tmp_path / "joint", dataset, EnsembleTeacher(list(caches)))
    for others in (caches[:1], caches[::-1], [caches[0], make_teacher(seed=1)]):
        with pytest.raises(ValueError, match="teacher: "):
            CachedTeacher(tmp_path / "joint", dataset, EnsembleTeacher(others))
    with pytest.raises(ValueError, match="its rows mean nothing for another dataset"):
        TeacherCache(tmp_path / "other", EnsembleTeacher(caches), make_dataset(seed=1))
    with pytest.raises(ValueError, match=r"teachers\[1\] of the ensemble is a function.*use modules and CachedTeacher"):
        TeacherCache(tmp_path / "other", EnsembleTeacher([caches[0], lambda data, index: data.flatten(1)]), dataset)


class Restless(torch.utils.data.Dataset):
    generator = np.random.default_rng()

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return self.generator.normal(size=2).astype("float32"), 0


def test_data_that_ignore_the_seed_are_found_out(tmp_path):
    teacher = FrozenTeacher(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="other data each time sample 0 is read.*reseed="):
        TeacherCache(tmp_path, teacher, SeededViews(Restless()))

    def reseed(seed):
        Restless.generator = np.random.default_rng(seed)

    dataset = SeededViews(Restless(), reseed=reseed)
    TeacherCache(tmp_path, teacher, dataset).write()
    assert CachedTeacher(tmp_path, dataset)(torch.zeros(1), torch.tensor([1])).shape == (1, 2)


#: The length of what an .npy file begins with.
HEADER = 128


def flip_a_bit(path):
    with open(path, "r+b") as file:
        file.seek(HEADER + 8 * 24 * 3 + 5)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def test_a_flipped_bit_is_found_and_mended(tmp_path):
    teacher, dataset = make_teacher(), make_dataset()
    cache = TeacherCache(tmp_path / "cache", teacher, dataset, batch_size=8)
    cache.write()
    before = contents(tmp_path / "cache")
    flip_a_bit(tmp_path / "cache" / "embeddings.npy")
    cached = CachedTeacher(tmp_path / "cache", dataset)
    assert torch.isfinite(cached(torch.zeros(8), torch.arange(8))).all()
    with pytest.raises(
        ValueError, match=r"Row 24 of .*embeddings.npy \(view 0, line 25.*not have their checksum.*write\(\)"
    ):
        cached(torch.zeros(2), torch.tensor([8, 24]))
    teacher.log = tmp_path / "log"
    cache.write()
    assert contents(tmp_path / "cache") == before and teacher.log.read_text() == "24\n"


def test_a_cache_that_has_been_begun_keeps_its_own_batch_size(tmp_path):
    teacher, dataset = make_teacher(), make_dataset()
    TeacherCache(tmp_path, teacher, dataset, batch_size=8).write()
    before = contents(tmp_path)
    flip_a_bit(tmp_path / "embeddings.npy")
    TeacherCache(tmp_path, teacher, dataset, batch_size=32).write()
    assert contents(tmp_path) == before


def content_of(text):
    """Return what a file says, whatever its spaces and its last digits; None if nothing."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def test_any_flipped_bit_of_the_header_is_found(tmp_path):
    dataset = make_dataset()
    TeacherCache(tmp_path, make_teacher(), dataset).write()
    path, draw = tmp_path / "manifest.json", random.Random(0)
    good = path.read_bytes()
    for place in range(0, len(good), 11):
        damaged = bytearray(good)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        if content_of(damaged) != content_of(good):
            with pytest.raises(ValueError, match="is damaged|has the format"):
                ArrayFolder(tmp_path)
    path.write_bytes(good)
    CachedTeacher(tmp_path, dataset)


def test_truncated_foreign_and_unfinished_files_are_refused(tmp_path):
    dataset = make_dataset()
    cache = TeacherCache(tmp_path / "cache", make_teacher(), dataset, batch_size=8)
    with pytest.raises(ValueError, match="holds no teacher cache: manifest.json is missing"):
        CachedTeacher(tmp_path / "cache", dataset)
    cache.write()
    os.truncate(tmp_path / "cache" / "embeddings.npy", 2000)
    with pytest.raises(ValueError, match=r"embeddings.npy has 2,000 bytes, but the cache needs 2,528"):
        CachedTeacher(tmp_path / "cache", dataset)
    (tmp_path / "cache" / "manifest.json").write_text('{"format": ')
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        CachedTeacher(tmp_path / "cache", dataset)
    (tmp_path / "cache" / "manifest.json").write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="has the format 'another', but this version reads"):
        cache.write()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.pdf").touch()
    with pytest.raises(ValueError, match=r"not empty and holds no teacher cache, but \['thesis.pdf'\]"):
        TeacherCache(tmp_path / "other", make_teacher(), dataset).write()


def test_a_disk_that_is_too_small_is_noticed_before(tmp_path, monkeypatch):
    monkeypatch.setattr(array_folder.shutil, "disk_usage", lambda _: FakeUsage())
    with pytest.raises(OSError, match="needs 0.00 GiB, free are 0.00") as caught:
        TeacherCache(tmp_path, make_teacher(), make_dataset()).write()
    assert caught.value.errno == errno.ENOSPC


class FakeUsage:
    free = 10


def test_a_disk_that_fills_up_keeps_what_is_written(tmp_path, monkeypatch):
    teacher, dataset = make_teacher(), make_dataset()
    cache, write, calls = TeacherCache(tmp_path / "cache", teacher, dataset, batch_size=8), os.pwrite, []

    def full(descriptor, content, offset):
        calls.append(offset)
        if len(calls) == 8:
            # A full disk takes what still fits.
            return write(descriptor, content[:10], offset)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="The disk is full: 10 of 100 rows are written and kept"):
        cache.write()
    with pytest.raises(ValueError, match="incomplete: 10 of 100 rows"):
        CachedTeacher(tmp_path / "cache", dataset)
    monkeypatch.setattr(os, "pwrite", write)
    teacher.log = tmp_path / "log"
    cache.write()
    TeacherCache(tmp_path / "whole", make_teacher(), dataset, batch_size=8).write()
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert len(teacher.log.read_text().split()) == 12


def test_what_the_precision_cannot_hold_is_refused(tmp_path):
    teacher = make_teacher()
    teacher.trunk[4].bias.data[2] = 1e5
    cache = TeacherCache(tmp_path, teacher, make_dataset(), torch.float16)
    with pytest.raises(ValueError, match="embeddings of the rows 0 to 63 are not finite in torch.float16"):
        cache.write()
    (tmp_path / "bfloat16").mkdir()
    TeacherCache(tmp_path / "bfloat16", teacher, make_dataset(), torch.bfloat16).write()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_refused(tmp_path, value):
    teacher = make_teacher()
    teacher.trunk[4].bias.data[2] = value
    with pytest.raises(ValueError, match="embeddings of the rows 0 to 63 are NaN or infinite"):
        TeacherCache(tmp_path, teacher, make_dataset()).write()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": Noisy()}, r"dataset must be SeededViews\(dataset, ...\).* but is a Noisy"),
        ({"teacher": nn.Linear(2, 2)}, "teacher, a Linear, must be a module without parameters that require"),
        ({"teacher": lambda data, index: data}, "teacher, a function, must be a module"),
        ({"dtype": torch.int8}, "dtype must be one of torch.float32.*but is torch.int8"),
        ({"batch_size": 0}, "batch_size must be at least 1, but is 0"),
        ({"features": ["layer9"]}, "no modules of these names: 'layer9'"),
        ({"teacher": EnsembleTeacher([make_teacher()]), "features": ["0"]}, "features names modules of teacher.trunk"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        TeacherCache(tmp_path, **{"teacher": make_teacher(), "dataset": make_dataset()} | changes)


def test_a_teacher_of_several_outputs_is_named(tmp_path):
    class Two(nn.Module):
        def forward(self, data):
            return data, data

    with pytest.raises(ValueError, match=r"^teacher must return one tensor of embeddings, but returned a tuple\.$"):
        TeacherCache(tmp_path, Two(), make_dataset()).write()


def test_ten_million_rows_need_no_memory(tmp_path, monkeypatch):
    """10,000,000 x 512 in float16, 9.5 GiB, nearly all of it holes: reading takes a few pages."""
    monkeypatch.setattr(array_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    manifest = array_folder.new_manifest(1, {"embeddings": 512}, torch.float16, 64)
    array_folder.ArrayFolder.create(tmp_path, range(10_000_000), manifest)
    file, written = ArrayFolder(tmp_path), torch.randn(64, 512).half()
    places = np.concatenate([np.arange(10), 5_000_000 + np.arange(44), 9_999_990 + np.arange(10)])
    file.write(places, {"embeddings": written}, np.zeros((64, 4)), np.zeros((64, 2), dtype=np.uint64))
    zeros = array_folder.checksums(np.zeros((1, 512), dtype=np.float16))
    finished = np.load(tmp_path / "finished.npy", mmap_mode="r+")
    finished[finished == 0] = zeros
    finished.flush()
    file, draw = ArrayFolder(tmp_path), np.random.default_rng(0)
    before = private_memory()
    for _ in range(20):
        rows = draw.integers(0, 10_000_000, 128)
        rows[:3] = 9_999_999, 5, 5_000_001
        values = file.read("embeddings", rows)
        assert torch.equal(values[:3], written[[63, 5, 11]]) and values[3:].abs().max() <= written.abs().max()
    assert private_memory() - before < 64 * 2**20
    assert np.load(tmp_path / "embeddings.npy", mmap_mode="r").shape == (1, 10_000_000, 512)
    assert (tmp_path / "embeddings.npy").stat().st_blocks * 512 < 2**20


def private_memory():
    """Bytes of memory that are not a file's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])
