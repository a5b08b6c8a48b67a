"""The graph of a network's forward pass, part by part where the whole cannot be traced."""

import copy
import inspect
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from ..utils.modules import eval_mode


class Tracer(fx.Tracer):
    """Records modules without children as they are, and those that resist tracing as closed boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.closed: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules of torch, normalisations, and what has no modules inside."""
        batch_norm = isinstance(m, nn.modules.batchnorm._BatchNorm)
        return batch_norm or super().is_leaf_module(m, module_qualified_name) or not any(m.children())

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Trace into a module without its hooks, or take it as a closed box."""
        name = self.path_of_module(m)
        if not self.is_leaf_module(m, name):
            before = len(self.graph.nodes)
            try:
                return m.forward(*args, **kwargs)
            except Exception:
                for node in list(self.graph.nodes)[before:][::-1]:
                    self.graph.erase_node(node)
                self.closed.append(m)
        return self.create_proxy("call_module", name, args, kwargs)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Give each module its attributes back afterwards: some keep what they were called with."""
    saved = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in saved:
            vars(module).clear()
            vars(module).update(attributes)


def trace(model: nn.Module) -> list[tuple[nn.Module, fx.Graph]]:
    """Return the graph of the network, and those of the parts that it holds as closed boxes."""
    tracer = Tracer()
    parameters = inspect.signature(type(model).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    try:
        with eval_mode(model), unchanged(model):
            graphs = [(model, tracer.trace(model, defaults))]
        parts = tracer.closed
    except Exception:
        graphs, parts = [], [child for child in model.children() if any(child.children())]
    return graphs + [found for part in parts for found in trace(part)]


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """Return a copy without forward hooks: they serve the network they were put on, and may hold much more."""
    memo = {} if memo is None else memo
    for module in model.modules():
        for name, hooks in vars(module).items():
            if name.startswith(("_forward_hooks", "_forward_pre_hooks")):
                memo[id(hooks)] = OrderedDict()
    return copy.deepcopy(model, memo)


def shrunk(module: nn.Module, index: torch.Tensor, width: int, memo: dict[int, Any] | None = None) -> Any:
    """Return a copy, without hooks, of a module that treats each channel alone, with some of its ``width`` channels."""
    small = copied(module, memo)
    for part in small.modules():
        stores: Any = (part._parameters, part._buffers)
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.ndim and len(tensor) == width:
                    few = tensor.detach()[index].clone()
                    keep = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(few, tensor.requires_grad) if keep else few
        for name in ("num_features", "num_parameters", "channels"):
            if getattr(part, name, None) == width:
                setattr(part, name, len(index))
    return small


def is_batch_norm(module: Any) -> bool:
    """Return whether a module is a scale and a shift per channel in eval mode; subclasses may be more than that."""
    misc = sys.modules.get("torchvision.ops.misc")
    frozen = misc is not None and type(module) is misc.FrozenBatchNorm2d
    known = frozen or type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or is_norm_act(module)
    return known and module.running_mean is not None


def is_norm_act(module: Any) -> bool:
    """Return whether a module is timm's batch norm with an activation inside."""
    timm = sys.modules.get("timm.layers")
    return timm is not None and type(module) in (timm.BatchNormAct2d, timm.SyncBatchNormAct)


def is_global_response_norm(module: Any) -> bool:
    """Return whether a module is the global response normalisation of ConvNeXt V2."""
    timm = sys.modules.get("timm.layers.grn")
    return timm is not None and type(module) is timm.GlobalResponseNorm
