from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import nn

from ..utils.modules import eval_mode
from .compactor import find_compactors
from .export import kept_rows
from .tracing import is_norm_act


@dataclass
class BlockCost:
    """What one block costs, and the ``widths`` behind each normalisation."""

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

    The network runs once, on one black image in eval mode. Parameters and FLOPs (two per multiply-add) are those that
    ``pml_distill.evaluation.model_cost`` finds for ``export(model, threshold)``.

    Args:
        model: a network from ``insert_compactors``; its mode is restored.
        image_shape: (C, H, W).
        example_inputs: instead, for a network that takes something else than images: a tensor, a tuple of arguments, or
            a dictionary of keyword arguments, for a batch of one.

    Raises:
        ValueError: for a network without compactors; ``image_shape`` is no (C, H, W), or the network cannot run on it.
    """

    def __init__(self, model: nn.Module, image_shape: tuple[int, ...] | None = None, example_inputs: Any = None):
        # It imports triton, which costs more than PML.
        from torch.utils.flop_counter import FlopCounterMode

        self.model, self.compactors = model, find_compactors(model)
        if not self.compactors:
            raise ValueError(f"{type(model).__name__} has no compactors: call insert_compactors on it first.")
        args, kwargs = self.inputs(image_shape, example_inputs)
        with eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            try:
                model(*args, **kwargs)
            except (RuntimeError, ValueError, TypeError) as error:
                kind = type(model).__name__
                given = f"image_shape must be a shape that {kind} takes, but is {image_shape}"
                given = given if example_inputs is None else f"example_inputs must be what {kind} takes"
                raise ValueError(f"{given}: {error}") from error
        counted = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
        self.total_flops, root = counter.get_total_flops(), type(model).__name__
        flops = {module: counted.get(f"{root}.{name}", 0) for name, module in model.named_modules()}
        flops[model] = self.total_flops
        names = {module: name for name, module in model.named_modules()}
        chains = [compactor.chain for compactor in self.compactors.values()]
        self.blocks = {names[chain.block]: (parameter_count(chain.block), flops[chain.block]) for chain in chains}
        # Of each module that changes: what it costs, in which blocks it is, and which compactors cut what of it.
        self.parts: dict[Any, Part] = {}
        for name, compactor in self.compactors.items():
            chain = compactor.chain
            merged = [chain.place] if chain.full else []
            cuts = [(m, "rows") for m in (chain.producer, *chain.carriers, *chain.companions)]
            for module, cut in [*cuts, *((m, "columns") for m in chain.consumers), (compactor, "gone")]:
                part = self.parts.setdefault(module, Part(flops[module], parameter_count(module)))
                part.cuts[cut if module not in merged else "gone"] = name
                part.bias |= chain.full and module is chain.producer
        for part_module, part in self.parts.items():
            part.blocks = [name for name in self.blocks if not name or f"{names[part_module]}.".startswith(f"{name}.")]
            if is_norm_act(part_module):
                # What it holds of its own, without a compactor inside.
                part.flops, part.parameters = 0, sum(p.numel() for p in part_module.parameters(recurse=False))
        self.owners = {name: names[c.chain.block] for name, c in self.compactors.items()}

    def inputs(self, image_shape: Any, example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
        """Return the arguments and keyword arguments of a pass."""
        if example_inputs is not None:
            if isinstance(example_inputs, Mapping):
                return (), dict(example_inputs)
            return tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,), {}
        sizes = image_shape if isinstance(image_shape, Sequence) else ()
        if len(sizes) != 3 or not all(isinstance(size, Integral) and int(size) > 0 for size in sizes):
            raise ValueError(f"image_shape must be (C, H, W), three positive whole numbers, but is {image_shape!r}.")
        parameter = next(self.model.parameters())
        return (torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype),), {}

    def measure(self, threshold: float = 1e-5, multiple_of: int = 1) -> ExportedCost:
        """Return the cost of ``export(model, threshold)``; where no row reaches the threshold, the longest stays."""
        return self.cost({name: len(kept_rows(c, threshold, multiple_of)) for name, c in self.compactors.items()})

    def cost(self, widths: dict[str, int]) -> ExportedCost:
        """Return the cost of the network with so many rows in each compactor."""
        blocks = {name: BlockCost(*whole, {}) for name, whole in self.blocks.items()}
        for name, owner in self.owners.items():
            blocks[owner].widths[name] = widths[name]
        total = BlockCost(parameter_count(self.model), self.total_flops, {})
        units = {name: len(compactor.weight) for name, compactor in self.compactors.items()}
        for module, part in self.parts.items():
            parameters, flops = part.left(module, widths, units)
            for cost in (total, *(blocks[name] for name in part.blocks)):
                cost.parameters -= part.parameters - parameters
                cost.flops -= part.flops - flops
        return ExportedCost(total.parameters, total.flops, blocks)


@dataclass
class Part:
    """A module that changes: what it costs, and the compactors that cut its rows or columns, or take it away."""

    flops: int
    parameters: int
    cuts: dict[str, str] = field(default_factory=dict)
    bias: bool = False
    blocks: list[str] = field(default_factory=list)

    def left(self, module: Any, widths: dict[str, int], units: dict[str, int]) -> tuple[int, int]:
        """Return the parameters and FLOPs that are left with so many rows."""
        if "gone" in self.cuts:
            return 0, 0
        rows, columns = (
            (widths[self.cuts[cut]], units[self.cuts[cut]]) if cut in self.cuts else (1, 1)
            for cut in ("rows", "columns")
        )
        if not isinstance(module, nn.Conv2d | nn.Linear):
            return self.parameters * rows[0] // rows[1], self.flops * rows[0] // rows[1]
        whole, left = rows[1] * columns[1], rows[0] * columns[0]
        biases = len(module.weight) * rows[0] // rows[1] if self.bias or module.bias is not None else 0
        return module.weight.numel() // whole * left + biases, self.flops // whole * left


def parameter_count(module: nn.Module) -> int:
    """Return how many numbers a module learns."""
    return sum(parameter.numel() for parameter in module.parameters())
