import gc
import sys
from typing import Any

import torch
from torch import nn

from .chain import Chain, find_chains
from .group_lasso import row_lengths
from .tracing import is_norm_act
from .walk import Refused


class Shrinking(nn.Module):
    """What both kinds of compactors share."""

    weight: Any
    chain: Any = None
    # Not a hook: those that come after torch.compile are not heard.
    listener: Any = None

    def heard(self, out: torch.Tensor) -> torch.Tensor:
        """Let who listens hear an output, and return it."""
        if self.listener is not None:
            self.listener(out)
        return out

    def row_norms(self) -> torch.Tensor:
        """Return the length of each row: how much each output channel, or group of them, still carries."""
        return row_lengths(self.weight)


class Compactor(Shrinking, nn.Conv2d):
    r"""A 1x1 convolution without bias, the identity at first, whose rows can be taught to vanish.

    It stands behind a normalisation, :math:`y = W \, \mathrm{norm}(\mathrm{conv}(x))`, of shape (B, C, H, W), so that
    in the end all are one convolution with as many channels as :math:`W` has rows that are not zero. Source: Ding et
    al., "ResRep" (ICCV 2021); Xie et al., "Towards a Smaller Student" (CVPR 2023).

    Example:
        >>> Compactor(3).row_norms().tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__(channels, channels, 1, bias=False, device=device, dtype=dtype)
        with torch.no_grad():
            self.weight.copy_(self.identity())

    def identity(self) -> torch.Tensor:
        """Return the weight that changes nothing."""
        return torch.eye(len(self.weight)).view(self.weight.shape).to(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix the channels."""
        return self.heard(super().forward(x))


class ChannelGate(Shrinking):
    """A diagonal compactor: one factor for each of ``units`` channels, or groups of ``group`` channels, 1 at first.

    It stands where channels cannot be mixed, as behind grouped convolutions, or where that is too dear, as in an MLP;
    ``last`` says whether channels are the last dimension of the input, or the second.
    """

    def __init__(
        self,
        units: int,
        group: int = 1,
        last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(units, 1, device=device, dtype=dtype))
        self.group, self.last = group, last

    def identity(self) -> torch.Tensor:
        """Return the weight that changes nothing."""
        return torch.ones_like(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply each channel with its factor."""
        factors = self.weight.expand(-1, self.group).reshape(-1)
        return self.heard(x * (factors if self.last else factors.view(-1, 1, 1)))


class Compacted(nn.Sequential):
    """A module and the compactor behind it. A state without compactors is loaded as if they were the identity."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        plain = [key for key in state_dict if key.startswith(prefix)]
        if plain and not any(key.startswith((f"{prefix}0.", f"{prefix}1.")) for key in plain):
            for key in plain:
                state_dict[f"{prefix}0.{key.removeprefix(prefix)}"] = state_dict.pop(key)
            compactor: Any = self[1]
            state_dict[f"{prefix}1.weight"] = compactor.identity()
        super()._load_from_state_dict(state_dict, prefix, *args)


def fill_in(norm: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Do the same for a compactor inside of a normalisation with activation."""
    if f"{prefix}weight" in state:
        state.setdefault(f"{prefix}drop.1.weight", norm.drop[1].identity())


def insert_compactors(model: nn.Module, positions: str = "inner") -> dict[str, Compactor | ChannelGate]:
    """Put a compactor where a hidden width of a network can shrink, in place.

    Hidden is a width whose channels are treated one by one until other layers read them, and that no shortcut adds to:
    inside of residual blocks, inverted residuals, MLPs, dense and plain networks; ``torch.fx`` finds them. Behind a
    batch norm of an ungrouped convolution stands a ``Compactor``, elsewhere a ``ChannelGate``. The outputs stay what
    they were, plain weights can be loaded before or after; make optimizer, moving averages and wrappers afterwards.

    Args:
        model: the network; nothing is changed when an error is raised.
        positions: "inner": of consecutive layers in a bottleneck the 3x3 convolution's, as in Xie et al. (2023).
            "all": also that of the 1x1 convolution before it.

    Returns:
        The compactors in the network's order, under the name of the module before each, such as ``"layer2.0.bn2"``.

    Raises:
        ValueError: for what is no network, is wrapped, or has compactors or no hidden width, with the reasons.

    Example:
        >>> from pml_distill.models import SmallResNet
        >>> list(insert_compactors(SmallResNet(width=8)))[:2]
        ['layer1.0.bn1', 'layer1.1.bn1']
    """
    if positions not in ("inner", "all"):
        raise ValueError(f'positions must be "inner" or "all", but is {positions!r}.')
    if existing := find_compactors(model):
        raise ValueError(f"cannot put a compactor behind {next(iter(existing))}: there is one already.")
    refuse_wrappers(model)
    reasons: dict[str, str] = {}
    try:
        chains = find_chains(model, reasons, positions)
    except Refused as reason:
        raise ValueError(f"cannot put a compactor behind {reason}.") from None
    if not chains:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:5])
        raise ValueError(
            f"{type(model).__name__} has no block to put compactors in, since no hidden width can shrink ({listed}). "
            "Give a block of your own to register_block."
        )
    for chain in chains:
        put_compactor(model, chain)
    return find_compactors(model)


def put_compactor(model: nn.Module, chain: Chain) -> None:
    """Put a compactor behind the place of a chain, wherever the network holds it."""
    weight = chain.producer.weight
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    group = chain.width // chain.units
    compactor = (
        Compactor(chain.units, **options) if chain.full else ChannelGate(chain.units, group, chain.last, **options)
    )
    compactor.chain = chain
    place, parents = chain.place, list(model.modules())
    if is_norm_act(place):
        place, parents = place.drop, [place]
        chain.place.register_load_state_dict_pre_hook(fill_in)
    both = Compacted(place, compactor).train(chain.place.training)
    for parent in parents:
        for name, child in parent._modules.items():
            if child is place:
                parent._modules[name] = both


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def find_compactors(model: nn.Module) -> dict[str, Any]:
    """Return the compactors of a network as ``insert_compactors`` did, or an empty dictionary."""
    return {
        name.removesuffix(".1"): module
        for name, module in check_model(model).named_modules()
        if isinstance(module, Compactor | ChannelGate) and module.chain is not None
    }


def check_model(model: Any) -> nn.Module:
    """Return the network, out of its wrapper or moving average, or raise ValueError for what is none."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a network, but is a {type(model).__name__}.")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    inside = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
    return check_model(inside) if isinstance(inside, nn.Module) else model


def refuse_wrappers(model: nn.Module) -> None:
    """Raise ValueError for a wrapper, or a network that one holds whose gradients it would no longer average."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, parallel) or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"model must be the network itself, but is in a {type(model).__name__}: insert compactors before wrapping."
        )
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(m, getattr(fsdp, "FSDPModule", ())) for m in model.modules()):
        raise ValueError("model is sharded by fully_shard: insert compactors before.")
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    own = {id(parameter) for parameter in model.parameters()}
    for wrapper in gc.get_objects():
        if issubclass(type(wrapper), nn.parallel.DistributedDataParallel) and hasattr(wrapper, "module"):
            if any(id(parameter) in own for parameter in wrapper.module.parameters()):
                raise ValueError(
                    "model is in a DistributedDataParallel, which would not average the gradients of compactors: "
                    "insert them before wrapping."
                )
