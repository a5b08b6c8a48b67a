import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction, CrossBatchMemory
from pytorch_metric_learning.trainers.base_trainer import BaseTrainer
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils.distributed import DistributedMinerWrapper
from pytorch_metric_learning.utils.loss_tracker import LossTracker
from torch.utils.data import DistributedSampler
from tqdm import tqdm

from ..datasets import Views
from ..datasets.items import UNLABELED
from ..miners import BaseTeacherMiner
from ..utils.distributed import num_processes, process_rank
from ..utils.feature_tap import FeatureTap
from ..utils.files import whole_file
from ..utils.modules import unwrapped
from ..utils.tensors import in_float32, one_tensor
from .checks import check_multi_hot_level, check_setup, without_wrapper
from .random_state import get_random_state, set_random_state
from .resumable_data_loader import ResumableDataLoader

Teacher = Callable[[Any, torch.Tensor | None], torch.Tensor]
SAVED = ("models", "optimizers", "lr_schedulers", "loss_funcs", "mining_funcs", "gradient_clippers")


class BaseDistillationTrainer(BaseTrainer):
    """What the distillation trainers add to PML's: a teacher, mixed precision, accumulation, full resume.

    Everything else is PML's: miners, samplers, schedulers, ``loss_weights``, ``gradient_clippers``,
    ``freeze_these``, hooks, and ``HookContainer`` for logging, saving and early stopping.

    A batch is what the dataset yields: ``(data, labels)``, ``(data, labels, index)`` or, without labels, just
    ``data``. The teacher sees it once per step, as ``teacher(data, index)``. ``tuple_miner`` runs on the student's
    embeddings, one of ``pml_distill.miners`` on the teacher's too, and what it returns goes to both losses, unless
    ``distillation_miner`` finds other pairs for the distillation loss.

    A row with the label -1 is unlabelled. Losses and miners that need labels do not see it; the losses with a teacher
    see all rows, and in a batch with such a row neither labels nor what was mined by them: a miner of
    ``pml_distill.miners`` that needs no labels then mines all rows for them anew. One of PML's own losses as
    ``distillation_loss``, for asymmetric learning, needs labels too. A batch without any labelled row has no
    ``metric_loss``. If the data are ``Views``, student and teacher are shown their own.

    Of several processes without a ``sampler`` each draws its own part of the dataset, which they have in common. Under
    ``DistributedLossWrapper`` each needs as many labelled rows: use ``MixedSampler``.

    Differences from PML's trainers, beyond the additions: loss weights are not applied in place (that breaks the
    backward of losses that end in a root or an exponential), keys must match exactly, the end-of-epoch hook
    finds the mean of each loss over the epoch in ``trainer.epoch_losses``, and an override of ``maybe_do_batch_mining``
    is not called.

    Args:
        *args: those of PML's trainer: models, optimizers, batch_size, loss_funcs, dataset.
        teacher: ``FrozenTeacher``, ``CachedTeacher``, or any frozen callable from (data, index) to embeddings. It lives
            outside of ``models``: it stays in eval mode and out of every checkpoint.
        amp_dtype: ``torch.float16`` (with a gradient scaler) or ``torch.bfloat16`` runs the student's networks
            under autocast; losses are computed in float32. None: no autocast.
        accumulation_steps: how many batches make one optimizer step; their gradients are summed. An epoch still
            goes through the data once.
        student_features: names of the modules of ``models["trunk"]`` whose outputs ``feature_distillation_loss``
            takes, see ``FeatureTap``.
        teacher_features: names of as many modules of the trunk of ``teacher``, which must be a ``FrozenTeacher``, or
            a ``CachedTeacher`` whose cache has these features.
        **kwargs: PML's further arguments.

    Keys:
        ``mining_funcs["distillation_miner"]``, optional, is a miner of ``pml_distill.miners`` for ``distillation_loss``
        alone.
        ``models["projection"]``, optional, maps the student's embeddings to the teacher's width for
        ``distillation_loss`` alone. It is trained and saved beside the student and is no part of it.
        ``loss_funcs["feature_distillation_loss"]``, optional, is a ``HintLoss`` or another loss of two lists of
        feature maps; ``optimizers["feature_distillation_loss_optimizer"]`` trains its parameters, if it has any.

    Raises:
        ValueError: the teacher is missing, unused, not frozen, among the models, shares parameters with the
            student, or reads a cache of another dataset; a key is unknown; features are named that are not there or
            not used; ``amp_dtype`` or ``accumulation_steps`` is out of range;
            ``DistributedLossWrapper(efficient=True)`` around a distillation loss, or the same of a miner that asks the
            teacher; of several processes each would train a part of the models for itself; in a step: a network or the
            teacher returns no single tensor.
    """

    loss_keys_with_teacher: tuple[str, ...] = ("distillation_loss", "feature_distillation_loss")
    # Set by PML, or None until they are needed.
    teacher: Any
    dataloader: Any
    dataloader_iter: Any
    iterations_per_epoch: Any

    def __init__(
        self,
        *args: Any,
        teacher: Teacher | None = None,
        amp_dtype: torch.dtype | None = None,
        accumulation_steps: int = 1,
        student_features: Sequence[str] = (),
        teacher_features: Sequence[str] = (),
        **kwargs: Any,
    ):
        # PML's constructor ends in the checks, which read these.
        self.teacher, self.amp_dtype, self.accumulation_steps = teacher, amp_dtype, accumulation_steps
        self.student_features, self.teacher_features = student_features, teacher_features
        self.epoch, self.data_position, self.dataloader = 0, None, None
        self.outputs: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)
        self.scaler = torch.amp.GradScaler(torch.device(self.data_device).type, enabled=amp_dtype == torch.float16)

    def training_step(self, *batches: Any) -> dict[str, torch.Tensor]:
        """Update the student once, from one batch or from several whose gradients are summed.

        For a loop of your own; ``train`` calls it for you. Modules are not switched to train mode here.

        Args:
            *batches: each ``(data, labels)``, ``(data, labels, index)`` or just ``data``; labels as the losses take
                them: ``set_min_label_to_zero`` and ``label_hierarchy_level`` are for ``train``.

        Returns:
            The weighted losses by name and their ``total_loss``, detached; sums over the batches.
        """
        self.zero_grad()
        self.update_loss_weights()
        sums: dict[str, Any] = dict.fromkeys(self.losses, 0)
        for batch in batches:
            self.zero_losses()
            self.calculate_loss(split_batch(batch))
            self.loss_tracker.update(self.loss_weights)
            self.backward()
            self.outputs = []
            sums = {k: total + torch.as_tensor(self.losses[k]).detach() for k, total in sums.items()}
        self.clip_gradients()
        self.step_optimizers()
        self.losses.update(sums)
        return sums

    def train(self, start_epoch: int = 1, num_epochs: int = 1) -> None:
        """Train from epoch ``start_epoch`` to epoch ``num_epochs``, which is the last one and not a count.

        One progress bar for all epochs; the loss is read from the device only when the bar is drawn, where PML
        waits for it at each iteration.
        """
        self.initialize_dataloader()
        total = max(0, num_epochs - start_epoch + 1) * self.iterations_per_epoch
        with tqdm(total=total, unit="step", desc=f"epoch {start_epoch}/{num_epochs}") as bar:
            for self.epoch in range(start_epoch, num_epochs + 1):
                bar.set_description(f"epoch {self.epoch}/{num_epochs}", refresh=False)
                self.set_to_train()
                self.epoch_losses = dict.fromkeys(self.losses, 0)
                for iteration in range(self.iterations_per_epoch):
                    self.iteration = iteration
                    self.forward_and_backward()
                    self.end_of_iteration_hook(self)
                    for name, loss in self.losses.items():
                        self.epoch_losses[name] = self.epoch_losses[name] + loss / self.iterations_per_epoch
                    if bar.update():
                        bar.set_postfix(total_loss=float(self.losses["total_loss"]), refresh=False)
                    self.step_lr_schedulers(end_of_epoch=False)
                self.step_lr_schedulers(end_of_epoch=True)
                self.zero_losses()
                if self.end_of_epoch_hook(self) is False:
                    break

    def forward_and_backward(self) -> None:
        """Make one step from the next batches of the dataset."""
        self.training_step(*(self.get_batch() for _ in range(self.accumulation_steps)))

    def calculate_loss(self, curr_batch: tuple) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the losses but a classifier's; return student and teacher embeddings."""
        if not self.wants("feature_distillation_loss"):
            return self.calculate_embedding_losses(curr_batch)
        with (
            FeatureTap(self.models["trunk"], self.student_features) as student_tap,
            self.teacher.tap(self.teacher_features) as teacher_tap,
        ):
            embeddings = self.calculate_embedding_losses(curr_batch)
        self.losses["feature_distillation_loss"] = self.loss_funcs["feature_distillation_loss"](
            student_tap.features, teacher_tap.features, all_or_none(curr_batch[1])
        )
        return embeddings

    def calculate_embedding_losses(self, curr_batch: tuple) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute ``metric_loss`` and ``distillation_loss``; return student and teacher embeddings."""
        data, labels, index = curr_batch
        student_data, teacher_data = Views.of(on_views(data, self.on_device))
        with self.autocast():
            projected = output = one_tensor(self.compute_embeddings(student_data), 'models["trunk"] and ["embedder"]')
            if "projection" in self.models:
                projected = one_tensor(self.models["projection"](output), 'models["projection"]')
        embeddings, projected = in_float32(output), in_float32(projected)
        self.outputs += [embeddings, projected]
        teacher_embeddings: Any = None
        if any(self.wants(key) for key in self.loss_keys_with_teacher) or self.teacher_miner("tuple_miner"):
            # PML's losses, for asymmetric learning, compare what has one precision and is on one device.
            with torch.no_grad():
                teacher_embeddings = one_tensor(self.teacher(teacher_data, index), "teacher").to(embeddings)
        rows = labeled_rows(labels)
        known, known_labels, known_teacher = at(rows, embeddings, labels, teacher_embeddings)
        indices_tuple = self.maybe_mine_embeddings(known, known_labels, known_teacher) if len(known) else None
        if self.wants("metric_loss") and len(known):
            self.losses["metric_loss"] = self.maybe_get_metric_loss(known, known_labels, indices_tuple)
        if self.wants("distillation_loss"):
            loss = self.loss_funcs["distillation_loss"]
            seen, seen_labels, seen_teacher = embeddings, labels, teacher_embeddings
            if rows is not None and needs_labels(loss):
                seen, seen_labels, seen_teacher, projected = known, known_labels, known_teacher, projected[rows]
            elif rows is not None:
                # A -1 would be taken for a class, and pairs of labelled rows would keep the other rows from the loss.
                seen_labels = None
            if len(seen):
                if seen is not known or "distillation_miner" in self.mining_funcs:
                    indices_tuple = self.mine_for_distillation(seen, seen_labels, seen_teacher)
                self.losses["distillation_loss"] = loss(projected, seen_labels, indices_tuple, ref_emb=seen_teacher)
        return embeddings, teacher_embeddings

    def on_device(self, data: Any) -> Any:
        """Return a tensor on the trainer's device, and what is none as it is, for a user's own ``get_trunk_output``."""
        return c_f.to_device(data, device=self.data_device) if isinstance(data, torch.Tensor) else data

    def wants(self, loss_name: str) -> bool:
        """Whether this loss is there and has a weight."""
        return loss_name in self.loss_funcs and self.loss_weights[loss_name] > 0

    def autocast(self) -> torch.autocast:
        """The precision of the student's networks."""
        device = torch.device(self.data_device).type
        return torch.autocast(device, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def teacher_miner(self, key: str) -> BaseTeacherMiner | None:
        """Return the miner of this key if it asks the teacher."""
        miner = self.mining_funcs.get(key)
        miner = miner.miner if isinstance(miner, DistributedMinerWrapper) else miner
        return miner if isinstance(miner, BaseTeacherMiner) else None

    def mine_for_distillation(
        self, embeddings: torch.Tensor, labels: torch.Tensor | None, teacher_embeddings: torch.Tensor
    ) -> tuple[torch.Tensor, ...] | None:
        """Run ``distillation_miner``, or else ``tuple_miner``, on all rows if it can do without what is missing."""
        key = "distillation_miner" if "distillation_miner" in self.mining_funcs else "tuple_miner"
        miner = self.teacher_miner(key)
        if miner is None or (miner.needs_labels and labels is None):
            return None
        return self.mining_funcs[key](embeddings, labels, ref_emb=teacher_embeddings)

    def maybe_mine_embeddings(
        self, embeddings: torch.Tensor, labels: torch.Tensor | None, teacher_embeddings: torch.Tensor | None = None
    ) -> tuple | None:
        """Run ``tuple_miner``, if there is one; a miner of this package gets the teacher's embeddings."""
        if self.teacher_miner("tuple_miner") is not None:
            return self.mining_funcs["tuple_miner"](embeddings, labels, ref_emb=teacher_embeddings)
        if "tuple_miner" in self.mining_funcs and labels is None:
            raise ValueError('mining_funcs["tuple_miner"] needs labels, but the dataset yields none.')
        return super().maybe_mine_embeddings(embeddings, labels)

    def get_batch(self) -> tuple:
        """Return the next (data, labels, index); labels and index may be None."""
        self.dataloader_iter, batch = c_f.try_next_on_generator(self.dataloader_iter, self.dataloader)
        data, labels, index = split_batch(self.data_and_label_getter(batch))
        if labels is not None:
            check_multi_hot_level(labels, self.label_hierarchy_level, self.loss_funcs.get("metric_loss"))
            labels = c_f.process_label(labels, self.label_hierarchy_level, self.label_mapper)
        if "subset_batch_miner" in self.mining_funcs:
            kept = self.mine_subset(data, labels)
            data = on_views(data, lambda view: view[kept.to(view.device)])
            labels, index = (None if x is None else x[kept.to(x.device)] for x in (labels, index))
        return data, labels, index

    @torch.no_grad()
    def mine_subset(self, data: torch.Tensor | Views, labels: torch.Tensor | None) -> torch.Tensor:
        """Return the rows that ``subset_batch_miner`` keeps, judged in eval mode, and the unlabelled ones."""
        self.set_to_eval()
        try:
            embeddings = self.compute_embeddings(Views.of(data).student)
            rows = labeled_rows(labels)
            if rows is not None and not len(rows):
                return torch.arange(len(embeddings))
            mined = torch.as_tensor(self.mining_funcs["subset_batch_miner"](*at(rows, embeddings, labels)))
            if rows is None:
                return mined
            dropped = torch.zeros(len(embeddings), dtype=torch.bool).index_fill(0, rows, True)
            dropped[rows[mined.to(rows.device)]] = False
            return (~dropped).nonzero().flatten()
        finally:
            self.set_to_train()

    def backward(self) -> None:
        """Scale the loss for float16 and go back; one process alone does not if all weights are 0 in this step."""
        total = self.losses["total_loss"]
        if num_processes() > 1:
            # DistributedDataParallel waits in all processes for all gradients, whatever losses one of them has.
            total = total + 0 * sum(output.sum() for output in self.outputs if output.requires_grad)
        if isinstance(total, torch.Tensor):
            self.scaler.scale(total).backward()

    def clip_gradients(self) -> None:
        """Bring the gradients back to their scale, then clip."""
        for optimizer in self.stepping_optimizers():
            self.scaler.unscale_(optimizer)
        super().clip_gradients()

    def step_optimizers(self) -> None:
        """Step, unless float16 gradients have overflowed, or nothing went backward."""
        stepping = self.stepping_optimizers()
        for optimizer in stepping:
            self.scaler.step(optimizer)
        if stepping:
            self.scaler.update()

    def stepping_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers that are not frozen and have gradients; a scaler refuses one that has none."""
        return [
            optimizer
            for name, optimizer in self.optimizers.items()
            if name.removesuffix("_optimizer") not in self.freeze_these
            and any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        ]

    def save_checkpoint(self, path: str | os.PathLike) -> None:
        """Write all that an undisturbed continuation needs, replacing an older file only once complete.

        Models, losses, miners, optimizers, schedulers, gradient clippers that have a state, scaler, epoch, the random
        states of Python, NumPy and torch, and the place in the data. Call it last in the end-of-epoch hook: from what
        is written within an epoch a run goes on with the next one, and a warning says so. Of several processes each
        has its own random state and place, and writes a file of its own; all call this, and none replaces its older
        file before all have written.
        """
        left = 0 if self.dataloader is None else self.iterations_per_epoch - 1 - self.iteration
        if left:
            c_f.LOGGER.warning(f"{path} is written within epoch {self.epoch}; a resumed run leaves out {left} steps.")
        state: dict[str, Any] = {
            name: {key: without_numpy(unwrapped(value).state_dict()) for key, value in stateful(getattr(self, name))}
            for name in SAVED
        }
        state.update(
            epoch=self.epoch,
            rank=process_rank(),
            scaler=self.scaler.state_dict(),
            random_state=get_random_state(),
            data_position=None if self.dataloader is None else self.dataloader.position(),
            # PML's state of a cross-batch memory lacks its place in the queue.
            queues={key: (loss.queue_idx, loss.has_been_filled) for key, loss in self.memories()},
        )
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            torch.save(state, unfinished)
            if num_processes() > 1:
                torch.distributed.barrier()

    def load_checkpoint(self, path: str | os.PathLike) -> int:
        """Restore what ``save_checkpoint`` wrote and return the epoch to go on with.

        ``trainer.train(start_epoch=trainer.load_checkpoint(path), num_epochs=...)`` ends, on the CPU, with the
        weights of a run that was never interrupted. Of several processes all call this.

        Raises:
            ValueError: the checkpoint is of a trainer with other models, optimizers, schedulers or losses, of
                another process, or of another epoch than those of the other processes.
        """
        state = torch.load(path, map_location=self.data_device, weights_only=True)
        if not isinstance(state, dict) or "data_position" not in state:
            held = sorted(state)[:5] if isinstance(state, dict) else f"a {type(state).__name__}"
            raise ValueError(f"path {path} must be a file of save_checkpoint, but holds {held}.")
        if state["rank"] != process_rank():
            raise ValueError(
                f"path {path} was written by process {state['rank']}, but this is process {process_rank()}; let each "
                "save to and load from a path of its own."
            )
        epochs: list[Any] = [state["epoch"]] * num_processes()
        if num_processes() > 1:
            torch.distributed.all_gather_object(epochs, state["epoch"])
        if len(set(epochs)) > 1:
            raise ValueError(
                f"path must be the checkpoint of one epoch in all processes, but {path} is of epoch {state['epoch']}, "
                f"and those of processes 0 to {len(epochs) - 1} are of the epochs {epochs}."
            )
        ours = {name: dict(stateful(getattr(self, name))) for name in SAVED}
        for name, objects in ours.items():
            if state[name].keys() != objects.keys():
                raise ValueError(f"{path} holds {name} {sorted(state[name])}, but this trainer has {sorted(objects)}.")
        for name, objects in ours.items():
            for key, value in objects.items():
                try:
                    unwrapped(value).load_state_dict(state[name][key])
                except (RuntimeError, ValueError) as error:
                    raise ValueError(f'{path} holds other {name}["{key}"] than this trainer: {error}') from error
        for key, memory in self.memories():
            memory.queue_idx, memory.has_been_filled = state["queues"][key]
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.data_position = state["epoch"], state["data_position"]
        set_random_state(state["random_state"])
        return self.epoch + 1

    def memories(self) -> list[tuple[str, CrossBatchMemory]]:
        """Return the cross-batch memories among the losses and inside of them."""
        modules = [
            (f"{key}.{name}", module) for key, loss in self.loss_funcs.items() for name, module in loss.named_modules()
        ]
        return [(name, module) for name, module in modules if isinstance(module, CrossBatchMemory)]

    def initialize_dataloader(self) -> None:
        """Build the loader, at the place in the data where the checkpoint was written.

        Without a sampler, each of several processes draws its own part of the data.
        """
        sampler = self.sampler
        if sampler is None and num_processes() > 1:
            sampler = DistributedSampler(self.dataset)
        self.dataloader = ResumableDataLoader(
            c_f.get_train_dataloader(
                self.dataset, self.batch_size, sampler, self.dataloader_num_workers, self.collate_fn
            ),
            self.data_position,
        )
        self.data_position = None
        if len(self.dataloader) == 0:
            name = "dataset" if self.sampler is None else "sampler"
            drawn = self.dataset if sampler is None else sampler
            raise ValueError(f"{name} has {len(drawn)} samples, fewer than batch_size, {self.batch_size}.")
        if not self.iterations_per_epoch:
            self.iterations_per_epoch = max(1, len(self.dataloader) // self.accumulation_steps)
        self.dataloader_iter = iter(self.dataloader)

    def initialize_label_mapper(self) -> None:
        """Map labels as PML does, but for -1, which stays and is no class."""
        mapper = c_f.LabelMapper(self.set_min_label_to_zero, self.dataset_labels)
        if self.dataset_labels is not None:
            for level, ranks in mapper.label_map.items():
                known = [label for label in ranks if label != UNLABELED]
                mapper.label_map[level] = c_f.make_label_to_rank_dict(known) | {UNLABELED: UNLABELED}
        self.label_mapper = mapper.map

    def initialize_loss_tracker(self) -> None:
        """Track losses with weights that are not applied in place."""
        self.loss_tracker = WeightedLossTracker(list(self.loss_names))
        self.losses = self.loss_tracker.losses

    def custom_setup(self) -> None:
        """Check what the teacher needs."""
        check_setup(self)

    def set_schema(self) -> None:
        """Hold every key to the exact name; PML, which checks next, accepts what merely begins like one."""
        super().set_schema()
        for name, checker in self.schema.children.items():
            allowed = checker.keys(checker, self.schema.children) if callable(checker.keys) else checker.keys
            unknown = [key for key in getattr(self, name) or () if key not in allowed]
            if unknown:
                raise ValueError(f"{name} has the unknown keys {unknown}; known are {sorted(allowed)}.")

    def modify_schema(self) -> None:
        """Allow the keys of the distillation."""
        super().modify_schema()
        self.schema["models"].keys += ["projection"]
        self.schema["models"].important = []
        self.schema["loss_funcs"].keys += self.loss_keys_with_teacher
        self.schema["loss_funcs"].important = []
        self.schema["mining_funcs"].keys += ["distillation_miner"]


class WeightedLossTracker(LossTracker):
    """PML's loss tracker without its in-place product, which spoils what a backward has saved."""

    def weight_the_losses(self, exclude_loss: tuple[str, ...] = ("total_loss",)) -> None:
        """Multiply each loss by its weight."""
        for name in self.losses:
            if name not in exclude_loss:
                self.losses[name] = self.losses[name] * self.loss_weights[name]


def split_batch(batch: Any) -> tuple[Any, torch.Tensor | None, torch.Tensor | None]:
    """Return (data, labels, index) of a batch that may be only data, or lack the index.

    Labels of several levels, which a data loader brings as a list of tensors, become columns.
    """
    if isinstance(batch, Views) or not isinstance(batch, (tuple, list)):
        return batch, None, None
    data, labels, index = (*batch, None, None)[:3]
    if isinstance(labels, (tuple, list)):
        labels = torch.stack([torch.as_tensor(level) for level in labels], dim=1)
    return data, labels, index


def on_views(data: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply a function to the data, or to both views."""
    return Views(*map(function, data)) if isinstance(data, Views) else function(data)


def labeled_rows(labels: torch.Tensor | None) -> torch.Tensor | None:
    """Return which rows have a label, or None if all have or there are no labels; multi-hot ones lack all of theirs."""
    if labels is None:
        return None
    missing = labels == UNLABELED
    missing = missing.all(dim=1) if missing.ndim == 2 else missing
    return (~missing).nonzero().flatten() if missing.any() else None


def at(rows: torch.Tensor | None, *parts: Any) -> tuple[Any, ...]:
    """Return these rows of each part, or the same objects if ``rows`` is None; a part that is None stays so."""
    return parts if rows is None else tuple(None if part is None else part[rows] for part in parts)


def needs_labels(loss: Any) -> bool:
    """Whether a loss that is given a teacher is one of PML's own, or holds one."""
    loss = without_wrapper(loss)
    return isinstance(loss, BaseMetricLossFunction) and getattr(loss, "needs_labels", True)


def all_or_none(labels: torch.Tensor | None) -> torch.Tensor | None:
    """Return the labels if all rows have one: a -1 would be taken for a class."""
    return labels if labeled_rows(labels) is None else None


def without_numpy(state: Any) -> Any:
    """Return a state with Python's numbers in place of NumPy's, which ``torch.load(weights_only=True)`` refuses."""
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, dict):
        # A copy keeps what a state dict carries beside its items, and a scheduler's Counter.
        plain = copy.copy(state)
        plain.clear()
        plain.update({without_numpy(key): without_numpy(value) for key, value in state.items()})
        return plain
    return type(state)(map(without_numpy, state)) if type(state) in (list, tuple) else state


def stateful(objects: dict[str, Any] | None) -> list[tuple[str, Any]]:
    """Return the items that have a state to save."""
    return [(key, value) for key, value in (objects or {}).items() if hasattr(value, "state_dict")]
