import pytest
import torch
import torch.multiprocessing as mp

from pml_distill.samplers import MixedSampler
from pml_distill.trainers.resumable_data_loader import ResumableDataLoader

# 6 classes of 5 samples, 50 samples without label.
LABELS = torch.cat([torch.arange(6).repeat(5), torch.full((50,), -1)])


@pytest.mark.parametrize("fraction, labeled", [(0.1, 2), (0.25, 4), (0.5, 8), (0.7, 12)])
def test_each_batch_has_the_ratio_and_m_different_samples_of_each_class(fraction, labeled):
    sampler = MixedSampler(LABELS, 2, 16, fraction)
    indices = torch.tensor(list(sampler))
    assert len(indices) == len(sampler) == 80
    for batch in indices.view(5, 16):
        assert len(batch.unique()) == 16
        known = LABELS[batch][LABELS[batch] >= 0]
        assert len(known) == labeled and (known.unique(return_counts=True)[1] == 2).all()


def test_unlabelled_samples_all_come_before_one_comes_again():
    indices = torch.tensor(list(MixedSampler(LABELS, 2, 14, 0.3, length_before_new_iter=14 * 10)))
    others = indices[LABELS[indices] == -1]
    assert len(others) == 100
    for half in others.view(2, 50):
        assert len(half.unique()) == 50
    assert not torch.equal(*others.view(2, 50))


def test_a_fraction_of_one_draws_labelled_samples_alone():
    indices = torch.tensor(list(MixedSampler(LABELS, 4, 16, 1.0)))
    assert (LABELS[indices] >= 0).all()
    assert (list(MixedSampler(torch.arange(4).repeat(4), 4, 8, 1.0))) != []


def test_small_classes_are_repeated():
    indices = torch.tensor(list(MixedSampler(torch.tensor([0, 1, 1, -1, -1]), 4, 5, 0.8)))
    assert LABELS.new_tensor([0, 1, 1, -1, -1])[indices[:4]].unique().numel() == 1


def test_torch_s_seed_decides():
    def drawn(seed):
        torch.manual_seed(seed)
        sampler = MixedSampler(LABELS, 2, 16)
        return [list(sampler), list(sampler)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0)[0] != drawn(0)[1]


def test_resumes_in_the_middle_of_a_pass():
    loader = torch.utils.data.DataLoader(torch.arange(80), batch_size=16, sampler=MixedSampler(LABELS, 2, 16))
    straight = ResumableDataLoader(loader)
    batches = iter(straight)
    [next(batches) for _ in range(2)]
    position = straight.position()
    rest = [batch.tolist() for batch in batches]
    assert [batch.tolist() for batch in ResumableDataLoader(loader, position)] == rest


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"labeled_fraction": 0.0}, "makes 0 classes"),
        ({"labeled_fraction": 1.0}, "makes 8 classes of m = 2 samples in a batch, but labels has 6 classes"),
        ({"labeled_fraction": 1.5, "m": 4}, "at most 4"),
        ({"batch_size": 81}, "batch_size must be from 1 to the length of a pass, 80, but is 81"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"m": 0}, "m must be at least 1, but is 0"),
        ({"labels": torch.eye(80, 5)}, r"labels must be \(N,\), .* but have shape \(80, 5\)"),
        ({"labels": torch.arange(4).repeat(8)}, "asks for 8 unlabelled samples"),
    ],
)
def test_refuses_what_cannot_be_drawn(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixedSampler(**{"labels": LABELS, "m": 2, "batch_size": 16} | arguments)


def draw_in_process(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    torch.manual_seed(0)
    torch.save(list(MixedSampler(LABELS, 2, 16)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_with_one_seed_draw_batches_of_their_own(tmp_path):
    mp.spawn(draw_in_process, (tmp_path,), nprocs=2)
    drawn = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert drawn[0] != drawn[1]
    torch.manual_seed(0)
    assert drawn[0] == list(MixedSampler(LABELS, 2, 16))
