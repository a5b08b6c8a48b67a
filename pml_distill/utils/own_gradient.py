from typing import Any

import torch


def own_gradient(function: type[torch.autograd.Function], tensor: torch.Tensor, *others: Any) -> Any:
    """Return what a function with a gradient of its own makes of a tensor and other arguments.

    torch 2.4 cannot compile its ``apply`` where nobody asks for a gradient; there ``forward`` does the same.
    """
    differentiable = tensor.requires_grad and torch.is_grad_enabled()
    return (function.apply if differentiable else function.forward)(tensor, *others)
