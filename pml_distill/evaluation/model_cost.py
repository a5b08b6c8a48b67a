import time
from dataclasses import dataclass

import numpy as np
import torch

from ..utils.modules import eval_mode


@dataclass
class ModelCost:
    """What a network costs: ``parameters``, ``flops`` per image, ``latency`` in ms per image by batch size."""

    parameters: int
    flops: int
    latency: dict[int, float]


def model_cost(
    model: torch.nn.Module, image_shape: tuple[int, ...], batch_sizes: tuple[int, ...] = (1, 64), repeats: int = 20
) -> ModelCost:
    """Measure a network in eval mode on its own device, the CPU if it has no parameters.

    FLOPs are those of ``torch.utils.flop_counter`` for one image: two for each multiply-add of convolutions and
    matrix products. The latency is the median wall time of ``repeats`` forward passes over the batch, divided by
    the batch size.

    Args:
        model: from a batch of images to embeddings; its mode is restored afterwards.
        image_shape: (C, H, W).
        batch_sizes: for which batch sizes to time it.
        repeats: how many timed passes, after three for warm-up.
    """
    # It imports triton, which costs more than PML.
    from torch.utils.flop_counter import FlopCounterMode

    like = next(model.parameters(), torch.empty(0))
    with eval_mode(model), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(like.new_zeros(1, *image_shape))
        latency = {}
        for size in batch_sizes:
            images = like.new_zeros(size, *image_shape)
            times = [timed(model, images) for _ in range(repeats + 3)][3:]
            latency[size] = 1000 * float(np.median(times)) / size
    return ModelCost(sum(p.numel() for p in model.parameters()), counter.get_total_flops(), latency)


def timed(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Return the seconds of one forward pass, the device's own time included."""
    start = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start
