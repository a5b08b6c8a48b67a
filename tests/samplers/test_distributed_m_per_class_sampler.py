import pytest
import torch

from pml_distill.samplers import DistributedMPerClassSampler
from pml_distill.trainers.resumable_data_loader import ResumableDataLoader

LABELS = torch.arange(12).repeat(7)


def draw(monkeypatch, rank, processes, batch_size, passes=1, **kwargs):
    """What the sampler of one process yields; rank 0's seed needs no sending, all begin alike."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda objects: None)
    torch.manual_seed(0)
    sampler = DistributedMPerClassSampler(LABELS, 2, batch_size, batch_size * 5, **kwargs)
    return torch.tensor([list(sampler) for _ in range(passes)]).view(passes * 5, batch_size)


@pytest.mark.parametrize("processes", [2, 3])
def test_the_parts_join_to_what_one_process_draws(monkeypatch, processes):
    parts = [draw(monkeypatch, rank, processes, 4, passes=2) for rank in range(processes)]
    assert torch.equal(torch.cat(parts, dim=1), draw(monkeypatch, 0, 1, 4 * processes, passes=2))


def test_each_joint_batch_has_m_different_samples_of_each_class_and_classes_stay_whole(monkeypatch):
    parts = [draw(monkeypatch, rank, 3, 4) for rank in range(3)]
    for batch in torch.cat(parts, dim=1):
        assert len(batch.unique()) == 12
        assert LABELS[batch].unique(return_counts=True)[1].tolist() == [2] * 6
    assert all(len(LABELS[row].unique()) == 2 for part in parts for row in part)


def test_passes_and_batches_differ(monkeypatch):
    batches = draw(monkeypatch, 0, 2, 4, passes=2)
    assert len({tuple(batch.tolist()) for batch in batches}) == 10


def test_without_a_process_group_it_draws_for_one_process():
    sampler = DistributedMPerClassSampler(LABELS.tolist(), 3, 12, 50)
    assert len(sampler) == len(list(sampler)) == 48


def test_samples_of_small_classes_repeat():
    labels = torch.tensor([0, 1, 1, 1])
    drawn = torch.tensor(list(DistributedMPerClassSampler(labels, 3, 6, 6)))
    assert sorted(drawn.tolist()) == [0, 0, 0, 1, 2, 3]


def test_samples_without_a_label_are_no_class():
    labels = torch.tensor([-1, 0, 0, -1, 1, 1, -1])
    drawn = torch.tensor(list(DistributedMPerClassSampler(labels, 2, 4, 40)))
    assert drawn.unique().tolist() == [1, 2, 4, 5]


def test_a_pass_is_continued_where_it_was_left():
    def loader():
        sampler = DistributedMPerClassSampler(LABELS, 2, 4, 40)
        return torch.utils.data.DataLoader(range(len(LABELS)), 4, sampler=sampler)

    whole = ResumableDataLoader(loader())
    first = iter(whole)
    for _ in range(3):
        next(first)
    position, rest = whole.position(), [batch.tolist() for batch in first]
    torch.rand(5)
    assert [batch.tolist() for batch in ResumableDataLoader(loader(), position)] == rest


@pytest.mark.parametrize(
    ("m", "batch_size", "length", "message"),
    [
        (3, 8, 100, "batch_size is 8, m is 3"),
        (2, 8, 6, "at most length_before_new_iter.*is 6"),
        (2, 0, 6, "batch_size is 0"),
    ],
)
def test_errors_name_what_is_wrong(m, batch_size, length, message):
    with pytest.raises(ValueError, match=message):
        DistributedMPerClassSampler(LABELS, m, batch_size, length)


def test_too_few_classes_for_the_joint_batch_are_counted(monkeypatch):
    with pytest.raises(ValueError, match="4 processes with 4 classes each need 16 classes, but labels has 12"):
        draw(monkeypatch, 0, 4, 8)
