from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn

from ..utils.modules import eval_mode
from .compactor import compacted_chains
from .export import kept_rows


@dataclass
class BlockCost:
    """What one block costs: ``parameters``, ``flops`` per image, and the ``widths`` behind each normalisation."""

    parameters: int
    flops: int
    widths: dict[str, int]


@dataclass
class ExportedCost:
    """What the exported network would cost: ``parameters``, ``flops`` per image, and each of its ``blocks`` by name."""

    parameters: int
    flops: int
    blocks: dict[str, BlockCost]


class ExportMeter:
    """Says what a network with compactors would cost if it were exported now, without exporting it.

    The network runs once, when the meter is made, on one black image in eval mode; measuring then takes the row
    norms and arithmetic alone. Parameters and FLOPs (two per multiply-add) are those that
    ``pml_distill.evaluation.model_cost`` finds for ``export(model, threshold)``.

    Args:
        model: a network from ``insert_compactors``; its mode is restored.
        image_shape: (C, H, W).

    Raises:
        ValueError: for a network without compactors; ``image_shape`` is no (C, H, W), or the network cannot run on it.

    Example:
        >>> from pml_distill.capacity import insert_compactors
        >>> from pml_distill.models import SmallResNet
        >>> model = SmallResNet(width=8)
        >>> compactors = insert_compactors(model)
        >>> meter = ExportMeter(model, (1, 32, 32))
        >>> _ = compactors["layer1.0.bn1"].weight.data[3:].zero_()
        >>> meter.measure().blocks["layer1.0"]
        BlockCost(parameters=451, flops=221184, widths={'layer1.0.bn1': 3})
    """

    def __init__(self, model: nn.Module, image_shape: tuple[int, ...]):
        # It imports triton, which costs more than PML.
        from torch.utils.flop_counter import FlopCounterMode

        self.chains = compacted_chains(model)
        if not self.chains:
            raise ValueError(f"{type(model).__name__} has no compactors: call insert_compactors on it first.")
        if (
            not isinstance(image_shape, Sequence)
            or len(image_shape) != 3
            or not all(isinstance(size, Integral) and size > 0 for size in image_shape)
        ):
            raise ValueError(f"image_shape must be (C, H, W), three positive whole numbers, but is {image_shape!r}.")
        self.model = model
        parameter = next(model.parameters())
        with eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            image = torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype)
            try:
                model(image)
            except RuntimeError as error:
                raise ValueError(
                    f"image_shape must be a shape that {type(model).__name__} takes, but is {image_shape}: {error}"
                ) from error
        counted = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
        self.total_flops = counter.get_total_flops()
        root = type(model).__name__
        self.flops = {module: counted.get(f"{root}.{name}", 0) for name, module in model.named_modules()}
        self.flops[model] = self.total_flops

    def measure(self, threshold: float = 1e-5) -> ExportedCost:
        """Return the cost of ``export(model, threshold)``; where no row reaches the threshold, the longest stays."""
        return self.cost({chain.name: len(kept_rows(chain.compactor, threshold)) for chain in self.chains})

    def cost(self, widths: dict[str, int]) -> ExportedCost:
        """Return the cost of the network with so many rows behind each normalisation."""
        blocks: dict[str, BlockCost] = {}
        inputs, outputs, owners = {}, {}, {}
        parameters, flops = parameter_count(self.model), self.total_flops
        for chain in self.chains:
            rows = widths[chain.name]
            outputs[chain.conv] = inputs[chain.following] = rows
            cost = BlockCost(parameter_count(chain.block), self.flops[chain.block], {})
            block = owners[chain.conv] = owners[chain.following] = blocks.setdefault(chain.block_name, cost)
            block.widths[chain.name] = rows
            # Normalisation and compactor go altogether.
            block.parameters -= parameter_count(chain.norm)
            parameters -= parameter_count(chain.norm)
            block.flops -= self.flops[chain.compactor]
            flops -= self.flops[chain.compactor]
        for conv, block in owners.items():
            narrow_in, narrow_out = inputs.get(conv, conv.in_channels), outputs.get(conv, conv.out_channels)
            kernels, kept = conv.in_channels * conv.out_channels, narrow_in * narrow_out
            biases = narrow_out if conv in outputs or conv.bias is not None else 0
            saved = parameter_count(conv) - conv.weight.numel() // kernels * kept - biases
            block.parameters -= saved
            parameters -= saved
            saved = self.flops[conv] // kernels * (kernels - kept)
            block.flops -= saved
            flops -= saved
        return ExportedCost(parameters, flops, blocks)


def parameter_count(module: nn.Module) -> int:
    """Return how many numbers a module learns."""
    return sum(parameter.numel() for parameter in module.parameters())
