"""Two real gloo processes: DistributedLossWrapper gives the loss and gradient of the joined batch."""

import torch

# Before there is a process group: imported by DDP, its functions would hold the group, and its threads outlive it.
import torch.distributed.nn
import torch.multiprocessing
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from test_contract import LOSSES, embeddings

from pml_distill.losses import (
    CollaborativeRankLoss,
    DecoupledDifferentialLoss,
    DistillationMemory,
    MutualDistanceLoss,
    RankPreservationLoss,
    RelativeTeacherLoss,
    SimilarityDistributionLoss,
)

PER_RANK = 6
QUEUE = {"queue_size": 24, "width": 5}
WITH_QUEUE = {
    "one queue": lambda: SimilarityDistributionLoss(**QUEUE),
    "two queues": lambda: SimilarityDistributionLoss(**QUEUE, student_width=5),
    "with the batch": lambda: SimilarityDistributionLoss(**QUEUE, include_batch=True, topk=5),
    "mutual_distance": lambda: MutualDistanceLoss(**QUEUE),
    "rank_preservation": lambda: RankPreservationLoss(topk=5, **QUEUE),
    "decoupled_differential": lambda: DecoupledDifferentialLoss(topk=5, **QUEUE),
    "collaborative_rank": lambda: CollaborativeRankLoss(topk=5, **QUEUE),
    "memory": lambda: DistillationMemory(RelativeTeacherLoss(), 5, 24),
}
STEPS = 4


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 5)


def worker(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    results = {}
    for name in LOSSES:
        model = torch.nn.parallel.DistributedDataParallel(network())
        loss = DistributedLossWrapper(LOSSES[name]())
        data, teacher = embeddings(2 * PER_RANK)[rows], embeddings(2 * PER_RANK, 5, seed=1)[rows]
        value = loss(model(data), ref_emb=teacher)
        value.backward()
        results[name] = value.detach(), model.module.weight.grad
        efficient = DistributedLossWrapper(LOSSES[name](), efficient=True)
        try:
            efficient(data[:, :5], torch.arange(PER_RANK), ref_emb=teacher)
        except ValueError as error:
            results[name] += (str(error),)
    for name in WITH_QUEUE:
        model = torch.nn.parallel.DistributedDataParallel(network())
        loss = DistributedLossWrapper(WITH_QUEUE[name]())
        results["queue", name] = []
        for step in range(STEPS):
            model.zero_grad()
            data, teacher = embeddings(2 * PER_RANK, 6, step)[rows], embeddings(2 * PER_RANK, 5, 10 + step)[rows]
            value = loss(model(data), ref_emb=teacher)
            value.backward()
            results["queue", name].append((value.detach(), model.module.weight.grad.clone()))
    torch.save(results, f"{folder}/{rank}.pth")
    # No process leaves while another still talks to it.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pth")
        for name in LOSSES:
            model = network()
            expected = LOSSES[name]()(model(embeddings(12)), ref_emb=embeddings(12, 5, seed=1))
            expected.backward()
            value, gradient, error = results[name]
            # The wrapper multiplies by the number of processes, by which DDP's mean divides the gradients.
            assert torch.allclose(value, 2 * expected, rtol=1e-5), name
            assert torch.allclose(gradient, model.weight.grad, rtol=1e-4, atol=1e-6), name
            assert "(6, 5)" in error and "(12, 5)" in error and "efficient=False" in error, name
        for name in WITH_QUEUE:
            model, loss = network(), WITH_QUEUE[name]()
            for step, (value, gradient) in enumerate(results["queue", name]):
                model.zero_grad()
                expected = loss(model(embeddings(12, 6, step)), ref_emb=embeddings(12, 5, 10 + step))
                expected.backward()
                assert torch.allclose(value, 2 * expected, rtol=1e-5), (name, step)
                assert torch.allclose(gradient, model.weight.grad, rtol=1e-4, atol=1e-6), (name, step)
