from typing import Any

import torch
from torch import nn

from .chain import Chain
from .compactor import Compacted, check_model, find_compactors, replace_module
from .tracing import Tracer, copied, is_batch_norm, is_global_response_norm, is_norm_act, shrunk
from .walk import Refused


def export(
    model: nn.Module,
    threshold: float = 1e-5,
    fold_norms: bool = False,
    multiple_of: int = 1,
    rows_of: nn.Module | None = None,
) -> nn.Module:
    r"""Return the small plain network that a network with compactors has become.

    Rows of a compactor shorter than the threshold are dropped, with all that made, carried and read their channels.
    Convolution, normalisation (scale :math:`s`, shift :math:`t`) and the rows :math:`W` that stay become one layer,

    .. math:: K' = W \, \mathrm{diag}(s) \, K, \qquad b' = W (s \, b + t)

    computed in float64. For rows that are zero this is exact: constants go into the next layer's bias. The result is a
    copy in eval mode, of the same class, without forward hooks.

    Source: Xie et al., "Towards a Smaller Student: Capacity Dynamic Distillation for Efficient Image Retrieval"
    (CVPR 2023).

    Args:
        model: a network from ``insert_compactors``, in eval mode.
        threshold: rows shorter than this are dropped; of each compactor the longest row stays.
        fold_norms: also merge every other normalisation that directly follows a convolution.
        multiple_of: widths are rounded up to multiples of it, by the longest rows of those that would go.
        rows_of: the network whose compactors decide which rows stay; for a moving average, the student.

    Raises:
        ValueError: for a network in training mode, without compactors or with values that are not finite; a layer that
            was replaced or lifts zeros; a threshold below 0 or above all rows; ``fold_norms`` of what fx cannot trace.

    Example:
        >>> from pml_distill.models import SmallResNet
        >>> from pml_distill.capacity import insert_compactors
        >>> model = SmallResNet(width=8).eval()
        >>> _ = insert_compactors(model)["layer1.0.bn1"].weight.data[3:].zero_()
        >>> export(model).layer1[0].conv1.out_channels
        3
    """
    model = check_model(model)
    check_compactors(model, threshold)
    judges = find_compactors(model if rows_of is None else rows_of)
    merged: dict[int, Any] = {}
    for name, compactor in find_compactors(model).items():
        if name not in judges or len(judges[name].weight) != len(compactor.weight):
            raise ValueError(f"rows_of must have the same compactors as model, but lacks that behind {name}.")
        rows = kept_rows(judges[name], threshold, multiple_of).to(compactor.weight.device)
        try:
            shrink(compactor.chain, compactor, rows, merged)
        except Refused as reason:
            raise ValueError(f"cannot merge the compactor behind {name}: {reason}.") from None
    for module in model.modules():
        if isinstance(module, Compacted) and id(module[0]) in merged:
            merged[id(module)] = merged[id(module[0])]
    # What stands in the memo is taken for the copy, so that nothing that hangs on a compactor is copied.
    exported = copied(model, merged)
    if fold_norms:
        fold(exported)
    return exported


