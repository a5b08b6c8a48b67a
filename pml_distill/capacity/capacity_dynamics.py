import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

import torch
from pytorch_metric_learning.utils import common_functions as c_f
from torch import nn
from tqdm import tqdm

from ..teachers import FrozenTeacher
from ..trainers.base_distillation_trainer import unwrapped
from ..utils.eval_mode import eval_mode
from ..utils.report import format_table
from .compactor import compacted_chains, find_chains, find_compactors
from .export import export
from .export_meter import ExportedCost, ExportMeter
from .gradient_reset import GradientReset
from .group_lasso import add_lasso_gradient, shrink_rows
from .pass_tap import PassTap

# Settings of DistributedDataParallel that are arguments and attributes of one name.
WRAPPER_SETTINGS = (
    "device_ids",
    "output_device",
    "dim",
    "process_group",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
    "mixed_precision",
)


class CapacityDynamics:
    r"""Shrinks a student while it learns: group lasso on its compactors, and gradient resetting led by retrieval.

    Between backward and step, from the epoch after ``reset_epoch`` on, the rows of each compactor that
    ``GradientReset`` marks lose the gradient of all other losses; what is left to them is the lasso, which shortens
    every row by learning rate times ``lasso_weight`` per step. A row that reaches zero is a channel that ``export``
    drops. Without a teacher it is plain group lasso.

    The lasso comes in two forms. ``proximal=True``, the default: after the step of the optimizer each row is shortened
    by lr * lasso_weight, and one not longer than that becomes exactly zero. ``proximal=False``, the authors' form:
    lasso_weight * w / ||w|| is added to the gradient. Such rows never reach zero: they swing around it by about
    lr * lasso_weight / (1 - momentum), so that ``threshold`` finds them only once the learning rate has come down,
    and Adam divides the pull away.

    How far a row can shrink is the sum of lr * lasso_weight over all steps; rows begin at length 1. The paper's
    0.004 sums to 1.6 over its 40,000 steps at lr 0.01; a shorter training wants a larger weight, or a budget. Weight
    decay shortens all rows alike: give the compactors a parameter group with ``weight_decay=0``. Keep their parameters
    in float32, under autocast if you like: in bfloat16 a row of length 1 does not feel a step below 0.002.

    With a budget (``target_params`` or ``target_flops``) the lasso weight adapts: of the rows that have to go, the
    longest is led to zero along a straight line over ``budget_steps``. There the shortest rows that are still too
    many go, and those that are zero stay zero while the others learn on.

    In a PML trainer it is a gradient clipper, and counts the epochs in the end-of-epoch hook::

        insert_compactors(trunk)
        optimizer = torch.optim.SGD(trunk.parameters(), lr=0.01, momentum=0.9)
        dynamics = CapacityDynamics(trunk, teacher, optimizer, image_shape=(3, 224, 224))
        DistillationTrainer(..., gradient_clippers={"trunk_grad_clipper": dynamics},
                            end_of_epoch_hook=dynamics.end_of_epoch_hook(hooks.end_of_epoch_hook(...)))

    In a loop of your own: ``loss.backward(); dynamics(); optimizer.step()``, and ``dynamics.end_epoch()``. With a
    ``GradScaler``, ``scaler.unscale_(optimizer)`` comes before ``dynamics()``.

    Under ``DistributedDataParallel`` the features of all processes are gathered, so that all mark the same rows.

    Source: Xie et al., "Towards a Smaller Student: Capacity Dynamic Distillation for Efficient Image Retrieval",
    CVPR 2023; the defaults are its settings. In the authors' code the teacher's batch-norm statistics drift, and a
    zero row has gradient NaN.

    Args:
        student: a network with compactors, see ``insert_compactors``; may be inside of DistributedDataParallel.
            ``torch.compile`` comes afterwards.
        teacher: a network of the same family without compactors, or a ``FrozenTeacher`` with it as trunk; None for
            no resetting. It is put into eval mode. Where nothing else runs it on the batch, in eval mode, it is run on
            the student's input.
        optimizer: the one that trains the compactors.
        image_shape: (C, H, W), for the FLOPs.
        lasso_weight: how strong the lasso is, the first weight with a budget.
        threshold: rows shorter than this count as gone.
        reset_epoch: resetting begins after this epoch.
        ratio: share of channels that may be marked, see ``GradientReset``; likewise the next six.
        neighbors: of the teacher.
        queue_size: of the teacher's features, for each compactor.
        queue_dtype: their precision, such as ``torch.float16`` for half the memory; None for that of the compactors.
        metric: of the teacher's features.
        accumulate: whether marks stay.
        refresh_interval: after how many steps they are taken back.
        proximal: which form the lasso has.
        target_params: share of the parameters of the network without compactors that shall remain, from 0 to 1.
        target_flops: share of its FLOPs that shall remain. At most one of both.
        budget_steps: after how many steps the target is met; needed with a target.

    Attributes:
        history: one entry per epoch: epoch, lasso weight, parameters, flops, and of each block by name its parameters,
            flops and the widths behind its compactors; all as if the network were exported then.

    Raises:
        ValueError: the student is compiled or in ``DataParallel``, has no compactors, or one that the optimizer does
            not train; the teacher is no network, is the student, or has other blocks or widths than the student; a
            number out of range; a target out of reach, without ``budget_steps`` or with ``proximal=False``; in a step:
            a compactor with values that are not finite, a block that runs more than once in a pass.
        RuntimeError: the optimizer steps in a resetting epoch, and nothing has called the dynamics before.
    """

    teacher: Any
    target: Any
    budget_steps: Any
    resets: Any

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        image_shape: tuple[int, ...],
        lasso_weight: float = 0.004,
        threshold: float = 1e-5,
        reset_epoch: int = 20,
        ratio: float = 0.5,
        neighbors: int = 2,
        queue_size: int = 24000,
        queue_dtype: torch.dtype | None = None,
        metric: str = "cosine",
        accumulate: bool = True,
        refresh_interval: int | None = None,
        proximal: bool = True,
        target_params: float | None = None,
        target_flops: float | None = None,
        budget_steps: int | None = None,
    ):
        check_networks(student, teacher)
        for name, value, good, expected in (
            ("lasso_weight", lasso_weight, 0 <= lasso_weight < math.inf, "finite and at least 0"),
            ("threshold", threshold, 0 < threshold < 1, "above 0 and below 1, the length at which rows begin"),
            ("reset_epoch", reset_epoch, reset_epoch >= 0, "at least 0"),
        ):
            if not good:
                raise ValueError(f"{name} must be {expected}, but is {value}.")
        self.student = unwrapped(student)
        self.compactors = find_compactors(self.student)
        self.meter = ExportMeter(self.student, image_shape)
        self.weights = [compactor.weight for compactor in self.compactors.values()]
        self.threshold, self.reset_epoch, self.proximal = threshold, reset_epoch, proximal
        self.lasso_weight, self.epoch, self.steps, self.met = lasso_weight, 1, 0, False
        self.history: list[dict[str, Any]] = []
        self.check_optimizer(optimizer)
        self.set_budget(target_params, target_flops, budget_steps)
        self.resets = nn.ModuleList(
            GradientReset(len(w), queue_size, neighbors, ratio, metric, accumulate, refresh_interval).to(
                w.device, queue_dtype or w.dtype
            )
            for w in (self.weights if teacher is not None else ())
        )
        self.taps: dict[str, PassTap] = {}
        self.teacher = unwrapped(teacher)
        if teacher is not None:
            self.tap()
        self.handles = [handle for tap in self.taps.values() for handle in tap.handles]
        self.handles.append(optimizer.register_step_post_hook(self.after_step))

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ``ValueError`` for a compactor that would never be trained."""
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, c in self.compactors.items() if id(c.weight) not in trained]
        if missing:
            raise ValueError(
                f"optimizer does not train the compactors behind {missing}; make it after insert_compactors, of "
                "student.parameters()."
            )

    def set_budget(self, params: float | None, flops: float | None, steps: int | None) -> None:
        """Check and keep the target."""
        if params is not None and flops is not None:
            raise ValueError(f"give target_params ({params}) or target_flops ({flops}), not both.")
        self.measured = "flops" if params is None else "parameters"
        share = flops if params is None else params
        self.target, self.budget_steps, self.first_longest = None, steps, 0.0
        if share is None:
            return
        name = "target_flops" if params is None else "target_params"
        if not 0 < share < 1:
            raise ValueError(f"{name} is the share that shall remain and must lie between 0 and 1, but is {share}.")
        if steps is None or steps < 1:
            raise ValueError(f"{name} needs budget_steps, the steps after which it is met, but that is {steps}.")
        if not self.proximal:
            raise ValueError(f"{name} needs proximal=True; with the lasso as a gradient no row reaches zero.")
        if not self.lasso_weight:
            raise ValueError(f"{name} multiplies lasso_weight step by step, so that it must be above 0, but is 0.")
        whole, least = self.size(0.0), self.size(math.inf)
        self.target = share * whole
        if self.target < least:
            raise ValueError(
                f"{name} is {share}, but one channel behind each compactor leaves {least / whole:.3f} of the network."
            )

    def tap(self) -> None:
        """Collect the pooled features of both networks while the student trains, and the student's input."""
        teacher = self.teacher.trunk if isinstance(self.teacher, FrozenTeacher) else self.teacher
        check_correspondence(self.student, teacher)
        self.teacher.eval()
        taught = {name: teacher.get_submodule(name) for name in self.compactors}
        self.taps = {
            # A pass without gradients, as when batch norms are brought up to date, is no part of a step.
            "student": PassTap(
                self.student,
                dict(self.compactors),
                lambda: self.resetting and self.student.training and torch.is_grad_enabled(),
            ),
            "teacher": PassTap(self.teacher, taught, lambda: self.resetting and not teacher.training),
        }

    @property
    def resetting(self) -> bool:
        """Whether gradients are reset in this epoch."""
        return self.teacher is not None and self.epoch > self.reset_epoch

    def __call__(self) -> None:
        """Change the gradients between backward and step."""
        if self.resetting and self.taps["student"].passes:
            self.reset_gradients()
        if not self.proximal:
            for weight in self.weights:
                add_lasso_gradient(weight, self.lasso_weight)

    @torch.no_grad()
    def reset_gradients(self) -> None:
        """Let the batches of this step enter the queues and zero the gradients of the marked rows."""
        student, teacher = (tap.take() for tap in self.taps.values())
        if [id(p.images) for p in student] != [id(p.images) for p in teacher]:
            with eval_mode(self.teacher):
                for done in student:
                    self.teacher(done.images)
            teacher = self.taps["teacher"].take()
        features = [torch.cat([p.features[n] for p in side]) for n in self.compactors for side in (student, teacher)]
        # All side by side, so that processes talk once.
        parts = gathered(torch.cat(features, dim=1)).split([part.shape[1] for part in features], dim=1)
        for weight, reset, own, other in zip(self.weights, self.resets, parts[::2], parts[1::2]):
            mask = reset.update(own, other)
            if weight.grad is not None:
                weight.grad.mul_(mask.to(weight.grad.dtype).view(-1, 1, 1, 1))

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Shorten the rows; a hook of the optimizer, so that a step that a grad scaler skips shortens nothing."""
        # A fused optimizer is called even then, and skips the step by itself.
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None and bool(skipped):
            for tap in self.taps.values():
                tap.take()
            return
        if self.resetting and self.taps["student"].passes:
            raise RuntimeError(
                "the optimizer has stepped, but gradients were not reset: call dynamics() between backward and step, "
                "or give it to the trainer as one of gradient_clippers."
            )
        self.steps += 1
        if not self.proximal:
            return
        if self.met:
            for weight, alive in zip(self.weights, self.alive):
                weight.mul_(alive)
            return
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        before = [weight.clone() for weight in self.weights] if self.target is not None else []
        for weight in self.weights:
            shrink_rows(weight, rates[id(weight)] * self.lasso_weight)
        if self.target is not None:
            self.keep_to_budget(before)

    def keep_to_budget(self, before: list[torch.Tensor]) -> None:
        """Make the lasso stronger or weaker, or settle what stays once the target is met or the time is over."""
        size, over = getattr(self.measure(), self.measured), self.steps >= self.budget_steps
        if size <= self.target or over:
            if size < self.target:
                # Rows vanish together; one by one they come nearer to the target.
                for weight, previous in zip(self.weights, before):
                    weight.copy_(previous)
            self.settle()
        elif self.steps % max(1, self.budget_steps // 100) == 0:
            going, norms = self.rows_to_go()
            longest = float(norms[going].max())
            self.first_longest = self.first_longest or longest
            planned = self.first_longest * (1 - self.steps / self.budget_steps)
            self.lasso_weight *= 1.25 if longest > planned else 1 / 1.25

    def rows_to_go(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which rows of all compactors have to go, shortest first, until the target is met, and all lengths."""
        norms = torch.cat([compactor.row_norms() for compactor in self.compactors.values()])
        order, counts = norms.argsort(stable=True), [len(weight) for weight in self.weights]
        owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[order.cpu()]

        def meets(number: int) -> bool:
            widths = torch.bincount(owners[number:], minlength=len(counts)).clamp(min=1).tolist()
            return getattr(self.meter.cost(dict(zip(self.compactors, widths))), self.measured) <= self.target

        number = bisect_left(range(len(order)), True, key=meets)
        return torch.zeros_like(norms, dtype=torch.bool).index_fill_(0, order[:number], True), norms

    def settle(self) -> None:
        """Zero the shortest rows that are too many; those at zero stay there from now on."""
        going, norms = self.rows_to_go()
        counts = [len(weight) for weight in self.weights]
        gone_rows, all_lengths = going.split(counts), norms.split(counts)
        self.fill_up(gone_rows, all_lengths)
        self.alive = []
        for weight, gone, lengths in zip(self.weights, gone_rows, all_lengths):
            alive = ~gone & (lengths >= self.threshold)
            alive[lengths.argmax()] = True
            self.alive.append(alive.to(weight.dtype).view(-1, 1, 1, 1))
            weight.mul_(self.alive[-1])
        self.met = True

    def fill_up(self, gone_rows: Sequence[torch.Tensor], all_lengths: Sequence[torch.Tensor]) -> None:
        """Let the longest row that goes from each compactor stay where the target allows it.

        The last of all rows to go may cost more than what was missing.
        """
        for gone, lengths in zip(gone_rows, all_lengths):
            gone[lengths.argmax()] = False  # stays in any case
        widths = {name: int((~gone).sum()) for name, gone in zip(self.compactors, gone_rows)}
        longest = [torch.where(gone, lengths, 0).max(dim=0) for gone, lengths in zip(gone_rows, all_lengths)]
        candidates = zip(self.compactors, gone_rows, longest)
        for name, gone, (length, row) in sorted(candidates, key=lambda c: float(c[2].values), reverse=True):
            wider = widths | {name: widths[name] + 1}
            if length >= self.threshold and getattr(self.meter.cost(wider), self.measured) <= self.target:
                gone[row], widths = False, wider

    def size(self, threshold: float) -> int:
        """Return the parameters or FLOPs, whichever has a target, without the rows under a threshold."""
        return getattr(self.meter.measure(threshold), self.measured)

    def measure(self) -> ExportedCost:
        """Return what the network would cost if it were exported now."""
        lengths = [compactor.row_norms().detach() for compactor in self.compactors.values()]
        # All at once: each reading waits for the device.
        widths, finite = torch.stack(
            [torch.stack([(rows >= self.threshold).sum(), rows.isfinite().all()]) for rows in lengths], dim=1
        ).tolist()
        broken = [name for name, whole in zip(self.compactors, finite) if not whole]
        if broken:
            raise ValueError(f"the compactors behind {broken} have values that are not finite.")
        return self.meter.cost({name: max(1, width) for name, width in zip(self.compactors, widths)})

    def end_epoch(self) -> None:
        """Enter the sizes into the history and go on to the next epoch."""
        # As plain values, for a checkpoint to hold.
        cost = asdict(self.measure())
        self.history.append({"epoch": self.epoch, "lasso_weight": self.lasso_weight, **cost})
        self.epoch += 1

    def end_of_epoch_hook(
        self, then: Callable[[Any], Any] | None = None, export_after: int | None = None
    ) -> Callable[[Any], Any]:
        """Return the hook for a PML trainer, which writes a line of the history, and the blocks into PML's log.

        Args:
            then: another hook to run after it, such as a HookContainer's.
            export_after: after this epoch ``replace_student`` is called, whose errors come after the first epoch; None
                for never.
        """
        begun = False

        def hook(trainer: Any) -> Any:
            nonlocal begun
            if self.handles:
                if export_after is not None:
                    self.key_in(trainer)
                self.end_epoch()
                write(self.table().splitlines()[-1] if begun else self.table())
                begun = True
                c_f.LOGGER.info("Blocks after epoch %d:\n%s", self.epoch - 1, self.block_table())
                if self.epoch - 1 == export_after:
                    self.replace_student(trainer)
            return None if then is None else then(trainer)

        return hook

    def replace_student(self, trainer: Any) -> nn.Module:
        """Put the exported network in the student's place in a trainer, where the training goes on with it.

        Parameter groups get the new parameters where the old ones of the same name were, without their momentum, and
        the bias of a merged convolution where that of its normalisation was; learning rates and schedulers stay. A
        DistributedDataParallel wrapper is made anew with the same settings, but for communication hooks and the size
        of its buckets. The hooks are removed. A checkpoint taken from now on holds the small network.

        Returns:
            The exported network, in training mode.

        Raises:
            ValueError: the trainer has no model that is this student, or its ``student_features`` are outputs of
                modules that are merged.
        """
        key = self.key_in(trainer)
        wrapper, small = trainer.models[key], self.export().train()
        old, new = dict(self.student.named_parameters()), dict(small.named_parameters())
        gone, origins = {id(p) for p in old.values()}, self.origins(new)
        for optimizer in trainer.optimizers.values():
            for group in optimizer.param_groups:
                own = {id(p) for p in group["params"]}
                kept = [p for p in group["params"] if id(p) not in gone]
                group["params"] = kept + [p for name, p in new.items() if id(old[origins[name]]) in own]
            for parameter in old.values():
                optimizer.state.pop(parameter, None)
        before, after = (sum(p.numel() for p in parameters.values()) for parameters in (old, new))
        message = f"The student is exported: {before:,} parameters have become {after:,}. Its optimizer is renewed."
        trainer.models[key] = small
        if isinstance(wrapper, nn.parallel.DistributedDataParallel):
            trainer.models[key] = rewrapped(wrapper, small)
            message += " So is its DistributedDataParallel, without communication hooks."
        write(message)
        trainer.gradient_clippers = {k: c for k, c in trainer.gradient_clippers.items() if c is not self}
        self.close()
        return small

    def key_in(self, trainer: Any) -> str:
        """Return the student's key in ``trainer.models``, or raise ``ValueError`` for what forbids to replace it."""
        keys = [key for key, model in trainer.models.items() if unwrapped(model) is self.student]
        if not keys:
            raise ValueError(f"trainer.models has {sorted(trainer.models)}, none of which is this student.")
        merged = [chain.name_of(part) for chain in compacted_chains(self.student) for part in chain.path[:2]]
        tapped = [
            name
            for name in getattr(trainer, "student_features", ())
            if keys[0] == "trunk" and any(f"{name}.".startswith(f"{place}.") for place in merged)
        ]
        if tapped:
            raise ValueError(
                f"student_features names {tapped}, which the export merges into other modules; name the outputs of "
                "blocks, or train to the end without export_after and call export() then."
            )
        return keys[0]

    def origins(self, names: Iterable[str]) -> dict[str, str]:
        """Return the student's parameter in whose group each parameter of the exported network belongs."""
        old, found = dict(self.student.named_parameters()), {name: name for name in names}
        for chain in compacted_chains(self.student):
            conv, norm = chain.name_of(chain.path[0]), f"{chain.name}.0.bias"
            if f"{conv}.bias" not in old:
                found[f"{conv}.bias"] = norm if norm in old else f"{conv}.weight"
        return found

    def table(self) -> str:
        """Return the history as a Markdown table; ``ValueError`` before the first epoch has ended, as the next two."""
        return format_table(
            [
                {
                    "epoch": str(row["epoch"]),
                    "parameters": f"{row['parameters']:,}",
                    "MFLOPs": f"{row['flops'] / 1e6:.1f}",
                    "channels": f"{sum(widths_in(row).values())} of {sum(len(w) for w in self.weights)}",
                    "lasso weight": f"{row['lasso_weight']:.3g}",
                }
                for row in self.ended()
            ]
        )

    def ended(self) -> list[dict[str, Any]]:
        """Return the history, or raise ``ValueError`` if no epoch has ended."""
        if not self.history:
            raise ValueError("history is empty: no epoch has ended yet, see end_epoch and end_of_epoch_hook.")
        return self.history

    def block_table(self) -> str:
        """Return the blocks at the end of the last epoch as a Markdown table."""
        whole = self.meter.measure(0.0).blocks
        return format_table(
            [
                {
                    "block": name,
                    "channels": ", ".join(f"{own} of {all_}" for own, all_ in zip(widths, whole[name].widths.values())),
                    "parameters": f"{block['parameters']:,}",
                    "MFLOPs": f"{block['flops'] / 1e6:.2f}",
                }
                for name, block in self.ended()[-1]["blocks"].items()
                for widths in [block["widths"].values()]
            ]
        )

    def plot(self, path: str | os.PathLike) -> None:
        """Draw the width of each compactor, and the size of the network, over the epochs."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.5), layout="constrained")
        sizes, widths = figure.subplots(1, 2)
        epochs = [row["epoch"] for row in self.ended()]
        for key in ("parameters", "flops"):
            first = getattr(self.meter.measure(0.0), key)
            sizes.plot(epochs, [100 * row[key] / first for row in self.history], label=key)
        sizes.set(xlabel="epoch", ylabel="% of the whole network", ylim=(0, 105))
        sizes.legend(frameon=False)
        names = list(self.compactors)
        history = [widths_in(row) for row in self.history]
        shares = [[row[n] / len(w) for row in history] for n, w in zip(names, self.weights)]
        picture = widths.imshow(shares, aspect="auto", vmin=0, vmax=1, extent=(0.5, len(epochs) + 0.5, len(names), 0))
        widths.set(xlabel="epoch", yticks=[i + 0.5 for i in range(len(names))], yticklabels=names)
        figure.colorbar(picture, ax=widths, label="share of channels left")
        figure.savefig(path, dpi=130)

    def export(self, fold_norms: bool = False) -> nn.Module:
        """Return the small plain network, see ``export``; the student stays as it is."""
        with eval_mode(self.student):
            return export(self.student, self.threshold, fold_norms)

    def close(self) -> None:
        """Remove all hooks from both networks and the optimizer."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def state_dict(self) -> dict[str, Any]:
        """Return queues, marks and progress; the compactors themselves are in the student's state."""
        return {
            "resets": self.resets.state_dict(),
            "lasso_weight": self.lasso_weight,
            "epoch": self.epoch,
            "steps": self.steps,
            "alive": self.alive if self.met else None,
            "first_longest": self.first_longest,
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, or raise ``ValueError`` if it was under other settings."""
        try:
            self.resets.load_state_dict(state["resets"])
        except RuntimeError as error:
            raise ValueError(
                "the state was taken with another queue_size, with other compactors, or with a teacher where there is "
                f"none now, or the other way round: {error}"
            ) from error
        self.lasso_weight, self.epoch, self.steps = state["lasso_weight"], state["epoch"], state["steps"]
        self.met, self.history = state["alive"] is not None, list(state["history"])
        self.first_longest = state["first_longest"]
        if self.met:
            self.alive = [alive.to(weight) for alive, weight in zip(state["alive"], self.weights)]


def widths_in(row: dict[str, Any]) -> dict[str, int]:
    """Return the width behind each compactor in an entry of the history."""
    return {name: width for block in row["blocks"].values() for name, width in block["widths"].items()}


def check_networks(student: Any, teacher: Any) -> None:
    """Raise ``ValueError`` for what hides the passes of the student, or is no network."""
    if isinstance(student, nn.DataParallel) or hasattr(student, "_orig_mod"):
        raise ValueError(
            f"student must be the network itself, or in DistributedDataParallel, but is of type "
            f"{type(student).__name__}, behind which its passes cannot be seen."
        )
    if not isinstance(teacher, nn.Module | None):
        raise ValueError(f"teacher must be a network, a FrozenTeacher or None, but is a {type(teacher).__name__}.")


def check_correspondence(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ``ValueError`` for the first block of the student that the teacher has not at the same place."""
    if teacher is student:
        raise ValueError("teacher is the student; give it a network of its own.")
    for own, other in zip_longest(find_chains(student, "all"), find_chains(teacher, "all")):
        described = ["nothing" if c is None else f"{c.block_name} ({class_name(c.block)})" for c in (own, other)]
        if described[0] != described[1]:
            raise ValueError(
                f"student and teacher must be made of the same blocks, but where the student has {described[0]}, the "
                f"teacher, a {type(teacher).__name__}, has {described[1]}."
            )
        widths = own.conv.out_channels, other.conv.out_channels
        if own.compactor is not None and widths[0] != widths[1]:
            raise ValueError(f"teacher has {widths[1]} channels behind {own.name}, the student {widths[0]}.")


def class_name(module: nn.Module) -> str:
    """Return the full name of a module's class: libraries call different blocks alike."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def rewrapped(wrapper: nn.parallel.DistributedDataParallel, module: nn.Module) -> nn.parallel.DistributedDataParallel:
    """Return another module in the same wrapper."""
    settings = {name: getattr(wrapper, name) for name in WRAPPER_SETTINGS}
    new = nn.parallel.DistributedDataParallel(module, **settings)
    # As an argument it is deprecated in newer versions, and under another name not known to older ones.
    new.broadcast_buffers = wrapper.broadcast_buffers
    return new


def write(text: str) -> None:
    """Print beside a progress bar, in the first process only."""
    if not distributed() or torch.distributed.get_rank() == 0:
        tqdm.write(text)


def distributed() -> bool:
    """Return whether there are several processes that know each other."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gathered(features: torch.Tensor) -> torch.Tensor:
    """Return the rows of all processes, the same on each."""
    if not distributed():
        return features
    parts = [torch.empty_like(features) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, features.contiguous())
    return torch.cat(parts)
