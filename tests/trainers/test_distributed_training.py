"""Two real gloo processes through the trainer end like one process with the joined batch, feature losses included."""

import gc

import torch

# Before there is a process group: imported by DDP, its functions would hold the group, and its threads outlive it.
import torch.distributed.nn
import torch.multiprocessing
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pml_distill.losses import DarkRankLoss, VariationalInformationLoss
from pml_distill.samplers import DistributedMPerClassSampler
from pml_distill.teachers import FrozenTeacher
from pml_distill.trainers import DistillationTrainer

KEY = "feature_distillation_loss"
LABELS = torch.arange(8).repeat(6)


def network(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2), nn.GroupNorm(1, width), nn.Tanh(), nn.Flatten(), nn.Linear(9 * width, 5)
    ).double()


def train(processes, checkpoint=None):
    """Return trunk and feature loss after ten steps; save after five, or go on from there."""
    torch.manual_seed(0)
    images = torch.rand(len(LABELS), 1, 8, 8, dtype=torch.float64)
    trunk, teacher, feature_loss = network(2), network(3), VariationalInformationLoss([2], [3]).double()
    metric_loss, distillation_loss = MultiSimilarityLoss(), DarkRankLoss(list_length=4)
    models, losses = trunk, feature_loss
    if processes > 1:
        models, losses = DistributedDataParallel(trunk), DistributedDataParallel(feature_loss)
        metric_loss, distillation_loss = DistributedLossWrapper(metric_loss), DistributedLossWrapper(distillation_loss)
    trainer = DistillationTrainer(
        models={"trunk": models},
        optimizers={
            "trunk_optimizer": torch.optim.SGD(models.parameters(), lr=0.05, momentum=0.9),
            f"{KEY}_optimizer": torch.optim.SGD(losses.parameters(), lr=0.05, momentum=0.9),
        },
        batch_size=16 // processes,
        loss_funcs={"metric_loss": metric_loss, "distillation_loss": distillation_loss, KEY: losses},
        dataset=torch.utils.data.TensorDataset(images, LABELS),
        teacher=FrozenTeacher(teacher),
        student_features=["1"],
        teacher_features=["1"],
        sampler=DistributedMPerClassSampler(LABELS, 2, 16 // processes),
        iterations_per_epoch=5,
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
        end_of_epoch_hook=lambda t: t.epoch == 1 and checkpoint and t.save_checkpoint(checkpoint) or True,
    )
    start = trainer.load_checkpoint(checkpoint) if checkpoint and checkpoint.exists() else 1
    trainer.train(start, 2)
    return {**trunk.state_dict(), **feature_loss.state_dict()}


def worker(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = [train(2, folder / f"checkpoint_{rank}.pth") for _ in range(2)]
    torch.save(results, folder / f"{rank}.pth")
    # No process leaves while another still talks to it.
    torch.distributed.barrier()
    gc.collect()
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_and_resume(tmp_path):
    torch.multiprocessing.spawn(worker, args=(tmp_path,), nprocs=2)
    expected = train(1)
    for rank in range(2):
        whole, resumed = torch.load(tmp_path / f"{rank}.pth")
        for name, value in expected.items():
            assert torch.allclose(whole[name], value, rtol=0, atol=1e-9), name
            assert torch.equal(whole[name], resumed[name]), name
