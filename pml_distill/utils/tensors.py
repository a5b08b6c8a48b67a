"""Small operations on tensors that several rooms share."""

import math
from typing import Any

import torch


def in_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Raise half precision to float32; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def one_tensor(output: Any, name: str, advice: str = "") -> torch.Tensor:
    """Return the embeddings that a network has returned; raise ``ValueError`` if it returned something else."""
    if not isinstance(output, torch.Tensor):
        kind = type(output).__name__
        raise ValueError(f"{name} must return one tensor of embeddings, but returned a {kind}{advice}.")
    return output


def spatial_map(features: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
    """Return (B, C, H, W) maps as they are, and tokens (B, N, C) as the maps of their spatial ones.

    The tokens of the grid (H, W), by default the largest square that N holds, are the last ones; those before, such as
    a class token and registers, are left out.
    """
    if features.ndim != 3:
        return features
    count = features.shape[1]
    height, width = (math.isqrt(count),) * 2 if grid is None else grid
    if height * width > count:
        raise ValueError(
            f"a grid of {height} x {width} does not fit into the {count} tokens of {tuple(features.shape)}."
        )
    return features[:, count - height * width :].transpose(1, 2).unflatten(2, (height, width))


def own_gradient(function: type[torch.autograd.Function], tensor: torch.Tensor, *others: Any) -> Any:
    """Return what a function with a gradient of its own makes of a tensor and other arguments.

    torch 2.4 cannot compile its ``apply`` where nobody asks for a gradient; there ``forward`` does the same.
    """
    differentiable = tensor.requires_grad and torch.is_grad_enabled()
    return (function.apply if differentiable else function.forward)(tensor, *others)


def check_finite(**tensors: torch.Tensor) -> None:
    """Raise ``ValueError`` for a tensor with values that are not finite, such as embeddings of a diverged network."""
    for name, tensor in tensors.items():
        # In parts, since what the check allocates is as large as the tensor.
        if not all(part.isfinite().all() for part in tensor.split(1 << 13)):
            raise ValueError(f"{name} {tuple(tensor.shape)} must be finite, but has values that are not.")
