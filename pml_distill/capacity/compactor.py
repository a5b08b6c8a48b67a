import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..utils.modules import eval_mode

BASIC = (("conv1", "bn1", "relu", "conv2"),)
BOTTLENECK = (("conv1", "bn1", "relu", "conv2"), ("conv2", "bn2", "relu", "conv3"))
TIMM_BASIC = (("conv1", "bn1", "drop_block", "act1", "aa", "conv2"),)
TIMM_BOTTLENECK = (("conv1", "bn1", "act1", "conv2"), ("conv2", "bn2", "drop_block", "act2", "aa", "conv3"))

# (module, class): (the chains of "inner", the chains of "all"). By name, so that nothing is imported for it: a
# network of a library that has not been imported does not exist.
KNOWN = {
    ("torchvision.models.resnet", "BasicBlock"): (BASIC, BASIC),
    ("torchvision.models.resnet", "Bottleneck"): (BOTTLENECK[1:], BOTTLENECK),
    ("timm.models.resnet", "BasicBlock"): (TIMM_BASIC, TIMM_BASIC),
    ("timm.models.resnet", "Bottleneck"): (TIMM_BOTTLENECK[1:], TIMM_BOTTLENECK),
    ("pml_distill.models.small_resnet", "BasicBlock"): ((("conv1", "bn1", "conv2"),),) * 2,
}
REGISTERED: dict[type[nn.Module], tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]] = {}


class Compactor(nn.Conv2d):
    r"""A 1x1 convolution without bias, the identity at first, whose rows can be taught to vanish.

    It stands behind a normalisation, :math:`y = W \, \mathrm{norm}(\mathrm{conv}(x))`, and is linear, so that
    convolution, normalisation and compactor are one convolution in the end, with as many channels as
    :math:`W` has rows that are not zero. Source: Xie et al., "Towards a Smaller Student: Capacity Dynamic
    Distillation for Efficient Image Retrieval" (CVPR 2023); the compactor itself is that of Ding et al., "ResRep"
    (ICCV 2021).

    Args:
        channels: C, as many in as out.

    Shapes:
        input and output: (B, C, H, W).

    Example:
        >>> compactor = Compactor(3)
        >>> compactor.row_norms().tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__(channels, channels, 1, bias=False, device=device, dtype=dtype)
        with torch.no_grad():
            self.weight.copy_(torch.eye(channels).view(channels, channels, 1, 1))

    def row_norms(self) -> torch.Tensor:
        """Return the length of each row, (C,): how much each output channel still carries."""
        return self.weight.flatten(1).norm(dim=1)


@dataclass(frozen=True)
class Chain:
    """A convolution, its normalisation and the next convolution of a block that only they connect."""

    block_name: str
    block: nn.Module
    path: tuple[str, ...]

    def name_of(self, part: str) -> str:
        """Return the dotted name in the network of a part of the block."""
        return f"{self.block_name}.{part}" if self.block_name else part

    @property
    def name(self) -> str:
        """The dotted name of the normalisation in the network."""
        return self.name_of(self.path[1])

    def part(self, place: int) -> Any:
        """Return the module at a place of the path, None where the block has no such module."""
        try:
            return self.block.get_submodule(self.path[place])
        except AttributeError:
            return None

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution whose output shrinks."""
        return self.part(0)

    @property
    def norm(self) -> nn.Module:
        """The normalisation, or normalisation and compactor."""
        return self.part(1)

    @property
    def following(self) -> nn.Conv2d:
        """The convolution whose input shrinks."""
        return self.part(-1)

    @property
    def compactor(self) -> Compactor | None:
        """The compactor, once it is in."""
        norm = self.part(1)
        last = norm[-1] if isinstance(norm, nn.Sequential) and len(norm) > 0 else None
        return last if isinstance(last, Compactor) else None