@torch.no_grad()
def shrink(chain: Chain, compactor: Any, rows: torch.Tensor, merged: dict[int, Any]) -> None:
    """Put what becomes of each module of a chain into ``merged``, under the module's id."""

    def now(module: Any) -> Any:
        return merged.get(id(module), module)

    constants = chain.constants()
    factors = None if chain.full else compactor.weight[rows].expand(-1, chain.width // chain.units).reshape(-1)
    if chain.full:
        merged[id(chain.producer)] = merge(now(chain.producer), chain.place, compactor.weight[rows])
        merged[id(chain.place)] = nn.Identity().eval()
    else:
        out = chain.channels(rows, len(chain.producer.weight))
        scale = factors if chain.place is chain.producer else None
        merged[id(chain.producer)] = with_rows(now(chain.producer), out, scale)
    for module, width in chain.carriers.items():
        index, here = chain.channels(rows, width), module is chain.place
        if chain.full and here:
            continue
        if type(module) is nn.Conv2d:
            groups = module.groups * len(rows) // chain.units
            small: Any = with_rows(now(module), index, factors if here else None, groups)
        else:
            plain = {id(module.drop): module.drop[0]} if here and is_norm_act(module) else {}
            small = shrunk(module, index, width, plain)
            small._load_state_dict_pre_hooks.clear()
            for tensor in (small.weight, small.bias) if here else ():
                tensor.copy_(tensor.double() * factors)
            if is_global_response_norm(module):
                # Its mean is over fewer channels.
                small.weight.mul_(width / len(index))
                small.eps = module.eps * width / len(index)
        merged[id(module)] = small
    for module in chain.companions:
        merged[id(module)] = with_rows(now(module), chain.channels(rows, len(module.weight)))
    gone = torch.ones(chain.units, dtype=torch.bool, device=rows.device)
    gone[rows] = False
    for module in chain.consumers:
        layer, width = now(module), module.weight.shape[1]
        index, bias = chain.channels(rows, width), layer.bias
        if module in constants:
            dead = chain.channels(gone.nonzero().flatten(), width)
            kernel = layer.weight[:, dead].double().reshape(len(bias), len(dead), -1).sum(2)
            bias = bias + (kernel @ constants[module][dead].double()).to(bias)
        merged[id(module)] = with_values(layer, layer.weight[:, index], bias)


def check_compactors(model: nn.Module, threshold: float) -> None:
    """Raise ValueError for what cannot be exported."""
    compactors = find_compactors(model)
    if not compactors:
        raise ValueError(f"{type(model).__name__} has no compactors: call insert_compactors on it and train it first.")
    if any(module.training for module in model.modules()):
        raise ValueError("the network is in training mode, where normalisations cannot be merged: call eval() first.")
    norms = {name: compactor.row_norms().detach() for name, compactor in compactors.items()}
    broken = [name for name, rows in norms.items() if not rows.isfinite().all()]
    if broken:
        raise ValueError(f"the compactor behind {', '.join(broken)} has values that are not finite.")
    present = set(model.modules())
    for name, compactor in compactors.items():
        if any(module not in present for module in compactor.chain.modules()):
            raise ValueError(
                f"a layer around the compactor behind {name} was replaced after insert_compactors: replace it before."
            )
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, but is {threshold}.")
    largest = {name: rows.max().item() for name, rows in norms.items()}
    # No threshold would help a network whose rows are all zero; a single block keeps its longest row, as any would.
    if len(largest) > 1 and 0 < max(largest.values()) < threshold:
        listed = ", ".join(f"{name} {value:.3g}" for name, value in largest.items())
        raise ValueError(f"threshold={threshold} would empty every block; the largest row norms are: {listed}.")


def kept_rows(compactor: Any, threshold: float, multiple_of: int = 1) -> torch.Tensor:
    """Return the indices of the rows from the threshold on, and of the next longest that fill up the width."""
    norms = compactor.row_norms().detach()
    count = rounded(int((norms >= threshold).sum()), compactor.chain, multiple_of)
    longest = norms.argsort(descending=True, stable=True)[:count]
    return longest.sort().values


def rounded(rows: int, chain: Chain, multiple_of: int) -> int:
    """Return how many rows make the next width that is a multiple, at least one and at most all of them."""
    step = unit_step(chain, multiple_of)
    return min(max(1, -(-rows // step)) * step, chain.units)


def unit_step(chain: Chain, multiple_of: int) -> int:
    """Return how many rows make ``multiple_of`` channels."""
    group = chain.width // chain.units
    return next(step for step in range(1, multiple_of + 1) if step * group % multiple_of == 0)


@torch.no_grad()
def merge(conv: nn.Conv2d, norm: Any, rows: torch.Tensor | None = None) -> Any:
    """Return one convolution for convolution, batch norm in eval mode and the rows of a compactor."""
    given = conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias
    exact: Any = (None if value is None else value.double() for value in given)
    kernel, bias, mean, var, scale, shift = exact
    weight, shift = nn.utils.fuse_conv_bn_weights(kernel, bias, mean, var, norm.eps, scale, shift)
    if rows is not None:
        rows = rows.double().flatten(1)
        weight, shift = torch.tensordot(rows, weight, dims=1), rows @ shift
    return with_values(conv, weight, shift)


def with_rows(layer: Any, index: torch.Tensor, factors: torch.Tensor | None = None, groups: int | None = None) -> Any:
    """Return a layer with some of its outputs, each multiplied with a factor."""
    weight, bias = layer.weight[index], None if layer.bias is None else layer.bias[index]
    if factors is not None:
        weight = weight.double() * factors.double().view(-1, *(1,) * (weight.ndim - 1))
        bias = None if bias is None else bias.double() * factors.double()
    return with_values(layer, weight, bias, groups)


@torch.no_grad()
def with_values(layer: Any, weight: torch.Tensor, bias: torch.Tensor | None, groups: int | None = None) -> Any:
    """Return a layer as the one given, with other weights; frozen if its weight is, and in the same layout."""
    options: dict[str, Any] = {"bias": bias is not None, "device": layer.weight.device, "dtype": layer.weight.dtype}
    # Weights drawn only to be replaced would take numbers from the global generator.
    if isinstance(layer, nn.Linear):
        new: Any = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], **options).eval()
    else:
        options["groups"] = groups = layer.groups if groups is None else groups
        same = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        options |= {name: getattr(layer, name) for name in same}
        new = nn.utils.skip_init(nn.Conv2d, weight.shape[1] * groups, weight.shape[0], **options).eval()
    new.weight.copy_(weight)
    if new.bias is not None and bias is not None:
        new.bias.copy_(bias)
    layout = torch.channels_last
    if weight.ndim == 4 and not layer.weight.is_contiguous() and layer.weight.is_contiguous(memory_format=layout):
        new = new.to(memory_format=layout)
    return new.requires_grad_(layer.weight.requires_grad)


def fold(model: nn.Module) -> None:
    """Merge, in place, the normalisations that read a convolution that nothing else reads."""
    try:
        graph = Tracer().trace(model)
    except Exception as error:
        kind = type(model).__name__
        raise ValueError(f"fold_norms=True needs a network that torch.fx can trace, {kind} is not: {error}") from error
    modules = dict(model.named_modules())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(source, torch.fx.Node) or source.op != "call_module":
            continue
        names = str(source.target), str(node.target)
        conv, norm = modules[names[0]], modules[names[1]]
        once = calls.count(source.target) == calls.count(node.target) == 1 and len(source.users) == 1
        if type(conv) is nn.Conv2d and is_batch_norm(norm) and not is_norm_act(norm) and once:
            replace_module(model, names[0], merge(conv, norm))
            replace_module(model, names[1], nn.Identity().eval())
