from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

from pml_distill.datasets import CrossQuality, LabeledAndUnlabeled, PartiallyLabeled, Views
from pml_distill.datasets.items import labels_of, numbered, own_labels, read_item
from pml_distill.samplers import DistributedMPerClassSampler, MixedSampler

Photo = namedtuple("Photo", "image label")
Pair = namedtuple("Pair", "left right")
Row = namedtuple("Row", "x y index")


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ((5.0,), (5.0, None, None)),
        ((5.0, 1), (5.0, 1, None)),
        ([5.0, 1, 7], (5.0, 1, 7)),
        (5.0, (5.0, None, None)),
        (Views(1, 2), (Views(1, 2), None, None)),
        ((Views(1, 2), 3), (Views(1, 2), 3, None)),
        (Photo(5.0, "cat"), (5.0, "cat", None)),
        (Row(5.0, 2, 7), (5.0, 2, 7)),
        ({"pixel_values": 5.0, "label": 3}, (5.0, 3, None)),
        ({"image": 5.0, "label": None}, (5.0, None, None)),
        (
            {"input_ids": [1], "attention_mask": [1], "labels": 2, "idx": 9},
            ({"input_ids": [1], "attention_mask": [1]}, 2, 9),
        ),
        ({"input_ids": [1], "attention_mask": [1]}, ({"input_ids": [1], "attention_mask": [1]}, None, None)),
        ({"x": 5.0}, (5.0, None, None)),
    ],
)
def test_data_label_and_row_of_an_item(item, expected):
    assert read_item(item) == expected


@pytest.mark.parametrize(
    ("item", "named"),
    [
        ({"img": 5.0, "fine_label": 1, "coarse_label": 0}, "dict with the fields .*'fine_label', 'coarse_label'"),
        ({"img": 5.0, "class_id": 1}, "class_id"),
        ({"label": 1}, r"fields \['label'\]"),
        ({"x": 1.0, "label": 1, "target": 2}, "most one label|one label"),
        (Pair(1.0, 2.0), r"Pair with the fields \['left', 'right'\].*\(data,\)"),
        ((), "empty tuple"),
    ],
)
def test_an_item_whose_label_cannot_be_told_is_an_error(item, named):
    with pytest.raises(ValueError, match=named):
        read_item(item)


class Folder(torch.utils.data.Dataset):
    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return Photo(torch.rand(4), self.targets[index])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_labels_of_parts_of_a_dataset(kind):
    folder = Folder(kind([i % 3 for i in range(12)]))
    part = Subset(folder, [5, 6, 7])
    assert list(own_labels(part)) == [2, 0, 1]
    assert labels_of(Subset(part, np.array([2, 0]))).tolist() == [1, 2]
    assert labels_of(ConcatDataset([part, folder])).tolist() == [2, 0, 1] + [0, 1, 2] * 4


def test_labels_of_rows_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [2, 0, 1]})
    assert labels_of(rows).tolist() == labels_of(rows.with_format("torch")).tolist() == [2, 0, 1]
    assert read_item(rows[0]) == ("a", 2, None)


def test_text_labels_are_numbered_in_alphabetical_order_and_minus_one_stays():
    assert labels_of(Folder(["dog", "cat", -1, "dog"])).tolist() == [1, 0, -1, 1]
    assert numbered(["b", None, "a"]).tolist() == [1, -1, 0]
    with pytest.raises(ValueError, match=r"labels has the classes \['c'\], .* dataset_labels"):
        numbered(["a", "c"], {"a": 0})


def test_text_labels_in_samplers():
    labels = ["a", "b"] * 6 + [-1] * 12
    batches = torch.tensor(list(MixedSampler(labels, m=2, batch_size=8))).view(-1, 8)
    assert all((batch < 12).sum() == 4 for batch in batches)
    drawn = torch.tensor(list(DistributedMPerClassSampler(labels, 2, 4, 40)))
    assert set(drawn.tolist()) <= set(range(12))


@pytest.mark.parametrize("item", [Photo(2.0, "b"), {"image": 2.0, "label": "b"}, (2.0, "b"), [2.0, "b"]])
def test_wrappers_read_items_of_every_kind(item):
    assert PartiallyLabeled([item] * 2, 1, labels=["b", "b"])[0] == (2.0, 0)
    assert LabeledAndUnlabeled([item], [item], labels=["b"])[0] == (2.0, 0)
    assert LabeledAndUnlabeled([item], [item], labels=["b"])[1] == (2.0, -1)
    assert CrossQuality([item], lambda x: -x)[0] == (Views(-2.0, 2.0), "b")


def test_an_item_without_a_label_keeps_its_row():
    assert CrossQuality([{"image": 2.0, "idx": 4}], lambda x: -x)[0] == (Views(-2.0, 2.0), -1, 4)