def register_block(
    block_type: type[nn.Module],
    inner: Sequence[Sequence[str]],
    all_positions: Sequence[Sequence[str]] | None = None,
) -> None:
    """Let ``insert_compactors`` know a block of your own.

    A chain is a sequence of names of modules of the block, ``(convolution, normalisation, ..., next convolution)``,
    dotted where they lie deeper (``"body.0"``), in the order of the forward pass and complete: modules between
    normalisation and next convolution are checked to treat each channel alone and to keep zeros zero; activations
    called as functions cannot be checked and must do the same. Nothing else may read the first convolution's output.

    Args:
        block_type: the block's class; subclasses have to be registered themselves.
        inner: the chains of ``positions="inner"``.
        all_positions: those of ``positions="all"``, in forward order, the inner ones among them. Default: the same.

    Raises:
        ValueError: ``block_type`` is no class of modules; ``inner`` is empty or has chains that ``all_positions``
            lacks; a chain is a string or shorter than three names.

    Example:
        >>> from torch import nn
        >>> class Block(nn.Module): ...
        >>> register_block(Block, inner=[("reduce", "norm1", "act", "expand")])
    """
    if not (isinstance(block_type, type) and issubclass(block_type, nn.Module)):
        raise ValueError(f"block_type must be a class of modules, but is {block_type!r}.")
    if not inner:
        raise ValueError("inner must name at least one chain, but is empty.")
    for chain in (*inner, *(all_positions or ())):
        if isinstance(chain, str):
            raise ValueError(f"a chain is a sequence of names, such as ({chain!r}, ...), but is {chain!r} itself.")
    inner_chains = tuple(tuple(chain) for chain in inner)
    all_chains = inner_chains if all_positions is None else tuple(tuple(chain) for chain in all_positions)
    for chain in all_chains + inner_chains:
        if len(chain) < 3:
            raise ValueError(
                f"a chain names a convolution, its normalisation and the next convolution at least, but is {chain}."
            )
    if not set(inner_chains) <= set(all_chains):
        raise ValueError(
            f"all_positions must contain the inner chains, but inner is {inner} and all_positions {all_positions}."
        )
    REGISTERED[block_type] = (inner_chains, all_chains)


def insert_compactors(model: nn.Module, positions: str = "inner") -> dict[str, Compactor]:
    """Put a compactor behind normalisations inside of the residual blocks of a network, in place.

    The normalisation is replaced, at its own name, by ``nn.Sequential(normalisation, compactor)``; the outputs stay
    what they were. Load pretrained weights before, since the names in the state dictionary change, and make the
    optimizer afterwards, since the compactors are new parameters.

    Recognised are the BasicBlock and Bottleneck of torchvision and timm (Wide-ResNet and SE-ResNet among them), the
    block of ``pml_distill.models``, and those given to ``register_block``. The widths of stem, shortcuts and block
    outputs are left alone.

    Args:
        model: the network; nothing is changed when an error is raised.
        positions: "inner": behind the normalisation of a bottleneck's 3x3 convolution, or of a basic block's first,
            as in Xie et al. (2023). "all": also behind that of a bottleneck's first 1x1 convolution.

    Returns:
        The compactors in the order of the forward pass, each under the dotted name of its normalisation, such as
        ``"layer2.0.bn2"``; in a teacher of the same family the normalisation itself has that name.

    Raises:
        ValueError: for a model that is no network, or one without a known block or with compactors already, and for
            blocks that cannot be compacted, with the reason.

    Example:
        >>> from pml_distill.models import SmallResNet
        >>> compactors = insert_compactors(SmallResNet(width=8))
        >>> list(compactors)[:2], len(compactors)
        (['layer1.0.bn1', 'layer1.1.bn1'], 6)
    """
    if positions not in ("inner", "all"):
        raise ValueError(f'positions must be "inner" or "all", but is {positions!r}.')
    chains = find_chains(model, positions)
    if not chains:
        raise ValueError(
            f"{type(model).__name__} has no block to put compactors in: expected the BasicBlock or Bottleneck of "
            "torchvision or timm, that of pml_distill.models, or a block given to register_block."
        )
    for chain in chains:
        check_chain(chain)
    compactors = {}
    for chain in chains:
        norm, weight = chain.norm, chain.conv.weight
        compactor = Compactor(chain.conv.out_channels, device=weight.device, dtype=weight.dtype)
        replace_module(chain.block, chain.path[1], nn.Sequential(norm, compactor).train(norm.training))
        compactors[chain.name] = compactor
    return compactors


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def find_compactors(model: nn.Module) -> dict[str, Compactor]:
    """Return the compactors of a network as ``insert_compactors`` did, or an empty dictionary."""
    return {chain.name: chain.compactor for chain in compacted_chains(model)}


