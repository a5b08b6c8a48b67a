import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..utils.tensors import in_float32
from .ask import AlwaysEval, ask, refuse_unfrozen


class EnsembleTeacher(AlwaysEval):
    r"""Several teachers as one: their normalised embeddings side by side, each times the root of its weight.

    .. math:: t = \big[ \sqrt{w_1} \, t_1 / \|t_1\|, \dots, \sqrt{w_K} \, t_K / \|t_K\| \big], \quad \sum_k w_k = 1

    The result has length 1. Its cosine similarities are the weighted means of the teachers' own, and its squared
    Euclidean distances those of their squared distances, so that any loss on pairs or rankings learns from the mean.
    Widths may differ and add up.

    Args:
        teachers: callables from data to embeddings, such as ``FrozenTeacher``; modules must be frozen.
        weights: one positive number per teacher, scaled to sum to 1; None: all alike.

    Raises:
        ValueError: no list, or an empty one; wrong weights; a teacher whose parameters require gradients.

    Example:
        >>> from pml_distill.teachers import FrozenTeacher
        >>> teachers = [FrozenTeacher(torch.nn.Linear(4, width)) for width in (8, 16)]
        >>> EnsembleTeacher(teachers, weights=[3, 1])(torch.rand(5, 4)).shape
        torch.Size([5, 24])
    """

    def __init__(self, teachers: Sequence[Callable], weights: Sequence[float] | None = None):
        super().__init__()
        if not hasattr(teachers, "__len__"):
            raise ValueError(f"teachers must be a list of teachers, but is a single {type(teachers).__name__}.")
        if not len(teachers):
            raise ValueError("teachers is empty; give at least one.")
        weights = [1.0] * len(teachers) if weights is None else list(weights)
        if len(weights) != len(teachers) or not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise ValueError(
                f"weights must be {len(teachers)} positive numbers, one for each of the teachers, but are {weights}."
            )
        for number, teacher in enumerate(teachers):
            refuse_unfrozen(teacher, f"teachers[{number}]")
        self.teachers = list(teachers)
        self.frozen = torch.nn.ModuleList(t for t in teachers if isinstance(t, torch.nn.Module))
        self.weights = [weight / sum(weights) for weight in weights]
        self.eval()

    @property
    def needs_index(self) -> bool:
        """Whether one of the teachers needs the rows of a batch."""
        return any(getattr(teacher, "needs_index", False) for teacher in self.teachers)

    @torch.no_grad()
    def forward(self, data: Any, index: torch.Tensor | None = None) -> torch.Tensor:
        """Return the joint embeddings, (B, sum of the widths), on the device of the first teacher's."""
        parts = [ask(teacher, data, index, f"teachers[{k}]") for k, teacher in enumerate(self.teachers)]
        # A cached teacher answers where the data are, a frozen one where it is itself.
        device = parts[0].device
        parts = [F.normalize(in_float32(part.to(device))) for part in parts]
        return torch.cat([weight**0.5 * part for part, weight in zip(parts, self.weights)], dim=1)

    def extra_repr(self) -> str:
        """Name the weights."""
        return f"weights={self.weights}"
