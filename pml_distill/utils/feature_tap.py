from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch


class FeatureTap:
    """Take the outputs of named modules out of a network while it runs.

    Inside of ``with``, each forward pass of the network refreshes ``features``; leaving it removes the hooks, also
    after an error. A module that runs several times in one pass yields its last output. Outputs are copied, so that a
    next module that works in place, such as ``ReLU(inplace=True)``, does not change them.

    Args:
        network: the network; inside of ``DistributedDataParallel`` or ``torch.compile`` the modules are named as
            without. Enter before the first forward pass of a compiled network: later hooks are ignored.
        names: names as in ``network.named_modules()``, for example ``["layer1", "layer3.0.conv2"]``.

    Raises:
        ValueError: the network has no module of that name, or is a ``DataParallel``; while it runs: a module that
            learns has no gradient, under reentrant gradient checkpointing; on reading ``features``: a module has not
            run, or its output is no tensor.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> with FeatureTap(network, ["1"]) as tap:
        ...     outputs = network(torch.zeros(2, 1, 8, 8))
        >>> [feature.shape for feature in tap.features]
        [torch.Size([2, 4, 6, 6])]
    """

    def __init__(self, network: torch.nn.Module, names: Sequence[str]):
        if isinstance(network, torch.nn.DataParallel):
            raise ValueError("network is a DataParallel, which runs copies; use DistributedDataParallel or none.")
        inside: Any = network
        while inside is not None:
            network = inside
            parallel = isinstance(network, torch.nn.parallel.DistributedDataParallel)
            inside = network.module if parallel else getattr(network, "_orig_mod", None)
        modules = dict(network.named_modules())
        unknown = [name for name in names if name not in modules]
        if unknown:
            near = {name: get_close_matches(name, modules, n=5, cutoff=0.5) for name in unknown}
            top = [name for name, _ in network.named_children()]
            hints = "; ".join(f"{name!r} (near: {', '.join(found or top)})" for name, found in near.items())
            raise ValueError(f"{type(network).__name__} has no modules of these names: {hints}.")
        self.network, self.learns = network, False
        self.names = list(names)
        self.modules = {name: modules[name] for name in names}
        self.outputs: dict[str, torch.Tensor] = {}
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def features(self) -> list[torch.Tensor]:
        """The outputs of the latest pass, in the order of ``names``."""
        missing = [name for name in self.modules if name not in self.outputs]
        if missing:
            raise ValueError(
                f"The modules {missing} have not run; run the network inside of `with FeatureTap(...)`, and one under "
                "torch.compile from its first pass on."
            )
        for name, output in self.outputs.items():
            if not isinstance(output, torch.Tensor):
                raise ValueError(f"The output of {name!r} is a {type(output).__name__}, not a tensor.")
        return [self.outputs[name] for name in self.names]

    def __enter__(self) -> "FeatureTap":
        self.outputs, self.learns = {}, False
        self.hooks.append(self.network.register_forward_pre_hook(self.begin, with_kwargs=True))
        for name, module in self.modules.items():
            self.hooks.append(module.register_forward_hook(partial(self.keep, name)))
        return self

    def begin(self, network: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        """Remember whether this pass is to be learned from; the input of a network checkpointed as a whole tells."""
        self.learns = torch.is_grad_enabled() or needs_gradient((*args, *kwargs.values()))

    def keep(self, name: str, module: torch.nn.Module, args: tuple, output: Any) -> None:
        """Remember an output; returning nothing leaves it as it is."""
        if self.learns and not torch.is_grad_enabled() and needs_gradient((*self.parameters_of(name), *args)):
            raise ValueError(
                f"{name!r} runs without gradients in a pass that has them, as under reentrant gradient checkpointing; "
                "its output would teach nothing. Use checkpoint(..., use_reentrant=False), or tap a module outside it."
            )
        self.outputs[name] = output.clone() if isinstance(output, torch.Tensor) else output

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def parameters_of(self, name: str) -> list[torch.nn.Parameter]:
        """Return the parameters of a module, or of the nearest one around it that has any."""
        found: list[torch.nn.Parameter] = []
        while not found and name:
            found = list(self.network.get_submodule(name).parameters())
            name = name.rpartition(".")[0]
        return found or list(self.network.parameters())


def needs_gradient(values: tuple) -> bool:
    """Whether a gradient is wanted for one of them."""
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)
