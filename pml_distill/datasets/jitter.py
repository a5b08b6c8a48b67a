import math

import torch
from torch.nn import functional as F


def random_jitter(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw one random affine map and noise for each image of a batch.

    Rotation up to 15 degrees, scale 0.8 to 1.2 on each axis, shear up to 0.2, shift up to 10 % of the size, then
    Gaussian noise of deviation 0.1. The images are (B, C, H, W) in [0, 1], background 0.
    """
    size = len(images)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(size, *shape, generator=generator, dtype=images.dtype)

    angle = uniform(-math.pi / 12, math.pi / 12)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(size, 2, 2)
    shear = torch.eye(2, dtype=images.dtype).repeat(size, 1, 1)
    shear[:, 0, 1] = uniform(-0.2, 0.2)
    linear = rotation @ shear @ torch.diag_embed(uniform(0.8, 1.2, 2))
    shift = uniform(-0.2, 0.2, 2, 1)  # grid coordinates span 2
    grid = F.affine_grid(torch.cat([linear, shift], dim=2), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return moved + 0.1 * torch.randn(images.shape, generator=generator, dtype=images.dtype)
