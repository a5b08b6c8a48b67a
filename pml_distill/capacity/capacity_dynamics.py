import math
import os
import weakref
from collections.abc import Callable
from dataclasses import asdict
from numbers import Integral
from typing import Any

import torch
from pytorch_metric_learning.utils import common_functions as c_f
from torch import nn

from ..teachers import FrozenTeacher
from ..utils.distributed import num_processes
from ..utils.modules import eval_mode, unwrapped
from ..utils.report import format_table, write
from .compactor import find_compactors
from .correspondence import check_correspondence, check_networks
from .export import export
from .export_meter import ExportedCost, ExportMeter
from .gradient_reset import GradientReset
from .group_lasso import add_lasso_gradient, shrink_rows
from .pass_tap import PassTap
from .size_budget import SizeBudget
from .student_replacement import key_in, replace_student

# What is attached to a student, by the student's id; as long as it lives, so does the student.
ATTACHED: weakref.WeakValueDictionary[int, "CapacityDynamics"] = weakref.WeakValueDictionary()


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

    While it is attached neither network can be pickled as a whole: save their state dicts, or ``close()`` first; also
    before another one is attached to the student. Passes with gradients of the student in training mode wait, with
    their images, for ``dynamics()``.

    Under ``DistributedDataParallel`` the features of all processes are gathered, so that all mark the same rows. In
    each step all processes need as many images, or the gathering aborts: ``drop_last=True`` for the data loader.

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
        ratio: share of channels that may be marked, see ``GradientReset``; likewise all up to
            ``refresh_interval``, but ``queue_dtype``.
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
        ValueError: the student is no network, compiled or in ``DataParallel``, has another CapacityDynamics, no
            compactors, or one that the optimizer does not train; the teacher is no single network, is the student, or
            has other blocks or widths than the student; a number out of range; an image shape that the student does
            not take; a target out of reach, without ``budget_steps`` or with ``proximal=False``; in a step: a
            compactor with values that are not finite, a block that runs more than once in a pass.
        RuntimeError: in a resetting epoch: the optimizer steps, and nothing has called the dynamics before; the
            dynamics are called, and compactors have gradients, but no pass of the student in training mode was heard.
    """

    teacher: Any
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
        if id(self.student) in ATTACHED:
            raise ValueError("student must have no other CapacityDynamics, but has one: call close() on that first.")
        self.compactors = find_compactors(self.student)
        self.meter = ExportMeter(self.student, image_shape)
        self.weights = [compactor.weight for compactor in self.compactors.values()]
        self.threshold, self.reset_epoch, self.proximal = threshold, reset_epoch, proximal
        self.lasso_weight, self.epoch, self.steps = lasso_weight, 1, 0
        self.history: list[dict[str, Any]] = []
        self.check_optimizer(optimizer)
        if target_params is not None and target_flops is not None:
            raise ValueError(f"give target_params ({target_params}) or target_flops ({target_flops}), not both.")
        self.budget = None
        for name, share in (("target_params", target_params), ("target_flops", target_flops)):
            if share is None:
                continue
            if not proximal:
                raise ValueError(f"{name} needs proximal=True; with the lasso as a gradient no row reaches zero.")
            if not lasso_weight:
                raise ValueError(
                    f"{name} multiplies lasso_weight step by step, so that it must be above 0, but is {lasso_weight}."
                )
            self.budget = SizeBudget(self.compactors, self.meter, name, share, budget_steps, threshold)
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
        ATTACHED[id(self.student)] = self

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ``ValueError`` for what is no optimizer, a compactor that it leaves untrained, or a frozen student."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"optimizer must be a torch.optim.Optimizer, but is a {type(optimizer).__name__}.")
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, c in self.compactors.items() if id(c.weight) not in trained]
        if missing:
            raise ValueError(
                f"optimizer does not train the compactors behind {missing}; make it after insert_compactors, of "
                "student.parameters()."
            )
        compactors = {id(c.weight) for c in self.compactors.values()}
        if not any(p.requires_grad for p in self.student.parameters() if id(p) not in compactors):
            raise ValueError(
                "student learns nothing but its compactors, since no other parameter requires a gradient. A copy of "
                "what FrozenTeacher holds is frozen too: call requires_grad_(True) on it."
            )

    def tap(self) -> None:
        """Collect the pooled features of both networks while the student trains, and the student's input."""
        teacher = self.teacher.trunk if isinstance(self.teacher, FrozenTeacher) else self.teacher
        check_correspondence(self.student, teacher)
        self.teacher.eval()
        taught = {name: teacher.get_submodule(name) for name in self.compactors}
        # A pass without gradients, as when batch norms are brought up to date, is no part of a step; nor is one of the
        # teacher over a gallery, while the student is tested.
        tap = PassTap(
            self.student,
            dict(self.compactors),
            lambda: (
                self.resetting
                and self.student.training
                and torch.is_grad_enabled()
                and any(weight.requires_grad for weight in self.weights)
            ),
        )
        self.taps = {
            "student": tap,
            # The teacher may be first, but then the student follows.
            "teacher": PassTap(
                self.teacher,
                taught,
                lambda: self.resetting and self.student.training and not teacher.training,
                lambda done: any(done.images is own.images for own in tap.passes),
            ),
        }

    @property
    def resetting(self) -> bool:
        """Whether gradients are reset in this epoch."""
        return bool(self.taps) and self.epoch > self.reset_epoch

    def __call__(self) -> None:
        """Change the gradients between backward and step."""
        if self.resetting and self.taps["student"].passes:
            self.reset_gradients()
        elif self.resetting and any(w.grad is not None and bool(w.grad.any()) for w in self.weights):
            raise RuntimeError(
                "gradients are to be reset, but no pass of the student was heard since dynamics() was last called: "
                "call it as student(images), not by one of its methods or parts, and keep it in training mode; batch "
                "norms alone may be in eval mode."
            )
        if not self.proximal and self.handles:
            for weight in self.weights:
                add_lasso_gradient(weight, self.lasso_weight)

    @torch.no_grad()
    def reset_gradients(self) -> None:
        """Let the batches of this step enter the queues and zero the gradients of the marked rows."""
        tap, taught = self.taps.values()
        if [id(p.images) for p in tap.passes] != [id(p.images) for p in taught.passes]:
            taught.take()
            with eval_mode(self.teacher):
                for done in tap.passes:
                    self.teacher(done.images)
        student, teacher = tap.take(), taught.take()
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
        if self.budget is not None and self.budget.met:
            self.budget.hold()
            return
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        before = [weight.clone() for weight in self.weights] if self.budget is not None else []
        for weight in self.weights:
            shrink_rows(weight, rates[id(weight)] * self.lasso_weight)
        if self.budget is not None:
            self.lasso_weight *= self.budget.follow(self.steps, self.widths(), before)

    def measure(self) -> ExportedCost:
        """Return what the network would cost if it were exported now."""
        return self.meter.cost(self.widths())

    def widths(self) -> dict[str, int]:
        """Return how many rows of each compactor would stay if the network were exported now."""
        lengths = [compactor.row_norms().detach() for compactor in self.compactors.values()]
        # All at once: each reading waits for the device.
        widths, finite = torch.stack(
            [torch.stack([(rows >= self.threshold).sum(), rows.isfinite().all()]) for rows in lengths], dim=1
        ).tolist()
        broken = [name for name, whole in zip(self.compactors, finite) if not whole]
        if broken:
            raise ValueError(f"the compactors behind {broken} have values that are not finite.")
        return {name: max(1, width) for name, width in zip(self.compactors, widths)}

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

        Raises:
            ValueError: ``export_after`` is no positive whole number.
        """
        if export_after is not None and not (isinstance(export_after, Integral) and export_after >= 1):
            raise ValueError(f"export_after must be None or a whole number, at least 1, but is {export_after!r}.")
        begun = False

        def hook(trainer: Any) -> Any:
            nonlocal begun
            if self.handles:
                if export_after is not None:
                    key_in(trainer, self.student)
                if not begun and hasattr(trainer, "save_checkpoint") and self not in trainer.gradient_clippers.values():
                    c_f.LOGGER.warning(
                        "CapacityDynamics is not itself among the values of gradient_clippers, so that checkpoints "
                        'leave it out; give another clipper under another key, such as "embedder_grad_clipper".'
                    )
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

        Parameter groups get the new parameters where the old ones of the same name stood, without their momentum, and
        the bias of a merged convolution where that of its normalisation stood; learning rates and schedulers stay. A
        DistributedDataParallel wrapper is made anew with the same settings, but for communication hooks and the size
        of its buckets. The hooks are removed. A checkpoint taken from now on holds the small network.

        Returns:
            The exported network, in training mode.

        Raises:
            ValueError: the trainer has no model that is this student, or has it as ``torch.compile`` returned it and
                not compiled in place; its ``student_features`` are outputs of modules that are merged.
        """
        small = self.export().train()
        replace_student(trainer, self.student, small)
        trainer.gradient_clippers = {k: c for k, c in trainer.gradient_clippers.items() if c is not self}
        self.close()
        return small

    def table(self) -> str:
        """Return the history as a Markdown table; ``ValueError`` before the first epoch has ended."""
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
        """Remove all hooks from both networks and the optimizer; from now on calling this changes no gradient."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.taps = [], {}
        if ATTACHED.get(id(self.student)) is self:
            del ATTACHED[id(self.student)]

    def state_dict(self) -> dict[str, Any]:
        """Return queues, marks and progress; the compactors themselves are in the student's state."""
        return {
            "widths": {name: len(compactor.weight) for name, compactor in self.compactors.items()},
            "resets": self.resets.state_dict(),
            "lasso_weight": self.lasso_weight,
            "epoch": self.epoch,
            "steps": self.steps,
            "budget": None if self.budget is None else self.budget.state_dict(),
            "history": list(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; under other settings raise ``ValueError`` and load nothing."""
        own = self.state_dict()
        missing = [key for key in own if key not in state]
        if missing:
            raise ValueError(f"the state must be what state_dict returned, but lacks {missing}.")
        if state["widths"] != own["widths"]:
            raise ValueError(
                f"the state is of compactors with the widths {state['widths']}, but the student has {own['widths']}."
            )
        if (self.budget is None) != (state["budget"] is None):
            with_one, without = ("state", "dynamics") if self.budget is None else ("dynamics", "state")
            raise ValueError(f"the {with_one} has target_params or target_flops, but the {without} has none.")
        shapes, own_shapes = ({key: part.shape for key, part in each["resets"].items()} for each in (state, own))
        if shapes != own_shapes:
            raise ValueError(
                "the state was taken with another queue_size, or with a teacher where there is none now, or the other "
                "way round."
            )
        if self.budget is not None:
            self.budget.load_state_dict(state["budget"])
        self.resets.load_state_dict(state["resets"])
        self.lasso_weight, self.epoch, self.steps = state["lasso_weight"], state["epoch"], state["steps"]
        self.history = list(state["history"])


def widths_in(row: dict[str, Any]) -> dict[str, int]:
    """Return the width behind each compactor in an entry of the history."""
    return {name: width for block in row["blocks"].values() for name, width in block["widths"].items()}


def gathered(features: torch.Tensor) -> torch.Tensor:
    """Return the rows of all processes, the same on each."""
    if num_processes() == 1:
        return features
    parts = [torch.empty_like(features) for _ in range(num_processes())]
    torch.distributed.all_gather(parts, features.contiguous())
    return torch.cat(parts)
