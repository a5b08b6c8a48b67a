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

FORMAT = "pml-distill compact network 1"
# What may differ from the architecture, with the arguments that rebuild it.
REBUILT = {
    nn.Conv2d: (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ),
    nn.Linear: ("in_features", "out_features"),
    nn.BatchNorm2d: ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    nn.PReLU: ("num_parameters",),
    nn.Identity: (),
}
# What else depends on the width: attributes that are set, and classes whose vectors have the length that the file has.
ADAPTED = {"GlobalResponseNorm": ("eps",), "BlurPool2d": ("channels",)}
RESIZED = ("BatchNormAct2d", "SyncBatchNormAct", "GlobalResponseNorm")
TORCHVISION: dict[tuple, str] = {
    ("BasicBlock", 2, 2, 2, 2): "resnet18",
    ("BasicBlock", 3, 4, 6, 3): "resnet34",
    ("Bottleneck", 3, 4, 6, 3): "resnet50",
    ("Bottleneck", 3, 4, 23, 3): "resnet101",
    ("Bottleneck", 3, 8, 36, 3): "resnet152",
}


def save_compact(model: nn.Module, path: str | os.PathLike) -> None:
    """Write an exported network to one safetensors file that can be read without this package.

    The file holds the weights, and as metadata ``format``, ``architecture`` (``"torchvision resnet50"``,
    ``"timm seresnet50"``; empty for other networks) and ``layers``: JSON of the type of each module without children
    by name, with the arguments that rebuild it for convolutions, linear layers, batch norms and identities, and for
    others the ``settings`` that torch prints. To read it with torchvision and safetensors alone::

        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            layers = json.loads(file.metadata()["layers"])
        model = torchvision.models.resnet50()
        for name, layer in layers.items():
            kind = layer.pop("type")
            if kind in ("Conv2d", "Linear", "BatchNorm2d", "Identity"):
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, getattr(torch.nn, kind)(**layer))
        model.load_state_dict(tensors)
        model.eval()

    The file is written under another name first: when saving fails, an older file stays whole. Needs safetensors.

    Args:
        model: a network from ``export``.
        path: where to write it.

    Raises:
        ValueError: for what is no network, or one that still has compactors.
    """
    model = check_model(model)
    if find_compactors(model):
        raise ValueError(f"{type(model).__name__} has compactors: save what export returns.")
    layers = describe(model)
    metadata = {"format": FORMAT, "architecture": architecture(model, layers), "layers": json.dumps(layers)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = safetensors("safetensors.torch").save(tensors, metadata)
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content)


def load_compact(path: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """Return the network that ``save_compact`` wrote, on the CPU, in eval mode.

    Layers whose widths differ are rebuilt, other modules are compared by what they print.

    Args:
        path: the file.
        model: a network of the architecture before it was compacted, with any weights; it is left as it is. Needed
            for networks that are not plain ResNets of torchvision or timm.

    Raises:
        ValueError: the file is of another format, of another architecture than ``model``, or names none.
    """
    if not isinstance(model, nn.Module | None):
        raise ValueError(f"model must be a network or None, but is a {type(model).__name__}.")
    metadata, tensors = read(path)
    name, layers = metadata["architecture"], json.loads(metadata["layers"])
    if model is None:
        if not name:
            raise ValueError(
                f"{path} names no architecture of torchvision or timm: give model, a network as it was before "
                "insert_compactors."
            )
        model = build(name)
    model = copy.deepcopy(model).cpu()
    found = describe(model)
    problem = difference(found, layers)
    if problem:
        raise ValueError(f"{path} holds {name or 'a network'} and does not fit {type(model).__name__}: {problem}.")
    for layer_name, layer in layers.items():
        if layer != found[layer_name]:
            arguments = {key: value for key, value in layer.items() if key != "type"}
            if layer["type"] in ADAPTED:
                vars(model.get_submodule(layer_name)).update({key: arguments[key] for key in ADAPTED[layer["type"]]})
            else:
                replace_module(model, layer_name, getattr(nn, layer["type"])(**arguments))
    resize(model, tensors)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds {name or 'a network'} and does not fit {type(model).__name__}: {error}"
        ) from error
    return model.eval()


def resize(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Give the vectors of modules that cannot be rebuilt the length that they have in the file."""
    for name, module in model.named_modules():
        if type(module).__name__ == "BlurPool2d" and module.channels is not None:
            module.filt = module.filt[:1].repeat(module.channels, 1, 1, 1)
        if type(module).__name__ not in RESIZED:
            continue
        for own in (module._parameters, module._buffers):
            for key, vector in own.items():
                saved = tensors.get(f"{name}.{key}")
                if vector is not None and saved is not None and vector.ndim == saved.ndim == 1:
                    own[key] = nn.Parameter(saved) if isinstance(vector, nn.Parameter) else saved
                    if hasattr(module, "num_features"):
                        module.num_features = len(saved)


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
        raise ValueError(
            f"{path} is not from save_compact: its format must be {FORMAT!r}, but is {metadata.get('format')!r}."
        )
    return metadata, tensors


def describe(model: nn.Module) -> dict[str, dict]:
    """Return type and arguments of each module without children, as JSON gives them back."""
    layers: dict[str, dict] = {}
    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            layers[name] = {"type": type(module).__name__}
            for argument in REBUILT.get(type(module), ()):
                value = getattr(module, argument)
                layers[name][argument] = list(value) if isinstance(value, tuple) else value
            for argument in ADAPTED.get(type(module).__name__, ()):
                layers[name][argument] = getattr(module, argument)
            if type(module) in (nn.Conv2d, nn.Linear):
                layers[name]["bias"] = module.bias is not None
            if type(module) not in REBUILT:
                # Some, such as torchvision's FrozenBatchNorm2d, print more than their extra_repr.
                layers[name]["settings"] = repr(module).removeprefix(f"{type(module).__name__}(").removesuffix(")")
    return layers


def difference(expected: dict[str, dict], layers: dict[str, dict]) -> str:
    """Return what keeps layers from being put into a network, or an empty string."""
    rebuilt = {kind.__name__ for kind in REBUILT} | set(ADAPTED)
    for name in expected:
        if name not in layers:
            return f"{name} is in the network only"
    for name, layer in layers.items():
        if name not in expected:
            return f"{name} is in the file only"
        if layer["type"] not in rebuilt and layer != expected[name]:
            there, here = (f"{d['type']}({d.get('settings', '')})" for d in (expected[name], layer))
            return f"{name} is {there} in the network, {here} in the file"
    return ""


def architecture(model: Any, layers: dict[str, dict]) -> str:
    """Return what ``build`` makes such a network of, or an empty string."""
    name, library = "", f"{type(model).__module__}.{type(model).__name__}"
    if library == "torchvision.models.resnet.ResNet":
        # A stage may have been replaced by a module without blocks.
        stages = [list(stage.children()) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)]
        name = TORCHVISION.get((*{type(block).__name__ for block in stages[0]}, *map(len, stages)), "")
    elif library.startswith("timm.models."):
        # Only timm's functions leave a name.
        name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    if not name:
        return ""
    name = f"{library.split('.')[0]} {name}"
    with torch.device("meta"):
        return "" if difference(describe(build(name)), layers) else name


def build(name: str) -> nn.Module:
    """Return an untrained network of torchvision or timm."""
    library, name = name.split()
    if library == "timm":
        import timm

        return timm.create_model(name)
    import torchvision

    return torchvision.models.get_model(name)


def safetensors(module: str = "safetensors") -> ModuleType:
    """Import safetensors, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError("compact networks are kept in safetensors: pip install 'pml-distill[capacity]'") from error
