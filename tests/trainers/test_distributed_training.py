"""Two real gloo processes through the trainer end like one process with the joined batch, feature losses included."""

import gc
import time

import pytest
import torch

# Before there is a process group: imported by DDP, its functions would hold the group, and its threads outlive it.
import torch.distributed.fsdp
import torch.distributed.nn
import torch.multiprocessing
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from pml_distill.losses import DarkRankLoss, HintLoss, RKDDistanceLoss, VariationalInformationLoss
from pml_distill.miners import TeacherNeighborMiner
from pml_distill.samplers import DistributedMPerClassSampler
from pml_distill.teachers import FrozenTeacher
from pml_distill.trainers import DistillationTrainer, DistillationWithClassifier

KEY = "feature_distillation_loss"
LABELS = torch.arange(8).repeat(6)


def network(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2), nn.GroupNorm(1, width), nn.Tanh(), nn.Flatten(), nn.Linear(9 * width, 5)
    ).double()


def train(processes, checkpoint=None, wrap=DistributedDataParallel):
    """Return trunk and feature loss after ten steps; save after five, or go on from there."""
    torch.manual_seed(0)
    images = torch.rand(len(LABELS), 1, 8, 8, dtype=torch.float64)
    trunk, teacher, feature_loss = network(2), network(3), VariationalInformationLoss([2], [3]).double()
    metric_loss, distillation_loss = MultiSimilarityLoss(), DarkRankLoss(list_length=4)
    models, losses = trunk, feature_loss
    if processes > 1:
        models, losses = wrap(trunk), wrap(feature_loss)
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
    state = {**trunk.state_dict(), **feature_loss.state_dict()}
    return {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in state.items()}


def sharded(module):
    return torch.distributed.fsdp.fully_shard(module, mesh=init_device_mesh("cpu", (2,)))


def leave(rank, folder, results):
    torch.save(results, folder / f"{rank}.pth")
    # No process leaves while another still talks to it.
    torch.distributed.barrier()
    gc.collect()
    torch.distributed.destroy_process_group()


def worker(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = [train(2, folder / f"checkpoint_{rank}.pth") for _ in range(2)]
    if hasattr(torch.distributed.fsdp, "fully_shard"):  # torch 2.6
        results += [train(2, folder / f"sharded_{rank}.pth", sharded) for _ in range(2)]
    leave(rank, folder, results)


def test_two_processes_equal_one_and_resume(tmp_path):
    torch.multiprocessing.spawn(worker, args=(tmp_path,), nprocs=2)
    expected = train(1)
    for rank in range(2):
        runs = torch.load(tmp_path / f"{rank}.pth")
        for whole, resumed in zip(runs[::2], runs[1::2], strict=True):
            for name, value in expected.items():
                assert torch.allclose(whole[name], value, rtol=0, atol=1e-9), name
                assert torch.equal(whole[name], resumed[name]), name


class Seen(torch.utils.data.Dataset):
    """Images that remember who was asked for."""

    def __init__(self, labels):
        torch.manual_seed(0)
        self.images, self.labels, self.asked = torch.rand(len(labels), 1, 8, 8, dtype=torch.float64), labels, []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.images[index], self.labels[index]


def student_and_trainer(loss_funcs, labels=LABELS, trainer=DistillationTrainer, **kwargs):
    """Return a student inside of DistributedDataParallel and what trains it, with batches of four in each process."""
    torch.manual_seed(1)
    student = network(2)
    models = {"trunk": DistributedDataParallel(student), **kwargs.pop("models", {})}
    learning = [*models.values(), *loss_funcs.values()]
    return student, trainer(
        models=models,
        optimizers={"trunk_optimizer": torch.optim.SGD([p for m in learning for p in m.parameters()], lr=0.05)},
        batch_size=4,
        loss_funcs=loss_funcs,
        dataset=Seen(labels),
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
        **{"teacher": FrozenTeacher(network(3)), **kwargs},
    )


def taps(loss):
    return {"loss_funcs": {KEY: loss}, "student_features": ["1"], "teacher_features": ["1"]}


def several(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}

    # Nothing but the maps of one layer has a loss.
    student, trainer = student_and_trainer(**taps(DistributedDataParallel(HintLoss([2], [3]).double())))
    trainer.train(num_epochs=2)
    results["features alone"] = student.state_dict()
    results["asked"] = trainer.dataset.asked

    # The second process has no labelled row in its batches.
    labels = torch.where(torch.arange(len(LABELS)) < len(LABELS) // 2, LABELS, -1)
    student, trainer = student_and_trainer(
        {"metric_loss": MultiSimilarityLoss(), "classifier_loss": nn.CrossEntropyLoss()},
        labels,
        DistillationWithClassifier,
        models={"classifier": DistributedDataParallel(nn.Linear(5, 8).double())},
        teacher=None,
        sampler=torch.arange(len(labels)).chunk(2)[rank].tolist(),
    )
    trainer.train(num_epochs=1)
    results["without labels"] = {**student.state_dict(), **trainer.models["classifier"].module.state_dict()}

    for alone, message in (
        (taps(HintLoss([2], [3]).double()), 'loss_funcs."feature_distillation_loss". would learn in each process for'),
        (
            {"loss_funcs": {"distillation_loss": RKDDistanceLoss()}, "models": {"projection": nn.Linear(5, 5)}},
            'models."projection". would learn in each process for itself, while models."trunk".* does not',
        ),
        (
            {
                "loss_funcs": {"distillation_loss": DistributedLossWrapper(RKDDistanceLoss())},
                "mining_funcs": {"tuple_miner": DistributedMinerWrapper(TeacherNeighborMiner(2), efficient=True)},
            },
            'mining_funcs."tuple_miner". is a DistributedMinerWrapper with efficient=True',
        ),
        (
            {
                "loss_funcs": {"distillation_loss": DistributedLossWrapper(RKDDistanceLoss())},
                "models": {"trunk": network(2)},
            },
            'models."trunk". would learn in each process .*, but loss_funcs."distillation_loss". gathers',
        ),
    ):
        with pytest.raises(ValueError, match=message):
            student_and_trainer(**alone)

    own, other = folder / f"own_{rank}.pth", folder / f"own_{1 - rank}.pth"
    if rank == 1:
        time.sleep(1)
        assert not other.exists(), "replaced before both have written"
    trainer.save_checkpoint(own)
    assert trainer.load_checkpoint(own) == 2
    trainer.epoch += rank
    trainer.save_checkpoint(own)
    with pytest.raises(ValueError, match=r"checkpoint of one epoch in all processes.*the epochs \[1, 2\]"):
        trainer.load_checkpoint(own)

    leave(rank, folder, results)


def test_processes_stay_together_whatever_losses_a_batch_has(tmp_path):
    torch.multiprocessing.spawn(several, args=(tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    torch.manual_seed(1)
    initial = network(2).state_dict()
    for key in ("features alone", "without labels"):
        assert all(torch.equal(first[key][name], second[key][name]) for name in first[key]), key
        assert not torch.equal(first[key]["0.weight"], initial["0.weight"]), key
    # Without a sampler: each its own half of the data, and another order in the second epoch.
    halves = [(set(drawn[:24]), set(drawn[24:])) for drawn in (first["asked"], second["asked"])]
    for epoch in range(2):
        assert halves[0][epoch] | halves[1][epoch] == set(range(48)) and not halves[0][epoch] & halves[1][epoch]
    assert halves[0][0] != halves[0][1] and first["asked"][:24] != first["asked"][24:]
