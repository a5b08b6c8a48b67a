import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import v2

from pml_distill.datasets import CrossQuality, Glyphs, PartiallyLabeled, SeededViews, Views
from pml_distill.teachers import CachedTeacher, FrozenTeacher, TeacherCache


class Images(torch.utils.data.Dataset):
    """Random pictures behind a transform, as in PML's and torchvision's datasets."""

    def __init__(self, transform):
        pixels = np.random.RandomState(0).randint(0, 256, (6, 16, 16, 3), dtype=np.uint8)
        self.images, self.labels, self.transform = [Image.fromarray(p) for p in pixels], [0, 0, 1, 1, 2, 2], transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


def noisy_numpy(image):
    return torch.from_numpy(np.asarray(image) + np.random.randn(16, 16, 3))


def shifted_by_random(image):
    return torch.from_numpy(np.roll(np.asarray(image), random.randrange(16), axis=random.randrange(2)))


class OwnGenerator:
    """Draws from a generator of its own, as albumentations does."""

    def __init__(self):
        self.set_random_seed(None)

    def set_random_seed(self, seed):
        self.generator = np.random.default_rng(seed)

    def __call__(self, image):
        return torch.from_numpy(np.asarray(image) + self.generator.normal(size=(16, 16, 3)))


TRANSFORMS = {
    "v1": v1.Compose([v1.RandomResizedCrop(12), v1.ColorJitter(0.5, 0.5), v1.ToTensor(), v1.RandomErasing(0.5)]),
    "v2": v2.Compose([v2.RandomResizedCrop(12), v2.RandAugment(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
    "numpy": noisy_numpy,
    "random": shifted_by_random,
    "own generator": OwnGenerator(),
}


def seeded(transform, seed=0, views=2):
    return SeededViews(Images(transform), seed, views, reseed=getattr(transform, "set_random_seed", ()))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_view_is_the_same_in_any_order_and_process(name):
    dataset = seeded(TRANSFORMS[name])
    first = {row: data for data, _, row in dataset.read(range(12))}
    again = {row: data for data, _, row in dataset.read(range(11, -1, -1))}
    for workers in (1, 2):
        for batch in torch.utils.data.DataLoader(dataset, 2, shuffle=True, num_workers=workers):
            again |= {int(row): data for data, row in zip(batch[0], batch[2])}
            for row, data in again.items():
                assert torch.equal(data, first[row])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_views_samples_and_seeds_differ(name):
    dataset, other = seeded(TRANSFORMS[name]), seeded(TRANSFORMS[name], seed=1)
    images = dataset.dataset.images
    dataset.dataset.images = other.dataset.images = [images[0]] * 6
    reads = [data for data, _, _ in dataset.read(range(12)) + other.read(range(12))]
    distinct = {data.numpy().tobytes() for data in reads}
    # A shift along one of two axes by one of 16 steps comes twice now and then.
    assert len(distinct) == 24 if name != "random" else len(distinct) > 8


def test_the_callers_random_numbers_go_on_as_if_nothing_was_read():
    dataset = seeded(TRANSFORMS["v2"])

    def draw(read):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        if read:
            dataset.read([3])
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw(read=True) == draw(read=False)


def test_training_meets_all_views_and_a_seeded_run_the_same_again():
    dataset = seeded(TRANSFORMS["numpy"], views=3)

    def rows(seed):
        torch.manual_seed(seed)
        return [row for _ in range(20) for _, _, row in dataset.__getitems__([0, 5, -1])]

    assert rows(0) == rows(0) != rows(1)
    assert set(rows(0)) == {0, 6, 12, 5, 11, 17}


def test_rows_name_view_and_sample_and_labels_stay():
    dataset = seeded(TRANSFORMS["random"], views=3)
    assert len(dataset) == 6 and dataset.num_rows == 18 and dataset.labels == [0, 0, 1, 1, 2, 2]
    assert [(label, row) for _, label, row in dataset.read([0, 6, 17])] == [(0, 0), (0, 6), (2, 17)]
    data, label, row = dataset[4]
    assert label == 2 and row % 6 == 4


class WithTargets(torch.utils.data.Dataset):
    """Names its labels as torchvision's datasets do."""

    targets = [5, 5, 6, 6]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return torch.tensor([float(i)]), self.targets[i]


@pytest.mark.parametrize("around", [SeededViews, lambda dataset: CrossQuality(dataset, lambda image: image / 2)])
def test_targets_of_torchvision_are_labels(around):
    dataset = around(WithTargets())
    assert dataset.labels == PartiallyLabeled(dataset, 1.0).labels.tolist() == WithTargets.targets
    with pytest.raises(ValueError, match="the list has neither labels nor targets"):
        _ = around([(torch.zeros(1), 0)]).labels


def test_data_alone_are_unlabelled_and_an_index_gives_way_to_the_row():
    assert SeededViews(["a", "b"], views=2).read([3]) == [("b", -1, 3)]
    assert SeededViews([("a", 4, 99)]).read([0]) == [("a", 4, 0)]
    assert SeededViews([("a",), ["b"]]).read([0, 1]) == [("a", -1, 0), ("b", -1, 1)]


def test_both_qualities_of_a_sample_are_one_view():
    dataset = SeededViews(CrossQuality(Glyphs("val"), lambda image: image / 2), views=2)
    views, _, row = dataset[7]
    assert isinstance(views, Views) and torch.equal(views.student, views.teacher / 2)
    assert torch.equal(dataset.read([row])[0][0].teacher, views.teacher)


def test_albumentations_are_repeated_once_they_are_reseeded(tmp_path):
    albumentations = pytest.importorskip("albumentations")
    compose = albumentations.Compose(
        [albumentations.RandomResizedCrop((12, 12)), albumentations.HorizontalFlip(), albumentations.GaussNoise(p=1)]
    )
    images = Images(lambda image: torch.from_numpy(compose(image=np.asarray(image))["image"].astype("float32")))
    dataset = SeededViews(images, views=2, reseed=compose.set_random_seed)
    first = {row: data for data, _, row in dataset.read(range(12))}
    assert len({data.numpy().tobytes() for data in first.values()}) == 12
    assert all(torch.equal(data, first[row]) for data, _, row in dataset.read(range(11, -1, -1)))
    for data, _, rows in torch.utils.data.DataLoader(dataset, 2, shuffle=True, num_workers=2):
        assert all(torch.equal(image, first[int(row)]) for image, row in zip(data, rows))
    teacher = FrozenTeacher(torch.nn.Flatten())
    TeacherCache(tmp_path / "seeded", teacher, dataset).write()
    with pytest.raises(ValueError, match="other data each time.*Compose.set_random_seed"):
        TeacherCache(tmp_path / "restless", teacher, SeededViews(images, views=2))


def test_numbers_of_numpy_serve(tmp_path):
    dataset = SeededViews([(torch.ones(2), 0)] * 4, np.int64(3), np.int32(2))
    TeacherCache(tmp_path, FrozenTeacher(torch.nn.Flatten()), dataset).write()
    CachedTeacher(tmp_path, SeededViews([(torch.ones(2), 0)] * 4, 3, 2))


class WithoutLength(torch.utils.data.Dataset):
    def __len__(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], 0, 0), "views must be at least 1, but is 0"),
        (([],), "dataset is empty"),
        ((["a"], 0.5), "seed must be a whole number, but is 0.5"),
        ((["a"], 0, 1.5), "views must be a whole number, but is 1.5"),
        ((WithoutLength(),), "dataset must have a length, but WithoutLength has none"),
        ((iter("a"),), "dataset must have a length, but str_.*iterator has none"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SeededViews(*arguments)


@pytest.mark.parametrize("row", [-1, 4])
def test_rows_out_of_range_are_refused(row):
    with pytest.raises(IndexError, match=f"rows are 0 to 3, but {row} is asked for"):
        SeededViews(["a", "b"], views=2).read([row])
