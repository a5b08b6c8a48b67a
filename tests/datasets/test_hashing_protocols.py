import pickle

import numpy as np
import pytest
import torch

from pml_distill.datasets import Glyphs, MultiLabelList, cifar10_hashing, glyph_hashing, hashing_splits


def test_glyphs_share_classes_and_no_image():
    parts = glyph_hashing(20)
    assert {name: len(part) for name, part in parts.items()} == {"train": 160, "query": 40, "database": 120}
    for part in parts.values():
        assert part.labels.unique().tolist() == list(range(20))
        image, label = part[0]
        assert image.shape == (1, 32, 32) and label == 0
    first = Glyphs("train+val", seed=1)
    part = glyph_hashing(5, seed=1)["query"]
    old_labels = first.labels.unique()[:5].tolist()
    assert part.characters == "".join(first.characters[label] for label in old_labels)
    with pytest.raises(ValueError, match="num_classes must be from 1 to"):
        glyph_hashing(10_000)


@pytest.mark.parametrize("train_in_database", [True, False])
def test_splits_are_disjoint_and_balanced(train_in_database):
    labels = torch.arange(200) % 4
    parts = hashing_splits(range(200), labels, 10, 5, train_in_database)
    train, query, database = (set(parts[name].indices.tolist()) for name in ("train", "query", "database"))
    assert not train & query and not query & database
    assert train <= database if train_in_database else not train & database
    assert len(train | query | database) == 200
    assert parts["train"].labels.bincount().tolist() == [10] * 4
    assert parts["query"].labels.bincount().tolist() == [5] * 4
    again = hashing_splits(range(200), labels, 10, 5, train_in_database)
    assert torch.equal(again["query"].indices, parts["query"].indices)
    assert parts["query"][3] == parts["query"].indices[3]


def test_too_small_a_class_is_named():
    with pytest.raises(ValueError, match=r"class 1 has 2 samples.* = 4"):
        hashing_splits(range(12), [0] * 10 + [1] * 2, 3, 1)
    with pytest.raises(ValueError, match=r"labels must be \(12,\)"):
        hashing_splits(range(12), [0] * 10)
    with pytest.raises(ValueError, match="must be at least 1, but are -3 and 4"):
        hashing_splits(range(12), [0] * 12, -3, 4)
    with pytest.raises(ValueError, match="labels must be classes, not negative, but go from -1 to 0"):
        hashing_splits(range(12), [0] * 10 + [-1] * 2, 1, 1)


def test_cifar10_through_torchvision(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.RandomState(0)
    for name, count in [(f"data_batch_{i}", 1240) for i in range(1, 6)] + [("test_batch", 100)]:
        images = random.randint(256, size=(count, 3072), dtype=np.uint8)
        batch = {"data": images, "labels": [i % 10 for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    # The fixture has the layout of the archive, not its checksums.
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    parts = cifar10_hashing(tmp_path)
    assert {name: len(part) for name, part in parts.items()} == {"train": 5000, "query": 1000, "database": 5300}
    image, label = parts["query"][0]
    assert image.size == (32, 32) and label == parts["query"].labels[0]


def test_multi_label_lists(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.fromarray(np.full((5, 4), 50 * i, dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    listing = tmp_path / "database.txt"
    # Some editors begin a file with a mark that is no part of the text.
    listing.write_text("\ufeffimages/0.png 1 0 1\nimages/1.png 0 0 0\n\nimages/2.png 0 1 0\n")
    dataset = MultiLabelList(listing, tmp_path)
    assert dataset.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    image, label = dataset[2]
    assert image.getpixel((0, 0)) == (100, 100, 100) and label.tolist() == [0, 1, 0]
    assert MultiLabelList(listing, tmp_path, transform=lambda image: image.size)[0][0] == (4, 5)


@pytest.mark.parametrize("text", ["a.png\n", "a.png 0 2\n", "a.png 0 1\nb.png 0\n", "\n"])
def test_a_wrong_list_names_its_line(tmp_path, text):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=r"list.txt(, line [12]: expected a path and| names no image)"):
        MultiLabelList(tmp_path / "list.txt", tmp_path)
