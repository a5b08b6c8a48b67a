import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from .compactor import Compactor, compacted_chains, find_compactors, is_batch_norm, mixing, replace_module


def export(model: nn.Module, threshold: float = 1e-5, fold_norms: bool = False) -> nn.Module:
    r"""Return the small plain network that a network with compactors has become.

    Rows of a compactor with a norm under the threshold are dropped, with the next convolution's inputs that read
    them. Convolution, normalisation (scale :math:`s`, shift :math:`t`) and the rows :math:`W` that are kept become
    one convolution with bias,

    .. math:: K' = W \, \mathrm{diag}(s) \, K, \qquad b' = W (s \, b + t)

    computed in float64, and the normalisation becomes ``nn.Identity``. For rows that are zero this is exact, since the
    compactor has no bias and the activation of zero is zero. The network is of the class it was of and has no class
    of this subpackage in it. It is a copy in eval mode, without forward hooks; the one given stays as it is.

    Source: Xie et al., "Towards a Smaller Student: Capacity Dynamic Distillation for Efficient Image Retrieval"
    (CVPR 2023). The authors' merging fails for a block that keeps one channel; this one does not.

    Args:
        model: a network from ``insert_compactors``, in eval mode.
        threshold: rows shorter than this are dropped; of each compactor the longest row stays, the first where all are
            zero. The pull of a group lasso of weight w leaves rows swinging by about learning rate * w / (1 -
            momentum): a threshold below that finds nothing before the learning rate has come down.
        fold_norms: also merge every other normalisation that directly follows a convolution, such as those of stem,
            shortcuts and block outputs. The network has to be traceable by ``torch.fx``.

    Raises:
        ValueError: for what is no network, in training mode, without compactors, for a compactor with values that are
            not finite, for a module between normalisation and next convolution that has learned to lift zeros or to
            mix channels, for a threshold below 0 or above all rows of several compactors, unless they are all zero, for
            ``fold_norms`` of a network that cannot be traced.

    Example:
        >>> from pml_distill.capacity import insert_compactors
        >>> from pml_distill.models import SmallResNet
        >>> model = SmallResNet(width=8).eval()
        >>> compactor = insert_compactors(model)["layer1.0.bn1"]
        >>> _ = compactor.weight.data[3:].zero_()
        >>> export(model).layer1[0].conv1
        Conv2d(8, 3, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    check_compactors(model, threshold)
    merged: dict[int, Any] = {}
    for chain in compacted_chains(model):
        rows = kept_rows(chain.compactor, threshold)
        conv = merged.get(id(chain.conv), chain.conv)
        following = merged.get(id(chain.following), chain.following)
        merged[id(chain.conv)] = merge(conv, chain.norm[0], chain.compactor.weight[rows])
        merged[id(chain.following)] = with_values(following, following.weight[:, rows], following.bias)
        merged[id(chain.norm)] = nn.Identity().eval()
    # Hooks serve the network that they were put on, and may hold on to much more.
    for module in model.modules():
        for name, hooks in vars(module).items():
            if name.startswith(("_forward_hooks", "_forward_pre_hooks")):
                merged[id(hooks)] = OrderedDict()
    # What stands in the memo is taken for the copy, so that nothing that hangs on a compactor is copied.
    exported = copy.deepcopy(model, merged)
    if fold_norms:
        fold(exported)
    return exported


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
    for chain in compacted_chains(model):
        # What kept zeros zero at the insertion may have learned not to.
        problem = mixing(chain)
        if problem:
            raise ValueError(f"cannot merge the compactor behind {chain.name}: {problem}.")
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, but is {threshold}.")
    largest = {name: rows.max().item() for name, rows in norms.items()}
    # No threshold would help a network whose rows are all zero; a single block keeps its longest row, as any would.
    if len(largest) > 1 and 0 < max(largest.values()) < threshold:
        listed = ", ".join(f"{name} {value:.3g}" for name, value in largest.items())
        raise ValueError(f"threshold={threshold} would empty every block; the largest row norms are: {listed}.")


def kept_rows(compactor: Compactor, threshold: float) -> torch.Tensor:
    """Return the indices of the rows from the threshold on, or of the longest one."""
    norms = compactor.row_norms().detach()
    kept = norms >= threshold
    kept[norms.argmax()] = True
    return kept.nonzero().flatten()


@torch.no_grad()
def merge(conv: nn.Conv2d, norm: Any, rows: torch.Tensor | None = None) -> nn.Conv2d:
    """Return one convolution for convolution, batch norm in eval mode and the rows of a compactor."""
    given = conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias
    exact: Any = (None if value is None else value.double() for value in given)
    kernel, bias, mean, var, scale, shift = exact
    weight, shift = nn.utils.fuse_conv_bn_weights(kernel, bias, mean, var, norm.eps, scale, shift)
    if rows is not None:
        rows = rows.double().flatten(1)
        weight, shift = torch.tensordot(rows, weight, dims=1), rows @ shift
    return with_values(conv, weight, shift)


@torch.no_grad()
def with_values(conv: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Conv2d:
    """Return a convolution as the one given, with other weights; frozen if its weight is, and in the same layout."""
    # Weights drawn only to be replaced would take numbers from the global generator.
    new = nn.utils.skip_init(
        nn.Conv2d,
        weight.shape[1] * conv.groups,
        weight.shape[0],
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        bias is not None,
        conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    ).eval()
    new.weight.copy_(weight)
    if new.bias is not None and bias is not None:
        new.bias.copy_(bias)
    if not conv.weight.is_contiguous() and conv.weight.is_contiguous(memory_format=torch.channels_last):
        new = new.to(memory_format=torch.channels_last)
    return new.requires_grad_(conv.weight.requires_grad)


def fold(model: nn.Module) -> None:
    """Merge, in place, the normalisations that read a convolution that nothing else reads."""
    try:
        graph = torch.fx.Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"fold_norms=True needs a network that torch.fx can trace, {type(model).__name__} is not: {error}"
        ) from error
    modules = dict(model.named_modules())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(source, torch.fx.Node) or source.op != "call_module":
            continue
        names = str(source.target), str(node.target)
        conv, norm = modules[names[0]], modules[names[1]]
        once = calls.count(source.target) == calls.count(node.target) == 1 and len(source.users) == 1
        if type(conv) is nn.Conv2d and is_batch_norm(norm) and once:
            replace_module(model, names[0], merge(conv, norm))
            replace_module(model, names[1], nn.Identity().eval())
