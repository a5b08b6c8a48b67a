from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..teachers import FrozenTeacher
from ..utils.distributed import num_processes
from ..utils.modules import eval_mode, unwrapped
from .compactor import Compactor, find_compactors
from .correspondence import check_correspondence
from .gradient_reset import GradientReset
from .pass_tap import PassTap
from .tracing import copied


@dataclass(frozen=True)
class RetrievalReset:
    """Retrieval-guided gradient resetting for ``CapacityDynamics``: the teacher, and how channels are marked.

    Args:
        teacher: a network of the same blocks and widths as the student, or a ``FrozenTeacher`` with one as trunk; None
            for a copy of the student as it is. It runs on the student's input if nothing else has run it.
        warmup_epochs: resetting begins after so many epochs.
        ratio, neighbors, queue_size, metric, accumulate, refresh_interval: see ``GradientReset``.
        queue_dtype: of the queue, such as ``torch.float16`` for half the memory; None: that of the compactors.
    """

    teacher: nn.Module | None = None
    warmup_epochs: int = 20
    ratio: float = 0.5
    neighbors: int = 2
    queue_size: int = 24000
    queue_dtype: torch.dtype | None = None
    metric: str = "cosine"
    accumulate: bool = True
    refresh_interval: int | None = None

    def __post_init__(self) -> None:
        if not self.warmup_epochs >= 0:
            raise ValueError(f"warmup_epochs must be at least 0, but is {self.warmup_epochs}.")


class Resetting:
    """Applies ``RetrievalReset`` to a student: hears both networks, keeps the queues and zeroes gradients."""

    def __init__(
        self, settings: RetrievalReset, student: nn.Module, compactors: dict[str, Compactor], epoch: Callable[[], int]
    ):
        self.compactors = compactors
        self.active = lambda: epoch() > settings.warmup_epochs
        self.weights = [compactor.weight for compactor in compactors.values()]
        names = ("queue_size", "neighbors", "ratio", "metric", "accumulate", "refresh_interval")
        same = {name: getattr(settings, name) for name in names}
        self.resets: Any = nn.ModuleList(
            GradientReset(len(weight), **same).to(weight.device, settings.queue_dtype or weight.dtype)
            for weight in self.weights
        )
        self.own_teacher = settings.teacher is None
        self.teacher = (
            copied(student).requires_grad_(False) if settings.teacher is None else unwrapped(settings.teacher)
        )
        trunk = self.teacher.trunk if isinstance(self.teacher, FrozenTeacher) else self.teacher
        check_correspondence(student, trunk)
        taught = find_compactors(trunk) or {name: trunk.get_submodule(name) for name in compactors}
        self.teacher.eval()

        def learning() -> bool:
            # A pass without gradients, as when batch norms are brought up to date, is no part of a step.
            trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.weights)
            return self.active() and student.training and trained

        last = {name: compactor.chain.last for name, compactor in compactors.items()}
        self.student_tap = PassTap(student, dict(compactors), last, learning)
        # The teacher may be first, but then the student follows.
        self.teacher_tap = PassTap(
            self.teacher,
            {name: taught[name] for name in compactors},
            last,
            lambda: self.active() and student.training and not trunk.training,
            lambda done: any(done.images is own.images for own in self.student_tap.passes),
        )

    def close(self) -> None:
        """Take all hooks away."""
        self.student_tap.close()
        self.teacher_tap.close()

    def forget(self) -> None:
        """Drop the passes that were heard."""
        self.student_tap.take(), self.teacher_tap.take()

    def apply(self) -> None:
        """Let the batches of this step enter the queues, and zero the gradients of the marked rows."""
        if not self.student_tap.passes:
            if any(weight.grad is not None and bool(weight.grad.any()) for weight in self.weights):
                raise RuntimeError(
                    "gradients are to be reset, but no pass of the student was heard since the last step: call it as "
                    "student(images), in training mode; batch norms alone may be in eval mode."
                )
            return
        if [id(p.images) for p in self.student_tap.passes] != [id(p.images) for p in self.teacher_tap.passes]:
            self.teacher_tap.take()
            with eval_mode(self.teacher):
                for done in self.student_tap.passes:
                    self.teacher(done.images)
        if any(
            len(p.features) < len(self.compactors) for tap in (self.student_tap, self.teacher_tap) for p in tap.passes
        ):
            raise RuntimeError(
                "not all compactors were heard in a pass, as when a network was compiled before CapacityDynamics: "
                "compile it afterwards, or call torch.compiler.reset() once."
            )
        sides = self.student_tap.take(), self.teacher_tap.take()
        features = [torch.cat([p.features[name] for p in side]) for name in self.compactors for side in sides]
        # All side by side, so that processes talk once.
        chains = [compactor.chain for compactor in self.compactors.values() for _ in sides]
        # Channels that go together count together.
        features = [
            f if c.units == f.shape[1] else f.unflatten(1, (c.units, -1)).norm(dim=2) for f, c in zip(features, chains)
        ]
        parts = gathered(torch.cat(features, dim=1)).split([part.shape[1] for part in features], dim=1)
        for weight, reset, own, other in zip(self.weights, self.resets, parts[::2], parts[1::2]):
            mask = reset.update(own, other)
            if weight.grad is not None:
                weight.grad.mul_(mask.to(weight.grad.dtype).view(-1, *(1,) * (weight.ndim - 1)))


def gathered(features: torch.Tensor) -> torch.Tensor:
    """Return the rows of all processes, the same on each."""
    if num_processes() == 1:
        return features
    parts = [torch.empty_like(features) for _ in range(num_processes())]
    torch.distributed.all_gather(parts, features.contiguous())
    return torch.cat(parts)
