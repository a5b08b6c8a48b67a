import copy
import importlib
import json
import os
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..utils.files import whole_file
from .compactor import check_model, find_compactors, replace_module

FORMAT = "pml-distill compact network 2"
# What an export changes of a module, besides its tensors.
WIDTHS = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_parameters")


def save_compact(model: nn.Module, path: str | os.PathLike) -> None:
    """Write an exported network to one safetensors file that can be read without this package.

    The file holds the weights, and as metadata ``format`` and ``layers``: JSON of the type and the plain attributes of
    each module without children, by name. To read it with torchvision and safetensors alone::

        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            layers = json.loads(file.metadata()["layers"])
        model = torchvision.models.resnet50()
        for name, layer in layers.items():
            parent, _, last = name.rpartition(".")
            if layer.pop("type") == "Identity":
                setattr(model.get_submodule(parent), last, torch.nn.Identity())
            vars(model.get_submodule(name)).update(layer)
        for name, tensor in tensors.items():
            parent, _, last = name.rpartition(".")
            module = model.get_submodule(parent)
            if last in module._buffers:
                module._buffers[last] = tensor
            else:
                module._parameters[last] = torch.nn.Parameter(tensor)
        model.eval()

    The file is written under another name first: when saving fails, an older file stays whole. Needs safetensors.

    Raises:
        ValueError: for what is no network, or one that still has compactors.
    """
    model = check_model(model)
    if find_compactors(model):
        raise ValueError(f"{type(model).__name__} has compactors: save what export returns.")
    metadata = {"format": FORMAT, "layers": json.dumps(describe(model))}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = safetensors("safetensors.torch").save(tensors, metadata)
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content)


def load_compact(path: str | os.PathLike, model: nn.Module) -> nn.Module:
    """Return the network that ``save_compact`` wrote, on the CPU, in eval mode.

    Args:
        path: the file.
        model: a network of the architecture before ``insert_compactors``, with any weights; it is left as it is.

    Raises:
        ValueError: the file is of another format, or of another architecture than ``model``.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a network as it was before insert_compactors, but is {model!r}.")
    metadata, tensors = read(path)
    layers = json.loads(metadata["layers"])
    model = copy.deepcopy(model).cpu()
    refused = f"{path} does not fit {type(model).__name__}: "
    if problem := difference(describe(model), layers):
        raise ValueError(f"{refused}{problem}.")
    for name, layer in layers.items():
        if layer.pop("type") == "Identity":
            replace_module(model, name, nn.Identity())
        module: Any = model.get_submodule(name)
        # Lists were tuples.
        vars(module).update({k: tuple(v) if isinstance(v, list) else v for k, v in layer.items()})
        if type(module).__name__ == "BlurPool2d" and module.channels is not None:
            module.filt = module.filt[:1].repeat(module.channels, 1, 1, 1)
    try:
        for name, tensor in tensors.items():
            parent, _, last = name.rpartition(".")
            module = model.get_submodule(parent)
            if last in module._parameters:
                module._parameters[last] = nn.Parameter(tensor)
            elif last in module._buffers:
                module._buffers[last] = tensor
        model.load_state_dict(tensors, assign=True)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"{refused}{error}") from error
    return model.eval()


def read(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Return metadata and tensors of a file, or raise ValueError for one of another format."""
    try:
        with safetensors().safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Copies are aligned in memory, which the file is not: the same sums come out to the last bit.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except safetensors().SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise ValueError(f"{path} is not from save_compact: its format must be {FORMAT!r}, but is {found!r}.")
    return metadata, tensors


def describe(model: nn.Module) -> dict[str, dict]:
    """Return type and plain attributes of each module without children, as JSON gives them back."""
    layers = {}
    for name, module in model.named_modules():
        if not any(module.children()) or isinstance(module, nn.modules.batchnorm._BatchNorm):
            plain = {k: v for k, v in vars(module).items() if k[0] != "_" and k != "training" and is_plain(v)}
            layers[name] = {"type": type(module).__name__, **plain}
    return json.loads(json.dumps(layers))


def is_plain(value: Any) -> bool:
    """Whether JSON can hold a value."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def difference(expected: dict[str, dict], layers: dict[str, dict]) -> str:
    """Return what keeps layers from being put into a network, or an empty string."""
    if odd := expected.keys() ^ layers.keys():
        name = next(name for name in (*expected, *layers) if name in odd)
        return f"{name} is in the {'network' if name in expected else 'file'} only"
    for name, layer in layers.items():
        changed = {"GlobalResponseNorm": {"eps"}, "BlurPool2d": {"channels"}}.get(layer["type"], set()) | set(WIDTHS)
        sides = [{k: v for k, v in side.items() if k not in changed} for side in (expected[name], layer)]
        if layer["type"] != "Identity" and sides[0] != sides[1]:
            return f"{name} is {sides[0]} in the network, {sides[1]} in the file"
    return ""


def safetensors(module: str = "safetensors") -> ModuleType:
    """Import safetensors, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError("compact networks are kept in safetensors: pip install 'pml-distill[capacity]'") from error
