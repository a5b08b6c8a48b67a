import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


class Pass(NamedTuple):
    """One forward pass: what went in, and the pooled outputs of the modules by name."""

    images: torch.Tensor
    features: dict[str, torch.Tensor]


class PassTap:
    """Keeps, pass by pass, what goes into a network and the spatial means of what comes out of some of its modules.

    A pass is one call of ``entry``, if it is ``wanted``; what runs outside of one, as in activation checkpointing, is
    not heard. A pass is kept as long as it is ``still_wanted`` when the next begins, until ``take``.
    """

    def __init__(
        self,
        entry: nn.Module,
        modules: dict[str, nn.Module],
        last: dict[str, bool],
        wanted: Callable[[], bool],
        still_wanted: Callable[[Pass], bool] = lambda _: True,
    ):
        self.passes: list[Pass] = []
        self.current: Pass | None = None

        def start(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            # A copy of the network, such as a moving average of it, has its hooks too.
            if module is entry:
                self.passes = [done for done in self.passes if still_wanted(done)]
                self.current = Pass((*args, *kwargs.values())[0], {}) if wanted() else None

        def collect(name: str, output: torch.Tensor) -> None:
            if self.current is None:
                return
            if name in self.current.features:
                raise ValueError(f"{name} runs more than once in a pass: resetting needs blocks that run once.")
            dtype = torch.promote_types(output.dtype, torch.float32)
            places = tuple(range(1, output.ndim - 1)) if last[name] else tuple(range(2, output.ndim))
            mean = output.detach().mean(dim=places, dtype=dtype) if places else output.detach().to(dtype)
            self.current.features[name] = mean

        def finish(*_: Any) -> None:
            if self.current is not None:
                self.passes.append(self.current)
            self.current = None

        self.listening: list[Any] = [module for module in modules.values() if hasattr(module, "listener")]
        self.handles = [entry.register_forward_pre_hook(start, with_kwargs=True), entry.register_forward_hook(finish)]
        for name, module in modules.items():
            hear = functools.partial(collect, name)
            if hasattr(module, "listener"):
                setattr(module, "listener", hear)  # noqa: B010
            else:
                self.handles.append(module.register_forward_hook(lambda _m, _i, output, hear=hear: hear(output)))

    def close(self) -> None:
        """Hear nothing more."""
        for handle in self.handles:
            handle.remove()
        for module in self.listening:
            module.listener = None

    def take(self) -> list[Pass]:
        """Return the passes and forget them."""
        passes, self.passes = self.passes, []
        return passes
