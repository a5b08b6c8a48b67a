"""Hidden widths of a network: from the layer that makes the channels to the layers that read them."""

import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..utils.modules import eval_mode
from .tracing import shrunk, trace

SHAPES = ("size", "dim", "ndimension", "shape", "ndim", "device", "dtype")
RESHAPES = ("view", "reshape", "getitem", "unsqueeze", "expand_as", "flatten")


class Refused(Exception):
    """Why channels cannot be dropped."""


@dataclass(eq=False)
class Step:
    """What happens between the compactor and the next layers: a function of values made before, by their numbers."""

    function: Callable[..., Any]
    inputs: tuple[int, ...]


@dataclass(eq=False)
class Chain:
    """A hidden width: what makes its channels, what treats each alone, and what reads them.

    Attributes:
        block: the smallest module around it.
        producer: the convolution or linear layer whose outputs shrink.
        place: the module behind which the compactor stands: its normalisation, a grouped convolution, or itself.
        carriers: the modules between that hold something for each channel.
        companions: layers whose outputs are multiplied with the channels, as in squeeze-and-excitation.
        consumers: the layers whose inputs shrink.
        units: how many rows the compactor has: channels, or groups of them.
        width: of the place.
        last: whether channels are the last dimension of the place's output, or the second.
        full: whether the compactor may mix channels.
        inner: whether it is one of ``positions="inner"``.
        steps: from the compactor on.
        read: which values the consumers read.
    """

    block: nn.Module
    producer: Any
    place: Any
    carriers: list[nn.Module]
    companions: list[Any]
    consumers: list[Any]
    units: int
    width: int
    last: bool
    full: bool
    inner: bool = True
    steps: list[Step] = field(default_factory=list)
    read: dict[nn.Module, int] = field(default_factory=dict)

    def modules(self) -> list[Any]:
        """Return all that changes with the width."""
        return [self.producer, *self.carriers, *self.companions, *self.consumers]

    def channels(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        """Return which channels of a layer of this width belong to some rows."""
        per = width // self.units
        return (rows[:, None] * per + torch.arange(per, device=rows.device)).flatten()

    @torch.no_grad()
    def constants(self) -> dict[nn.Module, torch.Tensor | None]:
        """Return what each consumer reads of channels that are zero behind the compactor; None for zeros.

        Raises:
            Refused: that is no constant, or the consumer's bias cannot make up for it.
        """
        weight = self.producer.weight
        shape = (1, 16, 17, self.width) if self.last else (1, self.width, 16, 17)
        values: list[Any] = [torch.zeros(shape, device=weight.device, dtype=weight.dtype)]
        for step in self.steps:
            given = [values[i] for i in step.inputs]
            if step.function is operator.mul:
                dead = any(not value.any() for value in given)
                given = given if len(given) == 2 else given * 2
                values.append(
                    torch.zeros_like(given[0]) if dead else given[0] * given[1] if len(step.inputs) > 1 else None
                )
            else:
                module = step.function
                if is_global_response_norm(module) and given[0].any():
                    raise Refused("channels that are zero are not when they come into the global response norm")
                if isinstance(module, nn.Module):
                    with eval_mode(module):
                        values.append(run(module, given))
                else:
                    values.append(run(module, given))
            if values[-1] is None:
                raise Refused("channels that are zero come out of a product that is not")
        found: dict[nn.Module, torch.Tensor | None] = {}
        for consumer, number in self.read.items():
            found[consumer] = None
            value = values[number]
            if not value.any():
                continue
            linear = isinstance(consumer, nn.Linear)
            if consumer.bias is None or (not linear and any(consumer.padding)):
                raise Refused(
                    "what stands before it does not keep zeros zero, which only a bias without padding levels out"
                )
            flat = value.flatten(0, -2) if linear else value.transpose(0, 1).flatten(1).t()
            if not torch.equal(flat, flat[:1].expand_as(flat)):
                raise Refused("what stands before it turns zeros into what is not constant")
            found[consumer] = flat[0].repeat_interleave(consumer.in_features // flat.shape[1]) if linear else flat[0]
        return found


def run(function: Any, given: list[torch.Tensor]) -> Any:
    """Run a step, on fewer dimensions if it takes no images."""
    try:
        return function(*given)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return function(*(value.flatten(1, 2) for value in given))


class Bound:
    """A function or method of a graph, with all of its arguments but one."""

    def __init__(self, node: fx.Node, source: fx.Node):
        self.target, self.method = node.target, node.op == "call_method"
        self.args = tuple(None if a is source else a for a in node.args)
        self.place = [a is source for a in node.args].index(True)
        self.kwargs = dict(node.kwargs)

    def __call__(self, x: torch.Tensor) -> Any:
        """Call it."""
        args = list(self.args)
        args[self.place] = x
        return getattr(x, self.target)(*args[1:], **self.kwargs) if self.method else self.target(*args, **self.kwargs)


class Flatten:
    """Make images to vectors."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Flatten all but the batch."""
        return x.flatten(1)


@dataclass
class Tag:
    """What a node of the graph knows of the channels: how many, whether they come last, and its number as a value."""

    width: int
    last: bool


class Walk:
    """Follows the channels of one layer through a graph.

    Raises:
        Refused: something reads them that neither treats each alone nor is a layer whose inputs can shrink.
    """

    def __init__(self, net: "Net", producer: Any):
        self.net, self.producer = net, producer
        self.width = producer.out_channels if isinstance(producer, nn.Conv2d) else producer.out_features
        self.units = self.width
        self.tags: dict[fx.Node, Tag] = {}
        self.places: list[fx.Node] = []
        self.carriers: list[nn.Module] = []
        self.companions: list[Any] = []
        self.consumers: list[Any] = []
        self.reads: dict[fx.Node, Any] = {}
        self.functions: dict[fx.Node, tuple[Any, tuple[fx.Node, ...]]] = {}
        for node in net.graph.nodes:
            if node in net.calls.get(producer, ()):
                self.tags[node] = Tag(self.width, isinstance(producer, nn.Linear))
                self.places.append(node)
            elif sources := [source for source in node.all_input_nodes if source in self.tags]:
                self.follow(node, sources)
        if not self.reads:
            raise Refused("nothing reads its output")
        if self.units < 2:
            raise Refused("it has one channel")
        for module in {producer, *self.carriers, *self.companions, *self.consumers}:
            name = net.names[module]
            if module in net.shared:
                raise Refused(f"{name} shares its weights")
            known = {*self.tags, *self.reads, *(node for c in self.companions for node in net.calls[c])}
            if any(call not in known for call in net.calls[module]):
                raise Refused(f"{name} is used elsewhere, too")

    def refuse(self, node: fx.Node, reason: str) -> None:
        """Raise the reason, with the name of what stands there."""
        module = self.net.module(node)
        what = name_of(node) if module is None else f"{self.net.names[module]} ({type(module).__name__})"
        raise Refused(f"{what} {reason}")

    def follow(self, node: fx.Node, sources: list[fx.Node]) -> None:
        """Let one node that reads the channels be a consumer, a carrier or a plain function, or refuse it."""
        module, tag = self.net.module(node), self.tags[sources[0]]
        name = name_of(node)
        if node.op == "output":
            self.refuse(node, "of the network are these channels")
        if reads_shape(node):
            return
        if name in ("mul", "imul", "add", "iadd") and len(node.all_input_nodes) == 2 and module is None:
            self.join(node, sources, name.lstrip("i"))
        elif len(sources) > 1 or node.args[:1] != (sources[0],) and module is not None:
            self.refuse(node, "reads several tensors")
        elif type(module) is nn.Conv2d and module.groups == 1:
            if tag.last or module.in_channels != tag.width:
                self.refuse(node, "reads something else as channels")
            self.read(node, module)
        elif type(module) is nn.Linear:
            if not tag.last or module.in_features % tag.width:
                self.refuse(node, "reads something else as channels")
            self.read(node, module)
        elif type(module) is nn.Conv2d:
            self.units = math.gcd(self.units, module.groups)
            if tag.last or module.in_channels != tag.width or self.units < 2:
                self.refuse(node, "has groups that cut through these channels")
            self.carry(node, module, sources[0], Tag(module.out_channels, False))
            self.places.append(node)
        elif module is None and name in ("view", "reshape") and len(node.args) == 3 and not tag.last:
            self.tags[node] = Tag(tag.width, True)
            self.functions[node] = (Flatten(), (sources[0],))
        elif module is not None:
            if is_global_response_norm(module):
                last = module.channel_dim == -1
                if last != tag.last:
                    self.refuse(node, "reads something else as channels")
            else:
                last = self.probe(node, module, tag)
            self.carry(node, module, sources[0], Tag(tag.width, last))
            if is_batch_norm(module) and module.weight is not None:
                self.places.append(node)
        else:
            if len(node.all_input_nodes) > 1:
                self.refuse(node, "reads several tensors")
            if not node.args or node.args[0] is not sources[0]:
                self.refuse(node, "reads these channels in an unknown way")
            function = Bound(node, sources[0])
            self.tags[node] = Tag(tag.width, self.probe(node, function, tag))
            self.functions[node] = (function, (sources[0],))

    def read(self, node: fx.Node, module: Any) -> None:
        """Note a consumer."""
        self.reads[node] = module
        if module not in self.consumers:
            self.consumers.append(module)

    def carry(self, node: fx.Node, module: nn.Module, source: fx.Node, tag: Tag) -> None:
        """Note a module that the channels go through."""
        self.tags[node] = tag
        self.functions[node] = (module, (source,))
        if module not in self.carriers and next((t for t in module.state_dict().values() if t.ndim), None) is not None:
            self.carriers.append(module)
        elif module not in self.carriers and any(True for _ in module.buffers()):
            self.carriers.append(module)

    def join(self, node: fx.Node, sources: list[fx.Node], name: str) -> None:
        """Let a product or sum of two tensors pass: of these channels alone, or with a factor for each channel."""
        tag = self.tags[sources[0]]
        if len(sources) == 2:
            if self.tags[sources[1]].last != tag.last:
                self.refuse(node, "reads several tensors")
            self.functions[node] = (getattr(operator, name), tuple(sources))
        elif name == "add":
            self.refuse(node, "adds another tensor, as a shortcut does")
        else:
            self.factor(node, next(other for other in node.all_input_nodes if other is not sources[0]), tag.width)
            self.functions[node] = (operator.mul, (sources[0],))
        self.tags[node] = tag

    def factor(self, node: fx.Node, other: fx.Node, width: int) -> None:
        """Find the layer that makes the factor for each channel."""
        path = [other]
        while True:
            current = path[-1]
            if sum(not reads_shape(user) for user in current.users) != 1:
                self.refuse(node, "multiplies with a tensor that is used elsewhere, too")
            module = self.net.module(current)
            if type(module) in (nn.Conv2d, nn.Linear):
                out = module.weight.shape[0]
                if out == 1:
                    return
                if out != width or (type(module) is nn.Conv2d and module.groups != 1):
                    break
                if module not in self.companions:
                    self.companions.append(module)
                return
            name = name_of(current)
            plain = module is not None and not any(True for _ in module.parameters())
            single = module is None and len([a for a in current.args if isinstance(a, fx.Node)]) == 1
            if not (plain or single or name in RESHAPES) or not current.args or width in current.args[1:]:
                break
            path.append(current.args[0])
            if not isinstance(path[-1], fx.Node):
                break
        self.refuse(node, "multiplies with a tensor whose channels cannot be told")

    @torch.no_grad()
    def probe(self, node: fx.Node, function: Any, tag: Tag) -> bool:
        """Try whether a function works on each channel alone; return whether they come last in its output."""
        width, units = tag.width, self.units
        if is_batch_norm(function) and not tag.last and len(function.running_mean) == width:
            return False
        if not isinstance(function, nn.Module) or not {
            **dict(function.named_parameters()),
            **dict(function.named_buffers()),
        }:
            # It cannot know how many channels there are.
            width, units = 6, 6
        kept = torch.arange(0, units, 2)
        per = width // units
        index = (kept[:, None] * per + torch.arange(per)).flatten()
        small: Any = function
        if isinstance(function, nn.Module):
            function = (
                shrunk(function, torch.arange(width, device=self.producer.weight.device), width).double().cpu().eval()
            )
            small = shrunk(function, index, width)
        shapes = [(2, 8, 9, width), (2, 18, width), (3, width)] if tag.last else [(2, width, 8, 9), (1, width, 36, 33)]
        for shape in shapes:
            dim = len(shape) - 1 if tag.last else 1
            x = torch.linspace(-2, 2, math.prod(shape), dtype=torch.float64).view(shape)
            # In another order, so that neighbours differ as channels do.
            x = x.flatten()[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))].view(shape)
            try:
                whole, half = function(x.clone()), small(x.index_select(dim, index))
                differing = [d for d, (a, b) in enumerate(zip(whole.shape, half.shape)) if a != b]
            except Exception:
                continue
            if whole.ndim != half.ndim or len(differing) != 1:
                continue
            new = differing[0]
            per_new = whole.shape[new] // units
            chosen = (kept[:, None] * per_new + torch.arange(per_new)).flatten()
            if whole.shape[new] % units or len(chosen) != half.shape[new] or new not in (1, whole.ndim - 1):
                continue
            if torch.allclose(whole.index_select(new, chosen), half, rtol=1e-9, atol=1e-12):
                return new == whole.ndim - 1
        self.refuse(node, "does not treat each channel alone")
        raise AssertionError


