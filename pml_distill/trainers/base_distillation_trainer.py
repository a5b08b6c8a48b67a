from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from pytorch_metric_learning.trainers.base_trainer import BaseTrainer
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils.distributed import DistributedMinerWrapper
from tqdm import tqdm

from ..datasets import Views
from ..miners import BaseTeacherMiner
from ..teachers.ask import ask
from ..utils.distributed import num_processes
from ..utils.feature_tap import FeatureTap
from ..utils.tensors import in_float32, one_tensor
from .batch import Batch, Embeddings, on_device
from .checkpoint import Checkpoints, followers
from .checks import check_keys, check_labels_seen, check_multi_hot_level, check_setup, needs_labels
from .labels import ClassNumbers, label_mapper
from .loss_weights import WeightedLossTracker, sub_losses
from .resumable_data_loader import train_loader


class BaseDistillationTrainer(Checkpoints, BaseTrainer):
    """PML's trainers with a teacher, mixed precision, gradient accumulation, and checkpoints that resume exactly.

    Everything else is PML's: miners, samplers, schedulers, hooks, ``HookContainer``, ``freeze_these``. Keys must match
    exactly. The end-of-epoch hook finds the mean of each loss in ``trainer.epoch_losses``.

    A batch is read by the rule of ``pml_distill.datasets.items``. Labels may be text: classes are numbered in the
    alphabetical order of ``dataset_labels`` or the dataset's own labels, or as they come. Of ``Views`` each network
    sees its own. Rows with the label -1 have none: losses with a teacher see them, with ``labels=None`` and the pairs
    of a teacher's miner that needs no labels; other losses and miners do not.

    Args:
        *args: those of PML's trainer: models, optimizers, batch_size, loss_funcs, dataset.
        teacher: a frozen callable from data to embeddings: ``FrozenTeacher``, ``CachedTeacher``, a network in eval
            mode, a function. With ``needs_index = True`` it is called as ``teacher(data, index)``. With
            ``follows_student = True``, as ``EMATeacher``, its ``update()`` is called after each optimizer step.
        amp_dtype: ``torch.float16`` (with a gradient scaler) or ``torch.bfloat16`` runs the student's networks
            under autocast; losses are computed in float32.
        accumulation_steps: how many batches make one optimizer step; their gradients are summed.
        student_features: modules of ``models["trunk"]`` for ``feature_distillation_loss``, see ``FeatureTap``.
        teacher_features: as many modules of the trunk of a ``FrozenTeacher``, or features in a ``CachedTeacher``.
        loss_weight_ramps: by loss, a function such as ``LossWeightRamp`` from the progress of the training, 0 to 1, to
            a factor for its weight.
        total_steps: of the training, for the ramps; None: ``num_epochs`` of ``train`` times the steps of an epoch.
        loader_settings: further arguments of ``torch.utils.data.DataLoader``, such as ``persistent_workers``.
        **kwargs: PML's further arguments.

    Keys:
        ``mining_funcs["tuple_miner"]``: its pairs go to ``metric_loss`` and ``distillation_loss``; one of
        ``pml_distill.miners`` sees the teacher's embeddings too. ``["distillation_miner"]``: one of those for
        ``distillation_loss`` alone. ``models["projection"]``: maps the student's embeddings to the teacher's width for
        ``distillation_loss`` alone; trained and saved, but no part of the student.
        ``loss_funcs["feature_distillation_loss"]``: a loss of two lists of feature maps;
        ``optimizers["feature_distillation_loss_optimizer"]`` trains its parameters.

    Raises:
        ValueError: the parts do not go together; a network or the teacher returns no single tensor; no batch of the
            first epoch has a label for a loss that needs some.
    """

    loss_keys_with_teacher: tuple[str, ...] = ("distillation_loss", "feature_distillation_loss")
    # Set by PML, or None until they are needed.
    loss_weights: Any
    teacher: Any
    dataloader: Any
    dataloader_iter: Any
    iterations_per_epoch: Any

    def __init__(
        self,
        *args: Any,
        teacher: Callable[..., torch.Tensor] | None = None,
        amp_dtype: torch.dtype | None = None,
        accumulation_steps: int = 1,
        student_features: Sequence[str] = (),
        teacher_features: Sequence[str] = (),
        loss_weight_ramps: Mapping[str, Callable[[float], float]] | None = None,
        total_steps: int | None = None,
        loader_settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        # PML's constructor ends in the checks, which read these.
        self.teacher, self.amp_dtype, self.accumulation_steps = teacher, amp_dtype, accumulation_steps
        self.student_features, self.teacher_features = student_features, teacher_features
        self.loss_weight_ramps, self.total_steps = loss_weight_ramps or {}, total_steps
        self.loader_settings = loader_settings or {}
        self.epoch, self.data_position, self.dataloader, self.labels_seen = 0, None, None, False
        self.outputs: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)
        self.full_weights = dict(self.loss_weights)
        if self.loss_weight_ramps:
            self.loss_weights = dict(self.loss_weights)  # a ramp does not change the caller's
        self.scaler = torch.amp.GradScaler(torch.device(self.data_device).type, enabled=amp_dtype == torch.float16)

    def train(self, start_epoch: int = 1, num_epochs: int = 1) -> None:
        """Train from epoch ``start_epoch`` to epoch ``num_epochs``, which is the last one and not a count."""
        self.initialize_dataloader()
        self.total_steps = max(self.total_steps or 0, num_epochs * self.iterations_per_epoch)
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
                        self.epoch_losses[name] = self.epoch_losses.get(name, 0) + loss / self.iterations_per_epoch
                    if bar.update():  # PML waits for the device at each iteration
                        bar.set_postfix(total_loss=float(self.losses["total_loss"]), refresh=False)
                    self.step_lr_schedulers(end_of_epoch=False)
                self.step_lr_schedulers(end_of_epoch=True)
                self.zero_losses()
                if self.epoch == start_epoch:
                    check_labels_seen(self)
                if self.end_of_epoch_hook(self) is False:
                    break

    def forward_and_backward(self) -> None:
        """Make one step."""
        self.training_step(*(self.get_batch() for _ in range(self.accumulation_steps)))

    def training_step(self, *batches: Any) -> dict[str, torch.Tensor]:
        """Update the student once, from one batch or from several whose gradients are summed.

        In a loop of your own, switch the modules to train mode yourself; ``set_min_label_to_zero`` and
        ``label_hierarchy_level`` have no effect. Returned are the weighted losses by name and their ``total_loss``,
        detached, summed over the batches; of ``MultipleDistillationLosses`` each part too, without its weight.
        """
        self.zero_grad()
        self.update_loss_weights()
        sums: dict[str, Any] = dict.fromkeys(self.losses, 0)
        for batch in batches:
            self.zero_losses()
            self.calculate_loss(Batch.of(batch, self.class_numbers))
            self.loss_tracker.update(self.loss_weights)
            self.backward()
            self.outputs = []
            for name, loss in (self.losses | sub_losses(self)).items():
                sums[name] = sums.get(name, 0) + torch.as_tensor(loss).detach()
        self.clip_gradients()
        self.step_optimizers()
        for follower in followers(self.teacher):
            follower.update()
        self.losses.update(sums)
        return sums

    def get_batch(self) -> Batch:
        """Return the next (data, labels, index); labels and index may be None."""
        self.dataloader_iter, loaded = c_f.try_next_on_generator(self.dataloader_iter, self.dataloader)
        batch = Batch.of(self.data_and_label_getter(loaded), self.class_numbers)
        if batch.labels is not None:
            check_multi_hot_level(batch.labels, self.label_hierarchy_level, self.loss_funcs.get("metric_loss"))
            labels = c_f.process_label(batch.labels, self.label_hierarchy_level, self.label_mapper)
            batch = batch._replace(labels=labels)
        if "subset_batch_miner" in self.mining_funcs:
            batch = batch.at(self.mine_subset(batch.data, batch.labels))
        return batch

    def calculate_loss(self, curr_batch: Batch) -> Batch:
        """Compute the losses but a classifier's; return the batch with ``Embeddings`` as its data."""
        with ExitStack() as stack:
            taps: list[FeatureTap] = []
            if self.wants("feature_distillation_loss"):
                taps.append(stack.enter_context(FeatureTap(self.models["trunk"], self.student_features)))
                taps.append(stack.enter_context(self.teacher.tap(self.teacher_features)))
            batch = self.embed(curr_batch)
        known, pairs = batch.labeled(), None
        if rows(known):
            pairs = self.maybe_mine_embeddings(known.data.student, known.labels, known.data.teacher)
            if self.wants("metric_loss"):
                self.losses["metric_loss"] = self.maybe_get_metric_loss(known.data.student, known.labels, pairs)
        if self.wants("distillation_loss"):
            loss, seen = self.loss_funcs["distillation_loss"], batch
            if known is not batch:
                # A -1 would be taken for a class, and pairs of labelled rows would keep the other rows from the loss.
                seen = known if needs_labels(loss) else batch._replace(labels=None)
            if rows(seen):
                if seen is not known or "distillation_miner" in self.mining_funcs:
                    pairs = self.mine_for_distillation(seen)
                _, projected, teacher = seen.data
                self.losses["distillation_loss"] = loss(projected, seen.labels, pairs, ref_emb=teacher)
        if taps:
            loss, maps = self.loss_funcs["feature_distillation_loss"], [tap.features for tap in taps]
            self.losses["feature_distillation_loss"] = loss(*maps, batch.all_or_none())
        self.labels_seen = self.labels_seen or known.labels is None or rows(known) > 0
        return batch

    def embed(self, batch: Batch) -> Batch:
        """Show a batch to the student and, if anything asks for it, to the teacher."""
        student_data, teacher_data = Views.of(on_device(batch.data, self.data_device))
        with self.autocast():
            projected = output = one_tensor(self.compute_embeddings(student_data), 'models["trunk"] and ["embedder"]')
            if "projection" in self.models:
                projected = one_tensor(self.models["projection"](output), 'models["projection"]')
        student, projected = in_float32(output), in_float32(projected)
        self.outputs += [student, projected]
        teacher = None
        if any(map(self.wants, self.loss_keys_with_teacher)) or self.teacher_miner("tuple_miner"):
            # PML's losses, for asymmetric learning, compare what has one precision and is on one device.
            teacher = ask(self.teacher, teacher_data, batch.index).to(student)
        return batch._replace(data=Embeddings(student, projected, teacher))

    def get_trunk_output(self, data: Any) -> torch.Tensor:
        """Run the trunk; data other than a tensor, such as a dictionary, are its one argument too."""
        return super().get_trunk_output(data) if isinstance(data, torch.Tensor) else self.models["trunk"](data)

    def wants(self, loss_name: str) -> bool:
        """Whether this loss is there and has a weight."""
        return loss_name in self.loss_funcs and self.loss_weights[loss_name] > 0

    def autocast(self) -> torch.autocast:
        """The precision of the student's networks."""
        device = torch.device(self.data_device).type
        return torch.autocast(device, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def update_loss_weights(self) -> None:
        """Set the weights that have a ramp for this step."""
        for key, ramp in self.loss_weight_ramps.items():
            if not self.total_steps or not self.epoch:
                raise ValueError("loss_weight_ramps are for train; in a loop of your own, set trainer.loss_weights.")
            self.loss_weights[key] = self.full_weights[key] * ramp(self.get_global_iteration() / self.total_steps)

    def teacher_miner(self, key: str) -> BaseTeacherMiner | None:
        """Return the miner of this key if it asks the teacher."""
        miner = self.mining_funcs.get(key)
        miner = miner.miner if isinstance(miner, DistributedMinerWrapper) else miner
        return miner if isinstance(miner, BaseTeacherMiner) else None

    def maybe_mine_embeddings(
        self, embeddings: torch.Tensor, labels: torch.Tensor | None, teacher_embeddings: torch.Tensor | None = None
    ) -> tuple | None:
        """Run ``tuple_miner``, if there is one; a miner of this package gets the teacher's embeddings."""
        if self.teacher_miner("tuple_miner") is not None:
            return self.mining_funcs["tuple_miner"](embeddings, labels, ref_emb=teacher_embeddings)
        if "tuple_miner" in self.mining_funcs and labels is None:
            raise ValueError('mining_funcs["tuple_miner"] needs labels, but the dataset yields none.')
        return super().maybe_mine_embeddings(embeddings, labels)

    def mine_for_distillation(self, batch: Batch) -> tuple | None:
        """Run ``distillation_miner``, or else ``tuple_miner``, on all rows if it can do without what is missing."""
        key = "distillation_miner" if "distillation_miner" in self.mining_funcs else "tuple_miner"
        miner = self.teacher_miner(key)
        if miner is None or (miner.needs_labels and batch.labels is None):
            return None
        return self.mining_funcs[key](batch.data.student, batch.labels, ref_emb=batch.data.teacher)

    @torch.no_grad()
    def mine_subset(self, data: Any, labels: torch.Tensor | None) -> torch.Tensor:
        """Return the rows that ``subset_batch_miner`` keeps, judged in eval mode, and the unlabelled ones."""
        self.set_to_eval()
        try:
            embeddings = self.compute_embeddings(on_device(Views.of(data).student, self.data_device))
        finally:
            self.set_to_train()
        batch, miner = Batch(embeddings, labels), self.mining_funcs["subset_batch_miner"]
        known, labeled = batch.labeled(), batch.labeled_rows()
        if labeled is None:
            return torch.as_tensor(miner(embeddings, labels))
        labeled, kept = labeled.cpu(), torch.ones(len(embeddings), dtype=torch.bool)
        if len(labeled):
            kept[labeled] = False
            kept[labeled[torch.as_tensor(miner(known.data, known.labels)).cpu()]] = True
        return kept.nonzero().flatten()

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
        used = [o for name, o in self.optimizers.items() if name.removesuffix("_optimizer") not in self.freeze_these]
        return [o for o in used if any(p.grad is not None for group in o.param_groups for p in group["params"])]

    def initialize_dataloader(self) -> None:
        """Build the loader, at the place in the data where the checkpoint was written."""
        self.dataloader, self.data_position = train_loader(self), None
        if not self.iterations_per_epoch:
            self.iterations_per_epoch = max(1, len(self.dataloader) // self.accumulation_steps)
        self.dataloader_iter = iter(self.dataloader)

    def initialize_label_mapper(self) -> None:
        """Map labels as PML does, but for -1, which stays and is no class."""
        self.class_numbers = ClassNumbers(self.dataset_labels, self.dataset)
        self.label_mapper = label_mapper(self.set_min_label_to_zero, self.dataset_labels)

    def initialize_loss_tracker(self) -> None:
        """Track losses with weights that are not applied in place."""
        self.loss_tracker = WeightedLossTracker(list(self.loss_names))
        self.losses = self.loss_tracker.losses

    def custom_setup(self) -> None:
        """Check what does not go together."""
        check_setup(self)

    def set_schema(self) -> None:
        """Hold every key to the exact name; PML, which checks next, accepts what merely begins like one."""
        super().set_schema()
        check_keys(self)

    def modify_schema(self) -> None:
        """Allow the keys of the distillation."""
        super().modify_schema()
        self.schema["models"].keys += ["projection"]
        self.schema["models"].important = []
        self.schema["loss_funcs"].keys += self.loss_keys_with_teacher
        self.schema["loss_funcs"].important = []
        self.schema["mining_funcs"].keys += ["distillation_miner"]


def rows(batch: Batch) -> int:
    """Return how many rows a batch of embeddings has."""
    return len(batch.data.student)
