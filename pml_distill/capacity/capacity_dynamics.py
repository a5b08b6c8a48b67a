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

from ..utils.modules import eval_mode, unwrapped
from ..utils.report import write
from .compactor import find_compactors
from .correspondence import check_networks
from .export import export, rounded
from .export_meter import ExportedCost, ExportMeter
from .group_lasso import add_lasso_gradient, shrink_rows
from .history import block_table, history_table, plot_history
from .retrieval_reset import Resetting, RetrievalReset
from .size_budget import BudgetSchedule, SizeBudget
from .student_replacement import key_in, replace_student

# What is attached to a student, by the student's id; as long as it lives, so does the student.
ATTACHED: weakref.WeakValueDictionary[int, "CapacityDynamics"] = weakref.WeakValueDictionary()
STATE_KEY = "capacity_dynamics"


class CapacityDynamics:
    """Shrinks a student while it learns (capacity dynamics): group lasso on its compactors, resetting led by retrieval.

    It works in the step hooks of the optimizer. Before a step, the rows of each compactor that ``reset`` marks lose
    their gradient. After it the lasso shortens all rows by learning rate times ``lasso_weight``, and a row not longer
    than that becomes exactly zero: a channel that ``export`` drops. Clipping, accumulation and a ``GradScaler`` need
    nothing of you, and the optimizer's state dict carries the progress. ::

        insert_compactors(student)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
        dynamics = CapacityDynamics(
            student, optimizer, (3, 224, 224), reset=RetrievalReset(teacher), budget=SizeBudget(flops=0.5, steps=10_000)
        )

    In a PML trainer add ``end_of_epoch_hook=dynamics.end_of_epoch_hook(...)``; elsewhere call ``end_epoch()``. Give the
    compactors a parameter group with ``weight_decay=0``, keep them in float32, and ``close()`` before pickling.

    Source: Xie et al., "Towards a Smaller Student: Capacity Dynamic Distillation for Efficient Image Retrieval",
    CVPR 2023; the defaults are its settings.

    Args:
        student: a network with compactors, see ``insert_compactors``; may be inside of DistributedDataParallel.
        optimizer: the one that trains the compactors.
        image_shape: (C, H, W), for the FLOPs.
        lasso_weight: how strong the lasso is; with a budget the first weight, which then adapts.
        reset: the teacher, and how it guides the resetting of gradients; None for plain group lasso.
        budget: the target and the steps to it; None to go on shrinking.
        threshold: rows shorter than this count as gone.
        proximal: False for the authors' form, lasso_weight * w / ||w|| in the gradient: its rows never reach zero.
        example_inputs: instead of ``image_shape``, for a network that takes something else, see ``ExportMeter``.

    Attributes:
        history: one entry per epoch: epoch, lasso weight, parameters, flops, and the same of each block by name.

    Raises:
        ValueError: the student cannot be driven, the teacher has other blocks or widths, a number is out of range, a
            budget out of reach; in a step: values that are not finite, a block that runs twice in a pass.
        RuntimeError: in ``optimizer.step()``, when no pass of the student in training mode was heard.
    """

    def __init__(
        self,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        image_shape: tuple[int, ...] | None = None,
        lasso_weight: float = 0.004,
        reset: RetrievalReset | None = None,
        budget: SizeBudget | None = None,
        threshold: float = 1e-5,
        proximal: bool = True,
        example_inputs: Any = None,
    ):
        check_networks(student, None if reset is None else reset.teacher)
        if not 0 <= lasso_weight < math.inf:
            raise ValueError(f"lasso_weight must be finite and at least 0, but is {lasso_weight}.")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be above 0 and below 1, where rows begin, but is {threshold}.")
        if budget is not None and not (proximal and lasso_weight):
            raise ValueError(f"a budget needs proximal=True and lasso_weight > 0, not {proximal} and {lasso_weight}.")
        self.student = unwrapped(student)
        if id(self.student) in ATTACHED:
            raise ValueError("student must have no other CapacityDynamics, but has one: call close() on that first.")
        self.compactors = find_compactors(self.student)
        self.meter = ExportMeter(self.student, image_shape, example_inputs)
        self.weights = [compactor.weight for compactor in self.compactors.values()]
        self.threshold, self.proximal = threshold, proximal
        self.lasso_weight, self.epoch, self.steps = lasso_weight, 1, 0
        self.multiple_of = budget.multiple_of if budget else 1
        self.history: list[dict[str, Any]] = []
        self.check_optimizer(optimizer)
        self.budget = None if budget is None else BudgetSchedule(budget, self.compactors, self.meter, threshold)
        self.resetting = None
        if reset is not None:
            self.resetting = Resetting(reset, self.student, self.compactors, lambda: self.epoch)
        self.handles = [
            optimizer.register_step_pre_hook(self.before_step),
            optimizer.register_step_post_hook(self.after_step),
            optimizer.register_state_dict_post_hook(lambda _, state: state.update({STATE_KEY: self.state_dict()})),
            optimizer.register_load_state_dict_pre_hook(self.load_with_optimizer),
        ]
        ATTACHED[id(self.student)] = self

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ``ValueError`` for a compactor that the optimizer leaves untrained, or a frozen student."""
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, c in self.compactors.items() if id(c.weight) not in trained]
        if missing:
            raise ValueError(f"optimizer does not train the compactors behind {missing}: make it afterwards.")
        compactors = {id(weight) for weight in self.weights}
        if not any(p.requires_grad for p in self.student.parameters() if id(p) not in compactors):
            raise ValueError("student learns nothing but its compactors: call requires_grad_(True) on it.")

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Change the gradients; a hook of the optimizer, after clipping and unscaling."""
        if skips(optimizer):
            if self.resetting:
                self.resetting.forget()
            return
        if self.resetting and self.resetting.active():
            self.resetting.apply()
        if not self.proximal:
            # A fused optimizer unscales the gradients itself, later than this.
            scale = getattr(optimizer, "grad_scale", None)
            for weight in self.weights:
                add_lasso_gradient(weight, self.lasso_weight * (1 if scale is None else scale))

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Shorten the rows; a hook of the optimizer, so that a step that a grad scaler skips shortens nothing."""
        if skips(optimizer):
            return
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
        pairs = zip(self.compactors.items(), widths)
        return {name: rounded(width, compactor.chain, self.multiple_of) for (name, compactor), width in pairs}

    def end_epoch(self) -> None:
        """Enter the sizes into the history and go on to the next epoch."""
        # As plain values, for a checkpoint to hold.
        self.history.append({"epoch": self.epoch, "lasso_weight": self.lasso_weight, **asdict(self.measure())})
        self.epoch += 1

    def end_of_epoch_hook(
        self, then: Callable[[Any], Any] | None = None, export_after: int | None = None
    ) -> Callable[[Any], Any]:
        """Return the hook for a PML trainer, which writes a line of the history, and the blocks into PML's log.

        ``then`` is another hook to run after it; after epoch ``export_after`` the student is replaced.
        """
        if not (export_after is None or isinstance(export_after, Integral) and export_after >= 1):
            raise ValueError(f"export_after must be None or a whole number, at least 1, but is {export_after!r}.")
        begun = False

        def hook(trainer: Any) -> Any:
            nonlocal begun
            if self.handles:
                if export_after is not None:
                    key_in(trainer, self.student)
                self.end_epoch()
                write(self.table().splitlines()[-1] if begun else self.table())
                begun = True
                c_f.LOGGER.info("Blocks after epoch %d:\n%s", self.epoch - 1, self.block_table())
                if self.epoch - 1 == export_after:
                    self.replace_student(trainer)
            return None if then is None else then(trainer)

        return hook

    def replace_student(self, trainer: Any) -> nn.Module:
        """Put the exported network in the student's place in a trainer, close the dynamics, and return it.

        Parameter groups get the new parameters where the old ones stood, without momentum; a DistributedDataParallel
        is made anew, without communication hooks. ``ValueError`` if the trainer has no such model that can be replaced.
        """
        small = self.export().train()
        replace_student(trainer, self.student, small)
        self.close()
        return small

    def table(self) -> str:
        """Return the history as a Markdown table; ``ValueError`` before the first epoch has ended."""
        return history_table(self.history, self.meter)

    def block_table(self) -> str:
        """Return the blocks at the end of the last epoch as a Markdown table."""
        return block_table(self.history, self.meter)

    def plot(self, path: str | os.PathLike) -> None:
        """Draw the width of each compactor, and the size of the network, over the epochs; needs matplotlib."""
        plot_history(self.history, self.meter, path)

    def export(self, fold_norms: bool = False, average: nn.Module | None = None) -> nn.Module:
        """Return the small plain network, see ``export``, or that of a moving average, with the student's widths."""
        model = self.student if average is None else average
        with eval_mode(model):
            return export(model, self.threshold, fold_norms, self.multiple_of, self.student)

    def close(self) -> None:
        """Remove all hooks from both networks and the optimizer."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if self.resetting:
            self.resetting.close()
        if ATTACHED.get(id(self.student)) is self:
            del ATTACHED[id(self.student)]

    def state_dict(self) -> dict[str, Any]:
        """Return queues, marks and progress; the compactors themselves are in the student's state."""
        return {
            "widths": {name: len(compactor.weight) for name, compactor in self.compactors.items()},
            "resets": self.resetting.resets.state_dict() if self.resetting else {},
            "teacher": self.resetting.teacher.state_dict() if self.resetting and self.resetting.own_teacher else None,
            "lasso_weight": self.lasso_weight,
            "epoch": self.epoch,
            "steps": self.steps,
            "budget": None if self.budget is None else self.budget.state_dict(),
            "history": list(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; under other settings raise ``ValueError`` and load nothing."""
        own = self.state_dict()
        if missing := [key for key in own if key not in state]:
            raise ValueError(f"the state must be what state_dict returned, but lacks {missing}.")
        if state["widths"] != own["widths"]:
            raise ValueError(
                f"the state is of compactors with the widths {state['widths']}, but the student has {own['widths']}."
            )
        if (self.budget is None) != (state["budget"] is None):
            with_one, without = ("state", "dynamics") if self.budget is None else ("dynamics", "state")
            raise ValueError(f"the {with_one} has a budget, but the {without} has none.")
        shapes, own_shapes = ({key: part.shape for key, part in each["resets"].items()} for each in (state, own))
        if shapes != own_shapes or (state["teacher"] is None) != (own["teacher"] is None):
            raise ValueError("the state was taken with another queue_size or kind of teacher, or use of reset.")
        if self.budget is not None:
            self.budget.load_state_dict(state["budget"])
        if self.resetting:
            self.resetting.resets.load_state_dict(state["resets"])
            if self.resetting.own_teacher:
                self.resetting.teacher.load_state_dict(state["teacher"])
        self.lasso_weight, self.epoch, self.steps = state["lasso_weight"], state["epoch"], state["steps"]
        self.history = list(state["history"])

    def load_with_optimizer(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Take this state out of the optimizer's; a state of before the dynamics has none."""
        if STATE_KEY in state:
            self.load_state_dict(state.pop(STATE_KEY))


def skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer, which a grad scaler calls in any case, will skip the step by itself."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
