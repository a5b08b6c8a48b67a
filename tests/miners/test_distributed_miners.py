"""Two real gloo processes with PML's wrappers mine and learn what one does from the joined batch."""

import pytest
import torch
import torch.multiprocessing
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper

from pml_distill.losses import DarkRankLoss, RelativeTeacherLoss
from pml_distill.miners import TeacherMiner, TeacherNeighborMiner, TeacherRankMiner

MINERS = {
    "neighbor": (TeacherNeighborMiner(3), True),
    "neighbor without labels": (TeacherNeighborMiner(3), False),
    "rank": (TeacherRankMiner(3), False),
    "any": (TeacherMiner(MultiSimilarityMiner(epsilon=0.5)), True),
}


def batch():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(16, width, generator=generator, dtype=torch.float64) for width in (5, 7))
    return student.requires_grad_(), torch.arange(16) % 4, teacher


def losses_of(student, labels, teacher, miner, wrap):
    pairs = miner(student, labels, ref_emb=teacher)
    found = [wrap(loss)(student, labels, pairs, ref_emb=teacher) for loss in (RelativeTeacherLoss(), DarkRankLoss())]
    if labels is not None:
        found.append(wrap(TripletMarginLoss())(student, labels, pairs))
    return torch.stack(found), len(torch.cat(pairs))


def worker(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for name, (miner, labelled) in MINERS.items():
        student, labels, teacher = batch()
        rows = slice(8 * rank, 8 * rank + 8)
        found, count = losses_of(
            student[rows],
            labels[rows] if labelled else None,
            teacher[rows],
            DistributedMinerWrapper(miner),
            DistributedLossWrapper,
        )
        found.sum().backward()
        results[name] = found.detach(), count, student.grad[rows]
    torch.save(results, folder / f"{rank}.pth")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, args=(folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pth") for rank in range(2)]


@pytest.mark.parametrize("name", MINERS)
def test_two_processes_mine_what_one_does(ranks, name):
    miner, labelled = MINERS[name]
    student, labels, teacher = batch()
    expected, count = losses_of(student, labels if labelled else None, teacher, miner, lambda loss: loss)
    expected.sum().backward()
    assert count > 0
    for rank, results in enumerate(ranks):
        found, own_count, gradient = results[name]
        # The wrapper multiplies by the number of processes, by which DDP's mean divides the gradients.
        assert own_count == count and torch.allclose(found, 2 * expected, atol=1e-10)
        assert torch.allclose(gradient, 2 * student.grad[8 * rank : 8 * rank + 8], atol=1e-10)