def is_batch_norm(module: Any) -> bool:
    """Return whether a module is a scale and a shift per channel in eval mode; subclasses may be more than that."""
    misc = sys.modules.get("torchvision.ops.misc")
    if misc is not None and type(module) is misc.FrozenBatchNorm2d:
        return True
    known = type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or is_norm_act(module)
    return known and module.running_mean is not None


def is_norm_act(module: Any) -> bool:
    """Return whether a module is timm's batch norm with an activation inside."""
    timm = sys.modules.get("timm.layers")
    return timm is not None and type(module) in (timm.BatchNormAct2d, timm.SyncBatchNormAct)


def is_global_response_norm(module: Any) -> bool:
    """Return whether a module is the global response normalisation of ConvNeXt V2."""
    timm = sys.modules.get("timm.layers.grn")
    return timm is not None and type(module) is timm.GlobalResponseNorm


class Net:
    """One graph, with the modules that it calls."""

    def __init__(self, root: nn.Module, graph: fx.Graph, names: dict[nn.Module, str], shared: set[nn.Module]):
        self.root, self.graph, self.names, self.shared = root, graph, names, set(shared)
        self.order = {node: number for number, node in enumerate(graph.nodes)}
        self.calls: dict[nn.Module, list[fx.Node]] = {}
        for node in graph.nodes:
            module = self.module(node)
            if module is not None:
                self.calls.setdefault(module, []).append(node)
            elif node.op == "get_attr":
                # Its weight is read without a call.
                self.shared.add(root.get_submodule(node.target.rpartition(".")[0]))

    def module(self, node: fx.Node) -> Any:
        """Return the module that a node calls."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None


# Class of a block: (the chains of "inner", the chains of "all"), see register_block.
REGISTERED: dict[type[nn.Module], tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]] = {}


def find_chains(model: nn.Module, reasons: dict[str, str] | None = None, positions: str = "all") -> list[Chain]:
    """Return the chains of a network in the order of its modules.

    Args:
        model: a network without compactors.
        reasons: is told why other layers have no chain.
        positions: "inner" or "all".

    Raises:
        Refused: a registered block has no such chain.
    """
    names = {module: name for name, module in model.named_modules()}
    owners: dict[int, list[nn.Module]] = {}
    for module in names:
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    shared = {module for modules in owners.values() if len(modules) > 1 for module in modules}
    registered = registered_chains(model, names, shared, positions)
    inside = {part for block in names if type(block) in REGISTERED for part in block.modules()}
    found: dict[Any, Chain] = {}
    taken: set[nn.Module] = set(inside)
    for root, graph in trace(model):
        net = Net(root, graph, names, shared)
        stem = stem_of(net, model)
        for producer in net.calls:
            plain = type(producer) is nn.Conv2d and producer.groups == 1 or type(producer) is nn.Linear
            if not plain or "weight" not in producer._parameters or producer in taken or producer in stem:
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
    chains = list(found.values())
    for chain in chains:
        small = type(chain.producer) is nn.Conv2d and chain.producer.kernel_size == (1, 1) and chain.full
        wide = [type(c) is nn.Conv2d and c.kernel_size != (1, 1) and c in found for c in chain.consumers]
        chain.inner = not (small and all(wide))
    order = {module: number for number, module in enumerate(names)}
    chains = [chain for chain in chains if chain.inner or positions == "all"] + registered
    return sorted(chains, key=lambda chain: order[chain.place])


def registered_chains(
    model: nn.Module, names: dict[nn.Module, str], shared: set[nn.Module], positions: str
) -> list[Chain]:
    """Return the chains of the blocks given to ``register_block``."""
    chains, missing = [], {}
    for block, block_name in names.items():
        for path in REGISTERED.get(type(block), ((), ()))[positions == "all"]:
            parts = dict(block.named_modules())
            lacking = [name for name in path if name not in parts]
            place = f"{block_name}.{path[1]}".removeprefix(".")
            if lacking:
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


def stem_of(net: "Net", model: nn.Module) -> set[nn.Module]:
    """Return, in a network with shortcuts, the layer that alone reads the image, and those in one sequence with it."""
    nodes = list(net.graph.nodes)
    if net.root is not model or not any(name_of(node).lstrip("i") == "add" for node in nodes):
        return set()
    readers = [user for node in nodes if node.op == "placeholder" for user in node.users if not reads_shape(user)]
    stem = {net.module(node) for node in readers} - {None} if len(readers) == 1 else set()
    sequences = [s for s in model.modules() if type(s) is nn.Sequential and stem & set(s)]
    return stem.union(*sequences)


def name_of(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def reads_shape(node: fx.Node) -> bool:
    """Whether a node only asks for the shape or the type of a tensor."""
    return node.op != "call_module" and (
        name_of(node) in SHAPES or name_of(node) == "getattr" and node.args[1] in SHAPES
    )


def register_block(
    block_type: type[nn.Module],
    inner: Sequence[Sequence[str]],
    all_positions: Sequence[Sequence[str]] | None = None,
) -> None:
    """Tell ``insert_compactors`` which widths of your block can shrink, where it cannot find them itself.

    A chain is a sequence of names of modules of the block, ``(layer, ..., next layer)``, dotted where they lie deeper
    (``"body.0"``), in the order of the forward pass and complete. What stands between is checked to treat each channel
    alone; activations called as functions cannot be checked and must keep zeros zero. Nothing else may read the first
    layer's output. Blocks of the class that lack a module of a chain have no such chain.

    Args:
        block_type: the block's class; subclasses have to be registered themselves.
        inner: the chains of ``positions="inner"``.
        all_positions: those of ``positions="all"``, the inner ones among them. Default: the same.

    Raises:
        ValueError: ``block_type`` is no class of modules; ``inner`` is empty or has chains that ``all_positions``
            lacks; a chain is a string or shorter than two names.

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
        number = net.order[node]
        later = [n for n in (*walk.tags, *walk.reads) if net.order[n] > number]
        inputs = {source for n in later for source in n.all_input_nodes if source in walk.tags}
        module = net.module(node)
        if any(net.order[source] < number for source in inputs) or len(net.calls[module]) > len(
            net.calls[walk.producer]
        ):
            continue
        chain = describe(walk, node, model)
        try:
            chain.constants()
        except Refused as reason:
            problem = reason
            continue
        return chain
    raise problem