def compacted_chains(model: nn.Module) -> list[Any]:
    """Return the chains with a compactor in the order of the forward pass."""
    return [chain for chain in find_chains(model, "all") if chain.compactor is not None]


def find_chains(model: nn.Module, positions: str) -> list[Chain]:
    """Return the chains of the known blocks in the order of the forward pass."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a network, but is a {type(model).__name__}.")
    known = dict(REGISTERED)
    for (module, name), chains in KNOWN.items():
        if module in sys.modules:
            known[getattr(sys.modules[module], name)] = chains
    return [
        Chain(name, block, path)
        for name, block in model.named_modules()
        for path in known.get(type(block), ((), ()))[positions == "all"]
    ]


def check_chain(chain: Chain) -> None:
    """Raise ValueError with the reason for a chain that could not be merged."""

    def refuse(reason: str) -> None:
        raise ValueError(f"cannot put a compactor behind {chain.name}: {reason}.")

    if chain.compactor is not None:
        refuse("there is one already")
    for place, name in enumerate(chain.path):
        if chain.part(place) is None:
            refuse(f"{type(chain.block).__name__} has no attribute {name!r}")
    for place in (0, -1):
        name, conv = chain.path[place], chain.part(place)
        if type(conv) is not nn.Conv2d:
            refuse(f"{name} is {type(conv).__name__}, expected nn.Conv2d itself")
        if conv.groups != 1:
            refuse(
                f"{name} has {conv.groups} groups, as in ResNeXt, and a compactor mixes the channels of all groups, so "
                "that they cannot be merged; expected groups=1"
            )
    if not is_batch_norm(chain.norm):
        refuse(
            f"{type(chain.norm).__name__} cannot be merged into a convolution; expected nn.BatchNorm2d with running "
            "statistics, nn.SyncBatchNorm or torchvision's FrozenBatchNorm2d"
        )
    problem = mixing(chain)
    if problem:
        refuse(problem)


def mixing(chain: Chain) -> str:
    """Return what keeps channels from being dropped between normalisation and next convolution, or an empty string."""
    for place in range(2, len(chain.path) - 1):
        name, module = chain.path[place], chain.part(place)
        if not keeps_channels_apart(module, chain.conv.weight):
            return (
                f"{name} ({type(module).__name__}) stands before the next convolution, and does not work on fewer "
                "channels with the same result, or does not keep zeros zero"
            )
    return ""


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module is a scale and a shift per channel in eval mode; subclasses may be more than that."""
    misc = sys.modules.get("torchvision.ops.misc")
    if misc is not None and type(module) is misc.FrozenBatchNorm2d:
        return True
    return type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) and module.running_mean is not None


@torch.no_grad()
def keeps_channels_apart(module: nn.Module, weight: torch.Tensor) -> bool:
    """Try whether a module in eval mode works on each channel alone and keeps zeros zero."""
    channels = len(weight)
    x = torch.linspace(-2, 2, channels * 64, device=weight.device).view(1, channels, 8, 8).to(weight.dtype)
    try:
        with eval_mode(module):
            whole, half, zero = module(x.clone()), module(x[:, ::2].clone()), module(torch.zeros_like(x))
    except (RuntimeError, ValueError):
        return False
    return torch.equal(whole[:, ::2], half) and not zero.any()
