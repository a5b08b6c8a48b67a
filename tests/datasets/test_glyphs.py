import re
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from torch.utils.data import DataLoader, Subset

from pml_distill.datasets import Digits, Glyphs
from pml_distill.datasets.glyphs import cached_glyphs, render_glyphs


def scrambled(data):
    """Valid as an archive, but not in its contents."""
    middle = len(data) // 2
    return data[: middle - 256] + bytes(512) + data[middle + 256 :]


both = pytest.mark.parametrize("dataset", [Glyphs, Digits])


@pytest.fixture
def quickly_rendered(monkeypatch):
    """Two characters of noise; what is rendered does not matter to the cache."""
    pixels = np.random.RandomState(0).randint(256, size=(32, 64, 64), dtype=np.uint8)
    monkeypatch.setattr("pml_distill.datasets.glyphs.render_glyphs", lambda: (pixels, np.arange(32) // 16, "AB"))
    return pixels


def test_680_classes_of_16_faces_none_empty_and_none_twice():
    images, labels, characters = render_glyphs()
    # Which look-alikes fall together depends on the version of matplotlib that draws them.
    assert len(characters) == len(set(characters)) and 670 <= len(characters) <= 690
    assert np.array_equal(np.bincount(labels), np.full(len(characters), 16))
    assert images.any(axis=(1, 2)).all()
    assert sum(c in characters for c in "AΑА") == 1


@both
def test_classes_of_the_splits_are_disjoint_and_complete(dataset):
    train, val, both, test = (set(dataset(s).labels.tolist()) for s in ("train", "val", "train+val", "test"))
    assert not train & val and not both & test and train | val == both
    assert both | test == set(range(len(both | test)))
    assert len(val) == len(both) // 5


@both
def test_items(dataset):
    data = dataset("test", size=24, channels=3, return_index=True)
    image, label, index = data[7]
    assert image.shape == (3, 24, 24) and image.dtype == torch.float32 and torch.equal(image[0], image[2])
    assert index == 7 and label == data.labels[7]
    assert image.amin() > -3 and image.amax() < 3
    assert len(dataset("test")[0]) == 2
    assert data[-1][2] == len(data) - 1
    with pytest.raises(IndexError):
        data[len(data)]


def test_characters_name_the_classes():
    data = Glyphs("test")
    assert all(data.characters[label].isprintable() for label in data.labels.tolist())


@both
def test_test_images_are_a_fixed_jittered_copy(dataset):
    data = dataset("test")
    assert torch.equal(data[3][0], data[3][0])
    assert torch.equal(data[3][0], dataset("test")[3][0])
    assert not torch.equal(data[3][0], dataset("test", augment=True)[3][0])


@both
def test_training_images_are_jittered_anew_and_reproducibly(dataset):
    data = dataset("train")
    torch.manual_seed(0)
    first, second = data[3][0], data[3][0]
    torch.manual_seed(0)
    assert not torch.equal(first, second) and torch.equal(first, data[3][0])


def test_seed_decides_the_split():
    assert set(Glyphs("train", seed=1).labels.tolist()) != set(Glyphs("train").labels.tolist())


@both
def test_with_pmls_sampler_and_workers(dataset):
    data = dataset("train")
    sampler = MPerClassSampler(data.labels, 4, 16, 32)

    def images(workers):
        torch.manual_seed(0)
        return [batch[0] for batch in DataLoader(data, 16, sampler=sampler, num_workers=workers)]

    assert images(0)[0].shape == images(2)[0].shape == (16, 1, data[0][0].shape[1], data[0][0].shape[2])


@both
def test_workers_jitter_each_in_its_own_way(dataset):
    first, second = (batch[0] for batch in DataLoader(Subset(dataset("train"), [3] * 32), 16, num_workers=2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 99, scrambled]
)
def test_a_damaged_cache_is_rendered_anew_with_a_warning(tmp_path, monkeypatch, quickly_rendered, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images, labels, characters = cached_glyphs()
    (path,) = (tmp_path / "pml_distill").iterdir()
    assert path.name.startswith(f"glyphs-v1-matplotlib-{matplotlib.__version__}-freetype-")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=f"{re.escape(path.name)} is damaged"):
        again = cached_glyphs()
    assert np.array_equal(images, again[0]) and np.array_equal(labels, again[1]) and characters == again[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached_glyphs()


def test_another_matplotlib_does_not_use_its_cache(tmp_path, monkeypatch, quickly_rendered):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached_glyphs()
    (path,) = (tmp_path / "pml_distill").iterdir()
    rendered, time = path.read_bytes(), path.stat().st_mtime_ns
    monkeypatch.setattr(matplotlib, "__version__", "3.6.0")
    cached_glyphs()
    monkeypatch.setattr("matplotlib.ft2font.__freetype_version__", "2.5.0")
    cached_glyphs()
    others = {p.name for p in path.parent.iterdir()} - {path.name}
    assert len(others) == 2 and "glyphs-v1-matplotlib-3.6.0-freetype-2.5.0.npz" in others
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (rendered, time)


def test_an_unwritable_cache_is_no_error(tmp_path, monkeypatch, quickly_rendered):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not cached"):
        assert len(Glyphs("test")) == 16


def test_without_a_place_for_the_cache_it_is_rendered(monkeypatch, quickly_rendered):
    def none(*args):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", none)
    with pytest.warns(UserWarning, match="not cached, there is no place for them"):
        images, _, _ = cached_glyphs()
    assert np.array_equal(images, quickly_rendered)


@both
def test_the_default_dtype_changes_nothing(dataset):
    expected = dataset("test")[3][0]
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(dataset("test")[3][0], expected)
    finally:
        torch.set_default_dtype(torch.float32)


@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split must be one of train, val, train\\+val, test, but is 'dev'"),
        ({"size": 128}, "size must be from 8 to 64 pixels, but is 128"),
        ({"channels": 4}, "channels must be 1 or 3, but is 4"),
    ],
)
def test_errors_name_the_argument(dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        dataset(**arguments)