def describe(walk: Walk, node: fx.Node, model: nn.Module) -> Chain:
    """Return the chain with its compactor behind a node."""
    net, place = walk.net, walk.net.module(node)
    values, steps = {node: 0}, []
    if is_norm_act(place):
        steps.append(Step(place.act, (0,)))
        values[node] = 1
    for later, (function, inputs) in walk.functions.items():
        if net.order[later] > net.order[node] and all(source in values for source in inputs):
            steps.append(Step(function, tuple(values[source] for source in inputs)))
            values[later] = len(steps)
    read = {module: values[reading.args[0]] for reading, module in walk.reads.items() if reading.args[0] in values}
    direct = is_batch_norm(place) and not is_norm_act(place) and node.args[0] in net.calls[walk.producer]
    full = type(walk.producer) is nn.Conv2d and direct and walk.units == walk.width
    tag = walk.tags[node]
    names = [net.names[m].split(".") for m in (walk.producer, place, *walk.consumers)]
    common = []
    for parts in zip(*(name[:-1] for name in names)):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return Chain(
        block=model.get_submodule(".".join(common)),
        producer=walk.producer,
        place=place,
        carriers=walk.carriers,
        companions=walk.companions,
        consumers=walk.consumers,
        units=walk.units,
        width=tag.width,
        last=tag.last,
        full=full,
        steps=steps,
        read=read,
    )
