import copy
from typing import Any

import torch

from ..utils.modules import unwrapped
from ..utils.tensors import one_tensor
from .ask import AlwaysEval


class EMATeacher(AlwaysEval):
    r"""A teacher that is the moving average of its own student (Mean Teacher, Tarvainen & Valpola 2017).

    .. math:: \theta_t \leftarrow d \, \theta_t + (1 - d) \, \theta_s

    Call ``update()`` after each step of the optimizer. Weights and running statistics of batch norms are averaged;
    counters are copied. ``state_dict()`` holds the average, not the student. d is ``decay``, from 0 to
    below 1.

    Example:
        >>> student = torch.nn.Linear(2, 2)
        >>> teacher = EMATeacher(student, decay=0.5)
        >>> student.weight.data += 1
        >>> teacher.update()
        >>> bool(torch.allclose(teacher.average.weight + 0.5, student.weight))
        True
    """

    #: Trainers call ``update`` after each step, and save the average in their checkpoints.
    follows_student = True

    def __init__(self, student: torch.nn.Module, decay: float = 0.999):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be from 0 to below 1, but is {decay}.")
        # In a tuple, so that it is not a part of this module.
        self.student, self.decay = (student,), decay
        self.average = copy.deepcopy(unwrapped(student)).requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def update(self) -> None:
        """Follow the student."""
        theirs = values_of(unwrapped(self.student[0]))
        for name, value in values_of(self.average).items():
            if value.is_floating_point():
                value.lerp_(theirs[name].to(value), 1 - self.decay)
            else:
                value.copy_(theirs[name])

    @torch.no_grad()
    def forward(self, data: Any) -> torch.Tensor:
        """Return the averaged network's embeddings."""
        return one_tensor(self.average(data), "student")


def values_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return each parameter and buffer once, also if it is shared."""
    return dict(module.named_parameters()) | dict(module.named_buffers())
