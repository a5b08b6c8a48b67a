"""One network trained on one set of images: the teacher that is tuned, a student alone, a student distilled."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from ..capacity import CapacityDynamics, SizeBudget, export, insert_compactors, load_compact, save_compact
from ..datasets import SeededViews
from ..datasets.items import UNLABELED
from ..models import EmbeddingNetwork
from ..samplers import DistributedMPerClassSampler, MixedSampler
from ..trainers import DistillationTrainer, LossWeightRamp
from ..utils.distributed import in_first_process, num_processes, process_rank
from ..utils.files import write_json
from ..utils.modules import eval_mode
from .settings import PER_CLASS, SHRINKING
from .views import loader_of

WEIGHTS, CURVE, CHECKPOINT = "weights.safetensors", "curve.json", "checkpoint.pth"


@dataclass(frozen=True)
class Machine:
    """Where networks run, in mixed precision on a GPU."""

    device: torch.device
    workers: int
    batch_size: int

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """The lower of the two precisions; None for no mixed one."""
        if self.device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16

    @torch.no_grad()
    def embed(self, network: nn.Module, images: Dataset, progress: str = "") -> torch.Tensor:
        """Return what a network makes of a dataset of (image, label), on the CPU: embeddings, or codes of -1 and 1."""
        placed(network, self.device)
        with eval_mode(network), torch.autocast(self.device.type, self.amp_dtype, self.amp_dtype is not None):
            loader = loader_of(images, self.batch_size, self.workers, progress)
            outputs = torch.cat(
                [network(batch[0].to(self.device, non_blocking=True)).float().cpu() for batch in loader]
            )
        return outputs.sign() if isinstance(network, EmbeddingNetwork) and not network.normalize else outputs


@dataclass
class Training:
    """What a network learns from, and where it is kept.

    Args:
        folder: of its weights, checkpoints and logs.
        network: to train; it stays as it is.
        views: (data, label, row) of the training images.
        machine: where it runs.
        epochs, rate, seed: of the training.
        metric_loss: on the labels; None for none.
        distillation: on the teacher's outputs; None for none.
        teacher: called on the data.
        projection: between the embeddings and the teacher's, for the training alone.
        ramp: of the weight of ``distillation``; None for none.
        validate: measures the network now and then.
        keep_flops: share of the trunk's FLOPs that shall remain; None for all.
        image_shape: (C, H, W), to count them.
    """

    folder: Path
    network: EmbeddingNetwork
    views: SeededViews
    machine: Machine
    epochs: int
    rate: float
    seed: int
    metric_loss: nn.Module | None = None
    distillation: nn.Module | None = None
    teacher: Any = None
    projection: nn.Module | None = None
    ramp: LossWeightRamp | None = None
    validate: Callable[[EmbeddingNetwork], float] | None = None
    keep_flops: float | None = None
    image_shape: tuple[int, ...] = ()
    curve: list[dict[str, float]] = field(default_factory=list)

    def finish(self) -> EmbeddingNetwork:
        """Train, from where an earlier call was interrupted, or load what it has finished; return the network."""
        weights = self.folder / WEIGHTS
        if not weights.exists():
            trained = self.train()

            def save() -> None:
                save_compact(trained, weights)
                for path in self.folder.glob(f"*{CHECKPOINT}"):
                    path.unlink()

            in_first_process(save)
        self.curve = json.loads((self.folder / CURVE).read_text(encoding="utf-8"))
        return placed(load_compact(weights, self.network), self.machine.device)

    def train(self) -> EmbeddingNetwork:
        """Train a copy of the network to the end and return it."""
        from pytorch_metric_learning.utils.logging_presets import HookContainer, get_record_keeper

        self.folder.mkdir(parents=True, exist_ok=True)
        network, first, keeper = copy.deepcopy(self.network), process_rank() == 0, None
        trainer = self.trainer(network)
        path, start = self.folder / (f"{process_rank()}-{CHECKPOINT}" if num_processes() > 1 else CHECKPOINT), 1
        if path.exists():
            start = trainer.load_checkpoint(path)
            self.curve = json.loads((self.folder / CURVE).read_text(encoding="utf-8"))[: start - 1]
        if first:
            keeper, _, _ = get_record_keeper(str(self.folder / "logs"), str(self.folder / "tensorboard"))
            trainer.end_of_iteration_hook = HookContainer(keeper, log_freq=50).end_of_iteration_hook

        def end_of_epoch(trainer: Any) -> None:
            point = {name: float(loss) for name, loss in trainer.epoch_losses.items()} | {"epoch": trainer.epoch}
            if self.validate is not None and trainer.epoch % max(1, self.epochs // 10) == 0:
                point["validation"] = self.validate(network)
                if keeper is not None:
                    keeper.tensorboard_writer.add_scalar("validation", point["validation"], trainer.epoch)
            self.curve.append(point)
            if first:
                write_json(self.folder / CURVE, self.curve)
            trainer.save_checkpoint(path)

        trainer.end_of_epoch_hook = end_of_epoch
        try:
            trainer.train(start, self.epochs)
        finally:
            if keeper is not None:
                keeper.save_records()
                keeper.tensorboard_writer.close()
        if self.keep_flops:
            network.trunk = export(network.trunk.eval())
        return network

    def trainer(self, network: EmbeddingNetwork) -> DistillationTrainer:
        """Build the trainer."""
        device, distributed = self.machine.device, num_processes() > 1
        if self.keep_flops:
            insert_compactors(network.trunk)
        placed(network, device).requires_grad_(True).train()
        parts = {"trunk": network.trunk, "embedder": network.embedder, "projection": copy.deepcopy(self.projection)}
        models = {key: part.to(device) for key, part in parts.items() if part is not None and list(part.parameters())}
        functions = {"metric_loss": self.metric_loss, "distillation_loss": self.distillation}
        losses: dict[str, nn.Module] = {key: loss.to(device) for key, loss in functions.items() if loss is not None}
        if distributed:
            from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

            models = {key: DistributedDataParallel(model) for key, model in models.items()}
            losses = {key: DistributedLossWrapper(loss) for key, loss in losses.items()}
        sampler, batch_size, steps = self.batches()
        total, optimizers, schedulers = self.epochs * steps, {}, {}
        for key, model in models.items():
            # Weight decay would shorten the rows of compactors.
            optimizer = torch.optim.AdamW(model.parameters(), self.rate, weight_decay=0 if self.keep_flops else 1e-2)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=total + 1, pct_start=0.2)
            optimizers[f"{key}_optimizer"], schedulers[f"{key}_scheduler_by_iteration"] = optimizer, schedule
        if self.keep_flops:
            budget = SizeBudget(flops=self.keep_flops, steps=max(1, round(SHRINKING * total)))
            CapacityDynamics(models["trunk"], optimizers["trunk_optimizer"], self.image_shape, budget=budget)
        torch.manual_seed(self.seed + process_rank())
        return DistillationTrainer(
            models=models,
            optimizers=optimizers,
            batch_size=batch_size,
            loss_funcs=losses,
            loss_weights=dict.fromkeys(losses, 1.0),
            loss_weight_ramps={"distillation_loss": self.ramp} if self.ramp is not None else None,
            dataset=self.views,
            sampler=sampler,
            iterations_per_epoch=steps,
            lr_schedulers=schedulers,
            teacher=self.teacher,
            amp_dtype=self.machine.amp_dtype,
            data_device=device,
            dataloader_num_workers=self.machine.workers,
        )

    def batches(self) -> tuple[Any, int, int]:
        """Return the sampler of a process, the size of its batches and their number in an epoch."""
        labels, processes = self.views.labels, num_processes()
        share = len(labels) // processes
        batch_size = max(1, min(self.machine.batch_size // processes, share))
        known = labels[labels != UNLABELED]
        if self.metric_loss is None or not len(known):
            return None, batch_size, share // batch_size
        # Images without a label are of no use to labels alone: that student has whole batches of labelled ones.
        complete = len(known) == len(labels) or self.distillation is None
        classes, per_class = len(known.unique()) // processes, PER_CLASS
        part = batch_size if complete else batch_size // 2
        while part // per_class > classes:
            per_class *= 2
        part = max(1, part // per_class) * per_class
        batch_size = part if complete else part + min(max(1, batch_size - part), len(labels) - len(known))
        length = max(share, batch_size)
        if complete:
            return DistributedMPerClassSampler(labels, per_class, part, length), part, length // part
        fraction = part / batch_size
        return MixedSampler(labels, per_class, batch_size, fraction, length), batch_size, length // batch_size


def placed(network: Any, device: torch.device) -> Any:
    """Move a network to a device, in the layout that convolutions are fast in, and return it.

    In torch 2.14 with AVX2 the backward pass of a strided 1x1 convolution of few channels breaks the memory in it.
    """
    convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    few = any(min(part.in_channels, part.out_channels) < 8 and part.kernel_size == (1, 1) for part in convolutions)
    return network.to(device, memory_format=torch.contiguous_format if few else torch.channels_last)
