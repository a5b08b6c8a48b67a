"""Networks put into eval mode for a while, or taken out of their wrapper."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put a network into eval mode for a while; each of its modules returns to its own mode, also after an error."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def unwrapped(module: Any) -> Any:
    """Return the module inside of a data-parallel wrapper."""
    wrappers = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    return module.module if isinstance(module, wrappers) else module
