"""Hidden widths of a network: from the layer that makes the channels to the layers that read them."""

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..utils.modules import eval_mode
from .tracing import is_batch_norm, is_global_response_norm, is_norm_act, trace
from .walk import Net, Refused, Walk, name_of, reads_shape, spread


@dataclass(eq=False)
class Chain:
    """A hidden width: what makes its channels, what treats each alone, and what reads them."""

    block: nn.Module  # the smallest module around it
    producer: Any  # the convolution or linear layer whose outputs shrink
    place: Any  # the module before the compactor: its normalisation, a grouped convolution, or the producer
    carriers: dict[Any, int]  # the modules between that hold something for each channel, with their widths
    companions: list[Any]  # layers whose outputs are multiplied with the channels, as in squeeze-and-excitation
    consumers: list[Any]  # the layers whose inputs shrink
    units: int  # how many rows the compactor has: channels, or groups of them
    width: int  # of the place
    last: bool  # whether channels are the last dimension of the place's output, or the second
    full: bool  # whether the compactor may mix channels
    steps: list[tuple[Any, tuple[int, ...]]]  # functions behind the compactor, and the values that each reads
    read: dict[Any, int]  # which values the consumers read
    inner: bool = True  # whether it is one of positions="inner"

    def modules(self) -> list[Any]:
        """Return all that changes with the width."""
        return [self.producer, *self.carriers, *self.companions, *self.consumers]

    def channels(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        """Return which channels of a layer of this width belong to some rows."""
        return spread(rows, width // self.units)

    @torch.no_grad()
    def constants(self) -> dict[Any, torch.Tensor]:
        """Return what consumers read of channels that are zero behind the compactor, where that is not zero.

        Raises ``Refused`` if that is no constant, or the consumer's bias cannot make up for it.
        """
        weight, culprit = self.producer.weight, ""
        values = [weight.new_zeros((1, 16, 17, self.width) if self.last else (1, self.width, 16, 17))]
        for function, numbers in self.steps:
            given = [values[number] for number in numbers]
            lifted = any(value.any() for value in given)
            if function is operator.mul and not all(value.any() for value in given):
                values.append(torch.zeros_like(given[0]))
                continue
            if lifted and (function is operator.mul and len(given) == 1 or is_global_response_norm(function)):
                raise Refused(f"{culprit} stands before a product, and does not keep zeros zero")
            values.append(run(function, given))
            if values[-1].any() and not lifted:
                culprit = type(function).__name__
        found = {}
        for consumer, number in self.read.items():
            if not values[number].any():
                continue
            linear = isinstance(consumer, nn.Linear)
            value = values[number].flatten(0, -2) if linear else values[number].transpose(0, 1).flatten(1).t()
            padded = consumer.bias is None or not linear and any(consumer.padding)
            if padded or not torch.equal(value, value[:1].expand_as(value)):
                raise Refused(f"{culprit} stands before a layer and does not keep zeros zero: no bias makes up for it")
            found[consumer] = value[0].repeat_interleave(consumer.weight.shape[1] // value.shape[1])
        return found


def run(function: Any, given: list[torch.Tensor]) -> torch.Tensor:
    """Run a step in eval mode, on fewer dimensions if it takes no images."""
    with eval_mode(function if isinstance(function, nn.Module) else nn.Identity()):
        try:
            return function(*given)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return function(*(value.flatten(1, 2) for value in given))


# Class of a block: (the chains of "inner", the chains of "all"), see register_block.
REGISTERED: dict[type[nn.Module], tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]] = {}


def find_chains(model: nn.Module, reasons: dict[str, str] | None = None, positions: str = "all") -> list[Chain]:
    """Return the chains of a network in the order of its modules; ``reasons`` is told why other layers have none."""
    names = {module: name for name, module in model.named_modules()}
    owners: dict[int, list[nn.Module]] = {}
    for module in names:
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(module)
    owners.pop(id(None), None)
    shared = {module for modules in owners.values() if len(modules) > 1 for module in modules}
    inside = {part for block in names if type(block) in REGISTERED for part in block.modules()}
    found: dict[Any, Chain] = {}
    taken = set(inside)
    for root, graph in trace(model):
        net = Net(root, graph, names, shared)
        taken |= stem_of(net, model)
        for producer in net.calls:
            plain = type(producer) is nn.Conv2d and producer.groups == 1 or type(producer) is nn.Linear
            if not plain or "weight" not in producer._parameters or producer in taken:
                continue
            try:
                chain = chain_of(Walk(net, producer), model)
            except Refused as reason:
                if reasons is not None:
                    reasons[names[producer]] = str(reason)
                continue
            if not inside.intersection(chain.modules()) and not squeezes(net, chain):
                found[producer] = chain
                taken.update([producer, *chain.companions])
    for chain in found.values():
        wide = [type(c) is nn.Conv2d and c.kernel_size != (1, 1) and c in found for c in chain.consumers]
        chain.inner = not (chain.full and chain.producer.kernel_size == (1, 1) and all(wide))
    chains = [chain for chain in found.values() if chain.inner or positions == "all"]
    order = {module: number for number, module in enumerate(names)}
    return sorted(chains + registered_chains(model, names, shared, positions), key=lambda chain: order[chain.place])


def registered_chains(model: nn.Module, names: dict[Any, str], shared: set[nn.Module], positions: str) -> list[Chain]:
    """Return the chains of the blocks given to ``register_block``."""
    chains, missing = [], {}
    for block, block_name in names.items():
        for path in REGISTERED.get(type(block), ((), ()))[positions == "all"]:
            parts = dict(block.named_modules())
            place = f"{block_name}.{path[1]}".removeprefix(".")
            if lacking := [name for name in path if name not in parts]:
                missing[path] = Refused(f"{place}: {type(block).__name__} has no attribute {lacking[0]!r}")
                continue
            graph = fx.Graph()
            node = graph.placeholder("x")
            for name in path:
                node = graph.call_module(name, (node,))
            graph.output(node)
            try:
                chains.append(chain_of(Walk(Net(block, graph, names, shared), parts[path[0]]), model))
            except Refused as reason:
                raise Refused(f"{place}: {reason}") from None
    if missing and not chains:
        raise next(iter(missing.values()))
    return chains


def stem_of(net: Net, model: nn.Module) -> set[nn.Module]:
    """Return, in a network with shortcuts, the layer that alone reads the image, and those in one sequence with it."""
    nodes = list(net.graph.nodes)
    if net.root is not model or not any(name_of(node).lstrip("i") == "add" for node in nodes):
        return set()
    readers = [user for node in nodes if node.op == "placeholder" for user in node.users if not reads_shape(user)]
    stem = {net.module(node) for node in readers} - {None} if len(readers) == 1 else set()
    return stem.union(*(s for s in model.modules() if type(s) is nn.Sequential and stem & set(s)))


def register_block(
    block_type: type[nn.Module], inner: Sequence[Sequence[str]], all_positions: Sequence[Sequence[str]] | None = None
) -> None:
    """Tell ``insert_compactors`` which widths of your block can shrink, where it cannot find them itself.

    A chain is a complete sequence of dotted names, ``(layer, ..., next layer)``, in the order of the forward pass.
    Activations called as functions cannot be checked and must keep zeros zero; nothing else may read the first layer's
    output. Blocks of the class that lack a module of a chain have no such chain. ``ValueError`` for anything else.

    Args:
        block_type: the block's class; subclasses have to be registered themselves.
        inner: the chains of ``positions="inner"``.
        all_positions: those of ``positions="all"``, the inner ones among them. Default: the same.

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
        if len(chain) < 2:
            raise ValueError(f"a chain names a layer and the next layer at least, but is {tuple(chain)}.")
    inner_chains = tuple(tuple(chain) for chain in inner)
    all_chains = inner_chains if all_positions is None else tuple(tuple(chain) for chain in all_positions)
    if not set(inner_chains) <= set(all_chains):
        raise ValueError(
            f"all_positions must contain the inner chains, but inner is {inner} and all_positions {all_positions}."
        )
    REGISTERED[block_type] = (inner_chains, all_chains)


def squeezes(net: Net, chain: Chain) -> bool:
    """Whether this is the narrow width inside of a squeeze-and-excitation, which is hardly worth a compactor."""
    for consumer in chain.consumers:
        node: Any = net.calls[consumer][0]
        while node.op != "output" and len(node.users) == 1 and len(node.all_input_nodes) == 1:
            node = next(iter(node.users))
        if name_of(node).lstrip("i") != "mul" or any(is_parameter(other) for other in node.all_input_nodes):
            return False
    return True


def is_parameter(node: fx.Node) -> bool:
    """Whether a node is a parameter of the network, reshaped or not."""
    while node.op != "get_attr" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def chain_of(walk: Walk, model: nn.Module) -> Chain:
    """Choose the place for the compactor, the last one that all channels pass and behind which zeros do no harm."""
    problem = Refused("there is no place that all channels pass")
    net = walk.net
    for node in walk.places[::-1]:
        later = [n for n in (*walk.tags, *walk.reads) if net.order[n] > net.order[node]]
        inputs = {source for n in later for source in n.all_input_nodes if source in walk.tags}
        once = len(net.calls[net.module(node)]) <= len(net.calls[walk.producer])
        if not once or any(net.order[source] < net.order[node] for source in inputs):
            continue
        chain = described(walk, node, model)
        try:
            chain.constants()
            return chain
        except Refused as reason:
            problem = reason
    raise problem


def described(walk: Walk, node: fx.Node, model: nn.Module) -> Chain:
    """Return the chain with its compactor behind a node."""
    net, place, producer = walk.net, walk.net.module(node), walk.producer
    inside = is_norm_act(place)  # the compactor stands before its activation
    steps: list[tuple[Any, tuple[int, ...]]] = [(place.act, (0,))] if inside else []
    values = {node: len(steps)}
    for later, (function, inputs) in walk.functions.items():
        if net.order[later] > net.order[node] and all(source in values for source in inputs):
            steps.append((function, tuple(values[source] for source in inputs)))
            values[later] = len(steps)
    direct = is_batch_norm(place) and not inside and node.args[0] in net.calls[producer]
    width, last = walk.tags[node]
    paths: Any = [net.names[m].split(".")[:-1] for m in (producer, place, *walk.consumers)]
    return Chain(
        block=model.get_submodule(".".join(os.path.commonprefix(paths))),
        producer=producer,
        place=place,
        carriers=walk.carriers,
        companions=list(walk.companions),
        consumers=list(walk.consumers),
        units=walk.units,
        width=width,
        last=last,
        full=type(producer) is nn.Conv2d and direct and walk.units == width,
        steps=steps,
        read={module: values[reader.args[0]] for reader, module in walk.reads.items() if reader.args[0] in values},
    )
