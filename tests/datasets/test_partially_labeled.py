import pytest
import torch

from pml_distill.datasets import CrossQuality, Glyphs, LabeledAndUnlabeled, PartiallyLabeled


class Numbers(torch.utils.data.Dataset):
    """The data of a sample are its place; 3 classes of 20, 10 and 1 samples."""

    labels = torch.tensor([0] * 20 + [1] * 10 + [2])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return torch.tensor(float(i)), int(self.labels[i]), i


def counts(labels):
    return [int((labels == c).sum()) for c in range(3)]


@pytest.mark.parametrize(
    "fraction, expected",
    [(0, [0, 0, 0]), (0.01, [2, 2, 1]), (0.25, [5, 2, 1]), (0.5, [10, 5, 1]), (1, [20, 10, 1])],
)
def test_each_class_keeps_its_fraction_and_at_least_two_labels(fraction, expected):
    dataset = PartiallyLabeled(Numbers(), fraction)
    assert counts(dataset.labels) == expected
    assert [label for _, label, _ in dataset] == dataset.labels.tolist()


def test_labels_that_are_kept_are_right_and_the_rest_of_an_item_is_untouched():
    dataset = PartiallyLabeled(Numbers(), 0.5)
    for i, (data, label, index) in enumerate(dataset):
        assert int(data) == index == i and label in (-1, int(Numbers.labels[i]))


def test_the_seed_decides_which_labels_are_kept():
    drawn = [PartiallyLabeled(Numbers(), 0.3, seed=seed).labels for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert counts(drawn[0]) == counts(drawn[2])


def test_a_loader_draws_whole_batches_through_the_wrappers():
    dataset = CrossQuality(PartiallyLabeled(Glyphs("train"), 0.25), lambda image: image[:, ::2, ::2])
    views, labels = next(iter(torch.utils.data.DataLoader(dataset, batch_size=40)))
    assert views.student.shape == (40, 1, 16, 16) and views.teacher.shape == (40, 1, 32, 32)
    assert torch.equal(labels, dataset.labels[:40]) and 0 < (labels == -1).sum() < 40
    assert torch.equal(views.student, views.teacher[:, :, ::2, ::2])


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_refuses_a_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=f"fraction must be from 0 to 1, but is {fraction}"):
        PartiallyLabeled(Numbers(), fraction)


def test_targets_serve_where_there_are_no_labels():
    class Targets(list):
        targets = [0, 0, 0, 1, 1, 1]

    samples = Targets((torch.zeros(1), label) for label in Targets.targets)
    assert counts(PartiallyLabeled(samples, 0.5).labels) == counts(
        PartiallyLabeled(list(samples), 0.5, Targets.targets).labels
    )
    with pytest.raises(ValueError, match="labels must be given: the list has neither labels nor targets"):
        PartiallyLabeled(list(samples), 0.5)


@pytest.mark.parametrize("labels", [[0, 1], torch.zeros(31, 2)])
def test_refuses_labels_of_another_shape(labels):
    with pytest.raises(ValueError, match=r"labels must be \(31,\), one per sample"):
        PartiallyLabeled(Numbers(), 0.5, labels=labels)
    with pytest.raises(ValueError, match=r"labels must be \(31,\), one per sample"):
        LabeledAndUnlabeled(Numbers(), Numbers(), labels=labels)


def test_labeled_and_unlabeled_joins_two_datasets_and_their_indices():
    dataset = LabeledAndUnlabeled(Numbers(), Numbers())
    assert len(dataset) == 62
    assert torch.equal(dataset.labels, torch.cat([Numbers.labels, torch.full((31,), -1)]))
    for i, (data, label, index) in enumerate(dataset):
        assert index == i and int(data) == i % 31 and label == dataset.labels[i]
    assert dataset[-1][2] == 61


def test_labeled_and_unlabeled_reads_batches_of_one_or_both_kinds():
    dataset = LabeledAndUnlabeled(Glyphs("val"), Glyphs("train"))
    size = len(Glyphs("val"))
    for places in ([0, 1], [size, size + 1], [size, 0, size + 5, 3]):
        _, labels = torch.utils.data.default_collate(dataset.__getitems__(places))
        assert torch.equal(labels, dataset.labels[places])


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: (x, 7)])
def test_the_unlabelled_part_may_yield_data_alone_or_labels_that_do_not_count(wrap):
    unlabeled = CrossQuality([wrap(5.0)], lambda x: -x)
    data, label = LabeledAndUnlabeled([("a", 0)], unlabeled, labels=[0])[1]
    assert label == -1 and data.student == -5.0 and data.teacher == 5.0


@pytest.mark.parametrize(
    "labeled, unlabeled",
    [(Numbers(), list(torch.arange(31.0))), ([(value, 0) for value in torch.arange(31.0)], Numbers())],
)
def test_an_index_that_only_one_part_yields_is_left_out(labeled, unlabeled):
    dataset = LabeledAndUnlabeled(labeled, unlabeled, labels=[0] * 31)
    data, labels = next(iter(torch.utils.data.DataLoader(dataset, batch_size=62)))
    assert len(data) == len(labels) == 62


def test_an_empty_part_takes_no_index_from_the_other():
    assert LabeledAndUnlabeled(Numbers(), [])[3][1:] == (0, 3)
