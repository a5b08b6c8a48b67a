"""A cache whose data change: images added, removed, renamed, moved, joined, divided, or known by ids."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from pml_distill.datasets import SeededViews, Views
from pml_distill.teachers import CachedTeacher, FrozenTeacher, TeacherCache

VIEWS = 2


class Counting(FrozenTeacher):
    """Counts the rows that it has seen."""

    def __init__(self, trunk):
        super().__init__(trunk)
        self.seen = 0

    def forward(self, data, index=None):
        self.seen += len(data)
        return super().forward(data)


def make_teacher(seed=0):
    torch.manual_seed(seed)
    return Counting(nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 5)))


def augmentation(**changes):
    crop = v2.RandomCrop(**{"size": 6} | changes)
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), crop, v2.RandomHorizontalFlip()])


def add_images(folder, numbers):
    for number in numbers:
        path = folder / f"class{number % 3}" / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(number).randint(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def views_of(folder, **changes):
    return SeededViews(ImageFolder(str(folder), augmentation()), **{"views": VIEWS, "seed": 3} | changes)


def check_all(cached, dataset, teacher):
    data = torch.stack([Views.of(data).teacher for data, _, _ in dataset.read(range(dataset.num_rows))])
    assert torch.allclose(cached(data, torch.arange(dataset.num_rows)), teacher(data), atol=1e-5)


def test_only_new_images_cost_something(tmp_path):
    teacher, root, cache = make_teacher(), tmp_path / "images", tmp_path / "cache"
    add_images(root, range(100))
    TeacherCache(cache, teacher, views_of(root), batch_size=16).write()
    assert teacher.seen == 100 * VIEWS
    add_images(root, range(100, 120))
    for path in sorted(root.rglob("*.png"))[:10]:
        path.unlink()
    # Renamed within a class, each to the name that the next one had, and into another class.
    chain = sorted((root / "class1").iterdir())
    for path, target in zip(chain[::-1], [root / "class1" / "last.png", *chain[:0:-1]]):
        path.rename(target)
    for path in sorted((root / "class2").iterdir())[:20]:
        path.rename(root / "class0" / f"was_two_{path.name}")
    moved = Path(shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copyfile))
    shutil.rmtree(root)
    teacher.seen, dataset = 0, views_of(moved)
    cached = TeacherCache(cache, teacher, dataset)
    cached.write()
    assert teacher.seen == 20 * VIEWS
    check_all(CachedTeacher(cache, dataset, teacher), dataset, teacher)
    teacher.seen = 0
    TeacherCache(cache, teacher, dataset).write()
    assert teacher.seen == 0
    with pytest.raises(ValueError, match="dataset must be given .* where samples were added"):
        CachedTeacher(cache)


def test_an_image_with_another_content_is_computed_again(tmp_path):
    teacher = make_teacher()
    add_images(tmp_path / "images", range(12))
    TeacherCache(tmp_path / "cache", teacher, views_of(tmp_path / "images")).write()
    (tmp_path / "images" / "class0" / "0003.png").write_bytes(
        (tmp_path / "images" / "class1" / "0004.png").read_bytes()
    )
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "class0" / "0006.png")
    dataset = views_of(tmp_path / "images")
    with pytest.raises(ValueError, match=f"incomplete: {11 * VIEWS} of {12 * VIEWS} rows are written.*class0/0006.png"):
        CachedTeacher(tmp_path / "cache", dataset)
    TeacherCache(tmp_path / "cache", teacher, dataset).write()
    check_all(CachedTeacher(tmp_path / "cache", dataset, teacher), dataset, teacher)


def test_parts_and_another_order_are_served_by_the_whole(tmp_path):
    teacher = make_teacher()
    add_images(tmp_path / "images", range(30))
    whole = views_of(tmp_path / "images")
    TeacherCache(tmp_path / "cache", teacher, whole).write()
    for indices in ([5, 3, 29], range(29, -1, -1), [4, 4, 1]):
        part = SeededViews(Subset(whole.dataset, indices), views=VIEWS, seed=3)
        assert torch.equal(part.read([0])[0][0], whole.read([indices[0]])[0][0])
        check_all(CachedTeacher(tmp_path / "cache", part, teacher), part, teacher)
    cached = CachedTeacher(tmp_path / "cache", whole, teacher)
    with pytest.raises(ValueError, match="its rows mean nothing for another dataset"):
        cached.check_dataset(part)


def test_a_part_first_then_the_whole(tmp_path):
    teacher = make_teacher()
    add_images(tmp_path / "images", range(30))
    whole = views_of(tmp_path / "images")
    part = SeededViews(Subset(whole.dataset, [20, 3, 29]), views=VIEWS, seed=3)
    TeacherCache(tmp_path / "cache", teacher, part).write()
    TeacherCache(tmp_path / "cache", teacher, whole).write()
    assert teacher.seen == 30 * VIEWS
    for dataset in (part, whole):
        check_all(CachedTeacher(tmp_path / "cache", dataset, teacher), dataset, teacher)


def test_several_caches_serve_joined_data(tmp_path):
    teacher, folders = make_teacher(), []
    for number, images in enumerate((range(20), range(100, 110))):
        add_images(tmp_path / str(number), images)
        folders.append(tmp_path / f"cache{number}")
        TeacherCache(folders[-1], teacher, views_of(tmp_path / str(number))).write()
    # Two files of one name, and of another content.
    for number in range(2):
        pixels = np.random.RandomState(1000 + number).randint(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / str(number) / "class0" / "same.png")
        TeacherCache(folders[number], teacher, views_of(tmp_path / str(number))).write()
    parts = [views_of(tmp_path / str(number)).dataset for number in range(2)]
    joined = SeededViews(ConcatDataset(parts), views=VIEWS, seed=3)
    cached = CachedTeacher(folders, joined, teacher)
    check_all(cached, joined, teacher)
    cached.check_dataset(joined)
    TeacherCache(tmp_path / "both", teacher, joined).write()
    check_all(CachedTeacher(tmp_path / "both", joined, teacher), joined, teacher)
    check_all(CachedTeacher(tmp_path / "both", views_of(tmp_path / "1"), teacher), views_of(tmp_path / "1"), teacher)
    with pytest.raises(ValueError, match="incomplete"):
        CachedTeacher(folders[0], joined)


class Numbers(Dataset):
    """Values and noise, with names of their own."""

    def __init__(self, values, ids=None):
        self.values, self.ids = list(values), ids

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return torch.full((3, 6, 6), float(self.values[index])) + torch.randn(3, 6, 6), 0


def test_rows_are_known_by_the_users_ids(tmp_path):
    teacher = make_teacher()
    first = SeededViews(Numbers(range(20), [f"n{i}" for i in range(20)]), views=VIEWS)
    TeacherCache(tmp_path, teacher, first).write()
    values = [25, 3, 19, 22, 0]
    changed = SeededViews(Numbers(values), views=VIEWS, ids=[f"n{i}" for i in values])
    teacher.seen = 0
    TeacherCache(tmp_path, teacher, changed).write()
    assert teacher.seen == 2 * VIEWS
    check_all(CachedTeacher(tmp_path, changed, teacher), changed, teacher)
    check_all(CachedTeacher(tmp_path, first, teacher), first, teacher)
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[20]) == ["n25", None, None]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SeededViews(Numbers(range(3)), ids=["a", "b", "a"]), "ids has 'a' more than once"),
        (lambda: SeededViews(Numbers(range(3)), ids=["a", "b"]), "ids must be 3, one for each sample, but are 2"),
        (
            lambda: SeededViews(ConcatDataset([Numbers(range(2), [1, 2]), Numbers(range(2), [2, 3])])),
            "ids has '2' more than once",
        ),
    ],
)
def test_ids_that_are_no_keys_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class TwoSides(Dataset):
    """One augmentation for both networks, then what each of them wants."""

    def __init__(self, folder, student_transform, teacher_transform):
        self.dataset = ImageFolder(str(folder), augmentation())
        self.student_transform, self.teacher_transform = student_transform, teacher_transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return Views(self.student_transform(image), self.teacher_transform(image)), label


def test_the_students_half_may_change_and_the_teachers_may_not(tmp_path):
    teacher = make_teacher()
    add_images(tmp_path / "images", range(20))

    def two_sides(student=0.5, teacher=0.25, **crop):
        sides = [v2.Normalize([0.5] * 3, [scale] * 3) for scale in (student, teacher)]
        dataset = TwoSides(tmp_path / "images", *sides)
        dataset.dataset.transform = augmentation(**crop)
        return SeededViews(dataset, views=VIEWS)

    TeacherCache(tmp_path / "cache", teacher, two_sides()).write()
    other = two_sides(student=0.1)
    check_all(CachedTeacher(tmp_path / "cache", other, teacher), other, teacher)
    for changes in ({"teacher": 0.2500001}, {"pad_if_needed": True}):
        with pytest.raises(ValueError, match="belongs to something else:\n  transform: "):
            CachedTeacher(tmp_path / "cache", two_sides(**changes))


def test_a_dataset_that_shows_the_student_alone_is_served(tmp_path):
    teacher = make_teacher()
    add_images(tmp_path / "images", range(20))

    class OneSide(Dataset):
        def __init__(self, student, teacher):
            self.dataset = ImageFolder(str(tmp_path / "images"), augmentation())
            self.student, self.teacher = student, teacher

        def __len__(self):
            return len(self.dataset)

        def __getitem__(self, index):
            image, label = self.dataset[index]
            return (self.teacher or self.student)(image), label

    normalize = v2.Normalize([0.5] * 3, [0.5] * 3)
    written = SeededViews(OneSide(None, normalize), views=VIEWS)
    trained = SeededViews(OneSide(v2.Resize(4), None), views=VIEWS)
    TeacherCache(tmp_path / "cache", teacher, written).write()
    for cached in (CachedTeacher(tmp_path / "cache", trained), CachedTeacher(tmp_path / "cache", written)):
        cached.check_dataset(trained)
        check_all(cached, written, teacher)
    trained.dataset.dataset.transform = augmentation(pad_if_needed=True)
    with pytest.raises(ValueError, match="transform: "):
        CachedTeacher(tmp_path / "cache", trained)


def test_a_sample_that_cannot_be_read_is_named(tmp_path):
    add_images(tmp_path / "images", range(12))
    (tmp_path / "images" / "class1" / "0004.png").write_bytes(b"nothing")
    dataset = views_of(tmp_path / "images")
    with pytest.raises(RuntimeError, match=r"Sample 5, file .*class1/0004.png cannot be read \(row 17, view 1\)"):
        dataset.read([17])
    with pytest.raises(RuntimeError, match="class1/0004.png"):
        TeacherCache(tmp_path / "cache", make_teacher(), dataset).write(num_workers=1)


def test_a_kill_while_rows_are_added_leaves_no_trace(tmp_path):
    """Killed at each file that takes its place."""
    teacher, root = make_teacher(), tmp_path / "images"
    add_images(root, range(20))
    TeacherCache(tmp_path / "before", teacher, views_of(root), batch_size=8).write()
    add_images(root, range(20, 25))
    code = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_growing_cache import *
left, replace = int(sys.argv[3]), os.replace
def killed(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)
os.replace = killed
TeacherCache(sys.argv[4], make_teacher(), views_of(sys.argv[2]), batch_size=8).write()
"""
    for step in (0, 1, 2, 4, 6):
        folder = tmp_path / f"killed{step}"
        shutil.copytree(tmp_path / "before", folder)
        arguments = [str(Path(__file__).parent), str(root), str(step), str(folder)]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, env=dict(os.environ))
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        teacher.seen = 0
        TeacherCache(folder, teacher, views_of(root)).write()
        assert teacher.seen == 5 * VIEWS
        check_all(CachedTeacher(folder, views_of(root), teacher), views_of(root), teacher)


