"""Distil on several processes: each on a GPU of its own (NCCL), or on the CPU (Gloo).

    torchrun --standalone --nproc-per-node 4 examples/train_ddp.py --teacher teacher.pth

Every process draws its part of one joint batch, whole classes of it, and `DistributedLossWrapper` computes both losses
on the joint batch. The update is that of one process with the joint batch, except for what batch norm does with the
samples: each process normalises its own part. `--batch-norm sync` normalises the joint batch (GPUs only);
`--batch-norm frozen` uses the running statistics, and then any number of processes ends with the same weights.

With `--cache FOLDER` the teacher runs once, before the training, each process on its share of the images; a next run
finds its embeddings there.

The losses shown are of the joint batch times the number of processes, by which DDP's mean divides the gradients.
"""

import argparse
import gc
import os

import torch

# Before there is a process group: imported by DDP, its functions would hold the group, and its threads outlive it.
import torch.distributed.nn
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch.nn.parallel import DistributedDataParallel

from pml_distill.datasets import Glyphs, SeededViews
from pml_distill.losses import RelativeTeacherLoss
from pml_distill.models import SmallResNet
from pml_distill.samplers import DistributedMPerClassSampler
from pml_distill.teachers import CachedTeacher, FrozenTeacher, TeacherCache
from pml_distill.trainers import DistillationTrainer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", help="state dict of a SmallResNet(32); without, the teacher is untrained")
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100, help="per epoch")
    parser.add_argument("--batch-norm", choices=("own", "sync", "frozen"), default="own")
    parser.add_argument("--plain-images", action="store_true", help="no random jitter")
    parser.add_argument("--cache", help="folder for the teacher's embeddings, written first, a share by each process")
    parser.add_argument("--views", type=int, default=8, help="augmented views of each image in the cache")
    parser.add_argument("--out", default="student.pth", help="where the student's weights go")
    return parser.parse_args()


def train(options: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """Return the student that all processes have trained together."""
    rank, num_processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)  # the same weights everywhere
    dataset = Glyphs("train", augment=not options.plain_images)
    teacher, student = SmallResNet(32), SmallResNet(8)
    if options.teacher:
        teacher.load_state_dict(torch.load(options.teacher, map_location="cpu"))
    if options.batch_norm == "sync":
        student = torch.nn.SyncBatchNorm.convert_sync_batchnorm(student)
    trunk = DistributedDataParallel(student.to(device), device_ids=[device] if device.type == "cuda" else None)
    frozen = FrozenTeacher(teacher.to(device))
    if options.cache:
        dataset = SeededViews(dataset, views=options.views)
        TeacherCache(options.cache, frozen, dataset, batch_size=256).write()
        frozen = CachedTeacher(options.cache, dataset)

    torch.manual_seed(rank)  # other jitter on each process
    batch_size = options.batch_size // num_processes
    trainer = DistillationTrainer(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.SGD(trunk.parameters(), lr=options.lr, momentum=0.9)},
        batch_size=batch_size,
        loss_funcs={
            "metric_loss": DistributedLossWrapper(MultiSimilarityLoss()),
            "distillation_loss": DistributedLossWrapper(RelativeTeacherLoss()),
        },
        dataset=dataset,
        teacher=frozen,
        sampler=DistributedMPerClassSampler(dataset.labels, m=4, batch_size=batch_size),
        iterations_per_epoch=options.steps,
        freeze_trunk_batchnorm=options.batch_norm == "frozen",
        data_device=device,
        dataloader_num_workers=0,
    )
    trainer.train(num_epochs=options.epochs)
    return student


def main() -> None:
    options = parse()
    gpus = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if gpus else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    student = train(options, device)
    if torch.distributed.get_rank() == 0:
        torch.save(student.state_dict(), options.out)
    # No process leaves while another still talks to it, nor while the wrapper of the student, in a cycle with the
    # trainer, holds the group.
    torch.distributed.barrier()
    gc.collect()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
