"""The benchmark on renders, with noise for images and a linear map of pixels for a teacher."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import furniture
import furniture_data
import furniture_teacher

OBJECTS, AUTHORS = 30, ("Scopia", "BlendSwap-CC-0")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Images of colours, one for each object, in the cache folder of the benchmark."""
    folder, generator = tmp_path_factory.mktemp("furniture"), np.random.default_rng(0)
    colors = generator.integers(0, 200, (OBJECTS, 1, 3, 1, 1))
    size = furniture_data.SIZE
    np.save(
        folder / f"images-{size}.npy", (colors + generator.integers(0, 50, (OBJECTS, 12, 3, size, size))).astype("u1")
    )
    with open(folder / "objects.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["object", "author"])
        writer.writerows([f"{number:03}", AUTHORS[number % 2]] for number in range(OBJECTS))
    return folder


@pytest.fixture
def small(rendered, monkeypatch):
    """The benchmark on these images, with short runs and a teacher that is quick."""
    projection = torch.randn(3 * 12 * 12, 160, generator=torch.Generator().manual_seed(0))

    def features(batch):
        return torch.nn.functional.avg_pool2d(batch.float(), 8).flatten(1) @ projection / 1000

    furniture_data.images.cache_clear()
    monkeypatch.setattr(furniture_data, "CACHE", rendered)
    monkeypatch.setattr(
        furniture, "teacher_outputs", lambda name, *where: torch.stack([*map(features, furniture_data.views(*where))])
    )
    monkeypatch.setattr(
        furniture, "teacher_on", lambda part, name, by: features(furniture_data.test_images(part, by)[0])
    )
    short = {name: replace(regime, epochs=1, size=8) for name, regime in furniture.REGIMES.items()}
    monkeypatch.setattr(furniture, "REGIMES", short)
    yield
    furniture_data.images.cache_clear()


@pytest.mark.parametrize("by", ["object", "author"])
def test_splits_have_no_object_in_common(small, by):
    parts = [furniture_data.split(name, by) for name in ("train", "val", "test")]
    assert sorted(sum(parts, [])) == list(range(OBJECTS))
    if by == "author":
        objects = furniture_data.images()[1]
        assert {objects[number]["author"] for number in parts[0] + parts[1]} == {"Scopia"}
        assert {objects[number]["author"] for number in parts[2]} == {"BlendSwap-CC-0"}


def test_views_are_the_same_each_time(small):
    batch = furniture_data.train_images()[:6]
    for strength in ("weak", "strong"):
        first, again = (furniture_data.augment(batch, strength, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, again) and not torch.equal(first, batch)


@pytest.mark.parametrize("labeled", [0, 1, 4, 8])
def test_so_many_images_of_each_object_keep_their_label(labeled):
    labels = furniture_data.known_labels(5, labeled, seed=0).view(5, 8)
    assert ((labels >= 0).sum(dim=1) == labeled).all()
    assert all(set(row.tolist()) <= {number, -1} for number, row in enumerate(labels))


def test_labels_tune_a_teacher_from_where_its_standardisation_is(monkeypatch):
    monkeypatch.setattr(furniture_teacher, "STEPS", 60)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40).repeat_interleave(8)
    # What tells the objects apart has the smaller variance.
    centers = torch.randn(40, 160, generator=generator)[labels]
    outputs = centers + torch.randn(2, 320, 160, generator=generator) * torch.linspace(0.5, 6, 160)
    own = outputs[0]
    values = [
        furniture.retrieval_accuracy(
            furniture_teacher.prepared_teacher(outputs, "whiten", known, 0)(own), labels, metrics=(furniture.MAP,)
        )
        for known in (None, labels)
    ]
    assert values[1][furniture.MAP] > values[0][furniture.MAP] + 0.1


@pytest.mark.parametrize(
    ("regime", "method"),
    [
        ("no labels", "default"),
        ("1 of 8 images labelled", "labels alone"),
        ("1 of 8 images labelled", "default"),
        ("4 of 8", "default"),
        ("all", "teacher as it came, center"),
    ],
)
def test_each_regime_is_trained_and_measured(small, monkeypatch, regime, method):
    monkeypatch.setattr(furniture, "BATCH", 32)
    monkeypatch.setattr(furniture_teacher, "BATCH", 64)
    monkeypatch.setattr(furniture_teacher, "STEPS", 3)
    row = furniture.run("test", {"regime": regime, "method": method, "seed": 0})
    assert {"regime", "method", "seed", *furniture.METRICS} == set(row)
    assert 0 < row["precision_at_1"] <= 1 and 0 < row["validation"] <= 1
