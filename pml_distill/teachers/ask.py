from collections.abc import Callable
from typing import Any

import torch

from ..utils.tensors import one_tensor


@torch.no_grad()
def ask(
    teacher: Callable[..., Any], data: Any, index: torch.Tensor | None = None, name: str = "teacher"
) -> torch.Tensor:
    """Return what a teacher makes of a batch, without gradients.

    A teacher is any callable from data to embeddings, such as a frozen network or a function. One with
    ``needs_index = True``, such as ``CachedTeacher``, is called with the rows of the batch too.

    Raises:
        ValueError: the teacher returns something other than one tensor.
    """
    output = teacher(data, index) if getattr(teacher, "needs_index", False) else teacher(data)
    return one_tensor(output, name)
