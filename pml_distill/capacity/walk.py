"""How the channels of one layer go through a network, until other layers read them."""

import math
import operator
from typing import Any

import torch
from torch import fx, nn

from .tracing import is_batch_norm, is_global_response_norm, shrunk

SHAPES = ("size", "dim", "ndimension", "shape", "ndim", "device", "dtype")
RESHAPES = ("view", "reshape", "getitem", "unsqueeze", "expand_as", "flatten")


class Refused(Exception):
    """Why channels cannot be dropped."""


class Net:
    """One graph, with the modules that it calls, and those whose weights are used in other ways, too."""

    def __init__(self, root: nn.Module, graph: fx.Graph, names: dict[nn.Module, str], shared: set[nn.Module]):
        self.root, self.graph, self.names, self.shared = root, graph, names, set(shared)
        self.order = {node: number for number, node in enumerate(graph.nodes)}
        self.calls: dict[nn.Module, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                self.calls.setdefault(self.module(node), []).append(node)
            elif node.op == "get_attr":
                self.shared.add(root.get_submodule(node.target.rpartition(".")[0]))

    def module(self, node: fx.Node) -> Any:
        """Return the module that a node calls."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None


def name_of(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def reads_shape(node: fx.Node) -> bool:
    """Whether a node only asks for the shape or the type of a tensor."""
    name = name_of(node)
    return node.op != "call_module" and (name in SHAPES or name == "getattr" and node.args[1] in SHAPES)


class Bound:
    """A function or method of a graph, with all of its arguments but the first."""

    def __init__(self, node: fx.Node):
        self.target: Any = node.target
        self.method, self.args, self.kwargs = node.op == "call_method", node.args[1:], dict(node.kwargs)

    def __call__(self, x: torch.Tensor) -> Any:
        """Call it."""
        function = getattr(type(x), self.target) if self.method else self.target
        return function(x, *self.args, **self.kwargs)


class Walk:
    """Follows the channels of one layer through a graph, or raises ``Refused``; see ``Chain`` for what it finds.

    ``tags`` holds for each node that returns these channels how many it has and whether they are the last dimension,
    ``functions`` what it does and the nodes it reads, ``places`` nodes behind which a compactor may stand.
    """

    def __init__(self, net: Net, producer: Any):
        self.net, self.producer = net, producer
        self.units = width = len(producer.weight)
        self.tags: dict[Any, tuple[int, bool]] = {}
        self.functions: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        self.reads: dict[Any, Any] = {}
        self.places: list[fx.Node] = []
        self.carriers: dict[Any, int] = {}
        self.companions: dict[Any, None] = {}
        for node in net.graph.nodes:
            if node in net.calls[producer]:
                self.tags[node] = (width, isinstance(producer, nn.Linear))
                self.places.append(node)
            elif (sources := [source for source in node.all_input_nodes if source in self.tags]) and not reads_shape(
                node
            ):
                self.follow(node, sources)
        self.consumers = dict.fromkeys(self.reads.values())
        if not self.reads or self.units < 2:
            raise Refused("it has one channel" if self.reads else "nothing reads its output")
        known = {*self.tags, *self.reads, *(node for c in self.companions for node in net.calls[c])}
        for module in (producer, *self.carriers, *self.companions, *self.consumers):
            if module in net.shared or not known.issuperset(net.calls[module]):
                raise Refused(f"{net.names[module]} or its weights are used elsewhere, too")

    def refuse(self, node: fx.Node, reason: str) -> Any:
        """Raise the reason, with the name of what stands there."""
        module = self.net.module(node)
        what = name_of(node) if module is None else f"{self.net.names[module]} ({type(module).__name__})"
        raise Refused(f"{what} {reason}")

    def follow(self, node: fx.Node, sources: list[fx.Node]) -> None:
        """Take a node that reads the channels for a consumer, a carrier or a plain function, or refuse it."""
        module, name, source = self.net.module(node), name_of(node), sources[0]
        width, last = self.tags[source]
        if node.op == "output":
            self.refuse(node, "of the network are these channels")
        elif module is None and name.lstrip("i") in ("mul", "add") and len(node.all_input_nodes) == 2:
            self.join(node, sources, name.lstrip("i"))
        elif module is None and name in ("view", "reshape") and flattens(node) and not last:
            self.tags[node], self.functions[node] = (width, True), (nn.Flatten(), (source,))
        elif len(node.all_input_nodes) > 1 or node.args[:1] != (source,):
            self.refuse(node, "reads several tensors")
        elif type(module) is nn.Linear or type(module) is nn.Conv2d and module.groups == 1:
            linear = type(module) is nn.Linear
            if last != linear or module.weight.shape[1] % width or not (linear or module.in_channels == width):
                self.refuse(node, "reads something else as channels")
            self.reads[node] = module
        elif type(module) is nn.Conv2d:
            self.units = math.gcd(self.units, module.groups)
            if last or module.in_channels != width or self.units < 2:
                self.refuse(node, "has groups that cut through these channels")
            self.tags[node], self.functions[node] = (module.out_channels, False), (module, (source,))
            self.places.append(node)
            self.carriers[module] = module.out_channels
        else:
            function = Bound(node) if module is None else module
            if not (is_global_response_norm(module) and last == (module.channel_dim == -1)):
                last = self.probe(node, function, width, last)
            self.tags[node], self.functions[node] = (width, last), (function, (source,))
            held = () if module is None else (*module.parameters(), *module.buffers())
            if any(t.ndim and len(t) == width for t in held):
                self.carriers[module] = width
            if is_batch_norm(module) and module.weight is not None:
                self.places.append(node)

    def join(self, node: fx.Node, sources: list[fx.Node], name: str) -> None:
        """Let a product or sum of two tensors pass: of these channels alone, or with a factor for each channel."""
        self.tags[node] = width, last = self.tags[sources[0]]
        self.functions[node] = (getattr(operator, name), tuple(sources))
        if len(sources) == 2:
            if self.tags[sources[1]] != (width, last):
                self.refuse(node, "reads several tensors")
        elif name == "add":
            self.refuse(node, "adds another tensor, as a shortcut does")
        else:
            self.factor(node, next(other for other in node.all_input_nodes if other is not sources[0]), width)

    def factor(self, node: fx.Node, other: Any, width: int) -> None:
        """Find the layer that makes the factor for each channel, the companion."""
        between: list[tuple[fx.Node, Any]] = []
        while isinstance(other, fx.Node) and sum(not reads_shape(user) for user in other.users) == 1:
            module = self.net.module(other)
            if type(module) is nn.Linear or type(module) is nn.Conv2d and module.groups == 1:
                if len(module.weight) not in (1, width):
                    break
                for step, function in between:
                    self.probe(step, function, width, type(module) is nn.Linear)
                if len(module.weight) == width:
                    self.companions[module] = None
                return
            if holds_tensors(module) or not other.args or width in other.args[1:]:
                break
            if module is not None or name_of(other) not in RESHAPES:
                if len(other.all_input_nodes) != 1:
                    break
                between.append((other, Bound(other) if module is None else module))
            other = other.args[0]
        self.refuse(node, "multiplies with a tensor whose channels cannot be told")

    @torch.no_grad()
    def probe(self, node: fx.Node, function: Any, width: int, last: bool) -> bool:
        """Try whether a function works on each channel alone; return whether they come last in its output."""
        units = self.units
        if is_batch_norm(function) and not last and len(function.running_mean) == width:
            return False
        if type(function).__module__.startswith("torch.nn.") and not holds_tensors(function):
            width = units = 6  # it cannot know how many channels there are
        kept = torch.arange(0, units, 2)
        small, device = function, self.producer.weight.device
        if isinstance(function, nn.Module):
            function = shrunk(function, torch.arange(width, device=device), width).double().cpu().eval()
            small = shrunk(function, spread(kept, width // units), width)
        for shape in [(2, 8, 9, width), (2, 18, width), (3, width)] if last else [(2, width, 8, 9), (1, width, 36, 33)]:
            # In random order, so that neighbours differ as channels do.
            order = torch.randperm(math.prod(shape), generator=torch.Generator().manual_seed(0))
            x = torch.linspace(-2, 2, len(order), dtype=torch.float64)[order].view(shape)
            try:
                whole: Any = function(x.clone())
                half = small(x.index_select(len(shape) - 1 if last else 1, spread(kept, width // units)))
                (new,) = (int(d) for d, (a, b) in enumerate(zip(whole.shape, half.shape, strict=True)) if a != b)
                same = whole.index_select(new, spread(kept, whole.shape[new] // units))
                if new in (1, whole.ndim - 1) and torch.allclose(same, half, rtol=1e-9, atol=1e-12):
                    return bool(new == whole.ndim - 1)
            except Exception:
                continue
        return self.refuse(node, "does not treat each channel alone")


def spread(rows: torch.Tensor, group: int) -> torch.Tensor:
    """Return the channels of some groups of so many each."""
    return (rows[:, None] * group + torch.arange(group, device=rows.device)).flatten()


def flattens(node: fx.Node) -> bool:
    """Whether this is ``x.view(x.size(0), -1)`` or the like."""
    sizes = node.args[1:]
    return len(sizes) == 2 and isinstance(sizes[0], fx.Node) and (isinstance(sizes[1], fx.Node) or bool(sizes[1] == -1))


def holds_tensors(module: Any) -> bool:
    """Whether a module has parameters or buffers."""
    return module is not None and any(True for _ in (*module.parameters(), *module.buffers()))