def test_a_complete_cache_on_a_disk_that_cannot_be_written_needs_no_lock(tmp_path, monkeypatch):
    teacher, dataset = make_teacher(), SeededViews(Numbers(range(20)), views=VIEWS)
    TeacherCache(tmp_path, teacher, dataset).write()
    (tmp_path / "lock").unlink()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    TeacherCache(tmp_path, teacher, dataset).write()
    check_all(CachedTeacher(tmp_path, dataset, teacher), dataset, teacher)
    assert not (tmp_path / "lock").exists()


def test_a_transform_that_depends_on_the_worker_is_refused(tmp_path):
    class PerWorker(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            info = torch.utils.data.get_worker_info()
            return torch.randn(3, 6, 6) + (0 if info is None else info.id + 1), 0

    with pytest.raises(ValueError, match="other data for sample 0 in a worker.*torch.initial_seed.*reseed="):
        TeacherCache(tmp_path, make_teacher(), SeededViews(PerWorker())).write()


def test_albumentations_are_repeated_in_workers_by_the_documented_recipe(tmp_path):
    albumentations = pytest.importorskip("albumentations")
    import random

    compose = albumentations.Compose([albumentations.HorizontalFlip(), albumentations.GaussNoise(p=1)])

    class Images(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            image = np.full((6, 6, 3), index / 20, dtype=np.float32)
            return torch.from_numpy(compose(image=image)["image"]).permute(2, 0, 1), 0

    def reseed(seed):
        compose.set_random_state(np.random.default_rng(seed), random.Random(seed))

    dataset, teacher = SeededViews(Images(), views=VIEWS, reseed=reseed), make_teacher()
    TeacherCache(tmp_path, teacher, dataset).write(num_workers=1)
    cached = CachedTeacher(tmp_path, dataset, teacher)
    for data, _, rows in torch.utils.data.DataLoader(dataset, 8, num_workers=1):
        assert torch.allclose(cached(data, rows), teacher(data), atol=1e-5)


def collate_unequal(items):
    """Pad texts to the longest."""
    texts, labels, rows = zip(*items)
    padded = nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    return {"tokens": padded, "lengths": torch.tensor([len(text) for text in texts])}, torch.tensor(labels), rows


class MeanToken(nn.Module):
    def forward(self, data):
        return (data["tokens"].sum(1) / data["lengths"])[:, None].repeat(1, 3)


@pytest.mark.parametrize("settings", [{}, {"num_workers": 1, "prefetch_factor": 3, "multiprocessing_context": "fork"}])
def test_items_of_unequal_length_are_collated_by_the_users_function(tmp_path, settings):
    dataset = SeededViews([(torch.arange(3.0 + i), 0) for i in range(10)])
    teacher = FrozenTeacher(MeanToken())
    with pytest.raises(ValueError, match="Samples cannot be stacked to a batch .*Give a collate_fn"):
        TeacherCache(tmp_path, teacher, dataset).write()
    TeacherCache(tmp_path, teacher, dataset, batch_size=4).write(collate_fn=collate_unequal, **settings)
    cached = CachedTeacher(tmp_path, dataset, teacher, collate_fn=collate_unequal)
    assert torch.allclose(cached(None, torch.tensor([3, 0]))[:, 0], torch.tensor([2.5, 1.0]))
