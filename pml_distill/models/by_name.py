"""Networks by name, each with the preprocessing it was trained with: timm, torchvision, your own functions."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..utils.modules import eval_mode
from .preprocessing import Preprocessing

HOW_TO_GIVE = "Give a file of them (weights=, --weights), or do without (pretrained=False, --no-pretrained)."


@dataclass
class NamedNetwork:
    """A network, what it is called, the preprocessing it wants, and the width of what it returns."""

    name: str
    network: nn.Module
    preprocessing: Preprocessing
    width: int


def network_by_name(
    name: str | nn.Module,
    pretrained: bool = True,
    weights: str | os.PathLike | None = None,
    image_size: int | None = None,
) -> NamedNetwork:
    """Build a network that returns pooled features (B, D).

    Args:
        name: ``"timm/NAME"`` with whatever timm resolves, such as ``"timm/hf-hub:OWNER/NAME"`` or
            ``"timm/local-dir:PATH"``; ``"torchvision/NAME"``, a classification network; ``"module:function"``, a
            function without arguments that returns a network; or a network itself. The last two may have an attribute
            ``preprocessing``.
        pretrained: whether to load the weights of that name. They are downloaded, with a word on it, if they are not
            on this machine.
        weights: a file of weights (``.pth``, ``.safetensors``) to load in their place.
        image_size: side of the images, in place of the network's own.

    Raises:
        ValueError: the name is unknown, with those that are near; weights are missing or do not fit; the network
            returns something other than features (B, D), or does not take images of this size.
        ModuleNotFoundError: timm or torchvision is not installed.
    """
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"There is no weights file {weights}.")
    if isinstance(name, nn.Module):
        named = given_network(f"{type(name).__module__}:{type(name).__qualname__}", name)
    elif name.startswith("timm/"):
        named = from_timm(name, pretrained and weights is None, weights, image_size)
    elif name.startswith("torchvision/"):
        named = from_torchvision(name, pretrained and weights is None, weights)
        weights = None
    elif ":" in name:
        named = from_function(name)
    else:
        near = [
            f"{library}/{known}" for library in ("timm", "torchvision") for known in near_names(name, known_to(library))
        ]
        raise ValueError(
            f"{name!r} is no network: write timm/NAME, torchvision/NAME, module:function or the folder of a run"
            + (f". Near are {', '.join(near)}." if near else ".")
        )
    if weights is not None and not named.name.startswith("timm/"):
        load_weights(named.network, weights)
    if image_size is not None:
        named.preprocessing = replace(named.preprocessing, size=(image_size, image_size))
    return with_width(named)


def from_timm(name: str, pretrained: bool, weights: Any, image_size: int | None) -> NamedNetwork:
    """Build a network of timm without its classifier."""
    timm = needed("timm")
    model = name.removeprefix("timm/")
    options: dict[str, Any] = {}
    if ":" not in model:
        base = model.partition(".")[0]
        known = known_to("timm")
        if not timm.is_model(base) or ("." in model and model not in known):
            raise unknown(name, [f"timm/{near}" for near in known])
        config = timm.get_pretrained_cfg(model)
        if image_size is not None and config is not None and config.fixed_input_size:
            options["img_size"] = image_size
        if pretrained and config is not None and config.hf_hub_id and not in_hub_cache(config.hf_hub_id):
            announce(name)
    if weights is not None:
        # timm converts older files, and the positions of a ViT for images of another size.
        options["pretrained_cfg_overlay"] = {"file": str(weights)}
    try:
        network = timm.create_model(model, pretrained=pretrained or weights is not None, num_classes=0, **options)
    except Exception as error:
        if weights is not None:
            raise ValueError(f"The weights {weights} do not fit {name}: {first_line(error)}") from error
        raise not_to_be_had(name, error) from error
    if weights is not None:
        check_complete(network, read_weights(weights), weights)
    config = timm.data.resolve_model_data_config(network)
    channels, *size = config["input_size"]
    preprocessing = Preprocessing(tuple(size), config["interpolation"], config["mean"][:channels], config["std"])
    return NamedNetwork(name, network, preprocessing, 0)


def from_torchvision(name: str, pretrained: bool, weights: Any) -> NamedNetwork:
    """Build a classification network of torchvision without its last layer."""
    models = needed("torchvision.models")
    model = name.removeprefix("torchvision/")
    if model not in known_to("torchvision"):
        raise unknown(name, [f"torchvision/{near}" for near in known_to("torchvision")])
    own = models.get_model_weights(model).DEFAULT
    # Their outputs for classes beside the last are of no use here, and break the pass in train mode.
    options: dict[str, Any] = (
        {"aux_logits": False, "init_weights": True} if model in ("googlenet", "inception_v3") else {}
    )
    if pretrained:
        options = {"aux_logits": True} if options else {}
        if not (Path(torch.hub.get_dir()) / "checkpoints" / Path(own.url).name).exists():
            announce(name)
    try:
        network = models.get_model(model, weights=own if pretrained else None, **options)
    except OSError as error:
        raise not_to_be_had(name, error) from error
    if options:
        network.aux_logits, network.AuxLogits, network.aux1, network.aux2 = False, None, None, None
    head = [key for key, part in network.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))][-1]
    parent, _, last = head.rpartition(".")
    setattr(network.get_submodule(parent), last, nn.Identity())
    if weights is not None:
        load_weights(network, weights, (f"{head}.", "AuxLogits.", "aux1.", "aux2."))
    transforms = own.transforms()
    (size,) = transforms.crop_size
    values = transforms.interpolation.value, tuple(transforms.mean), tuple(transforms.std)
    return NamedNetwork(name, network, Preprocessing((size, size), *values), 0)


def from_function(name: str) -> NamedNetwork:
    """Call a user's function."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        network = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} is no function that can be called for a network: {error}.") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module, but returned a {type(network).__name__}.")
    return given_network(name, network)


def given_network(name: str, network: nn.Module) -> NamedNetwork:
    """Wrap a network with its own preprocessing, or that of ImageNet."""
    return NamedNetwork(name, network, getattr(network, "preprocessing", Preprocessing()), 0)


@torch.no_grad()
def with_width(named: NamedNetwork) -> NamedNetwork:
    """Find out how wide the features are; maps (B, C, H, W) are averaged over their places."""
    shape = named.preprocessing.image_shape
    with eval_mode(named.network):
        try:
            output = named.network(torch.zeros(1, *shape))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(f"{named.name} does not take images of {shape}: {first_line(error)}") from error
    if isinstance(output, torch.Tensor) and output.ndim == 4:
        named.network = nn.Sequential(named.network, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        output = output.mean(dim=(2, 3))
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        kind = tuple(output.shape) if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        raise ValueError(f"{named.name} must return features (B, D), but returned {kind}.")
    named.width = output.shape[1]
    return named


def load_weights(network: nn.Module, path: str | os.PathLike, spare: tuple[str, ...] = ()) -> None:
    """Load a file of weights, but for those that begin with ``spare``; ``ValueError`` if it does not fit."""
    state = {key: value for key, value in read_weights(path).items() if not key.startswith(spare or "\n")}
    check_complete(network, state, path)
    try:
        unknown = network.load_state_dict(state, strict=False).unexpected_keys
    except RuntimeError as error:
        raise ValueError(f"The weights {path} do not fit: {first_line(error)}") from error
    if unknown:
        raise ValueError(f"The weights {path} are of another network: it has no {', '.join(unknown[:3])}.")


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Return the weights in a file by name."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        while isinstance(state, dict) and ("state_dict" in state or "model" in state):
            state = state["state_dict"] if "state_dict" in state else state["model"]
        return {key.removeprefix("module."): value for key, value in state.items()}
    except Exception as error:
        raise ValueError(f"The weights {path} cannot be read: {first_line(error)}") from error


def check_complete(network: nn.Module, state: dict[str, torch.Tensor], path: Any) -> None:
    """Raise ``ValueError`` if a file lacks weights of a network; it may lack counters of batches."""
    missing = [key for key in network.state_dict() if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(
            f"The weights {path} do not fit: {len(missing)} of the network are not there, such as {missing[0]}."
        )


def known_to(library: str) -> list[str]:
    """Return the names of a library's networks, none where it is not installed."""
    try:
        if library == "timm":
            timm = importlib.import_module("timm")
            return timm.list_models() + timm.list_pretrained()
        models = importlib.import_module("torchvision.models")
        return models.list_models(module=models)
    except ModuleNotFoundError:
        return []


def needed(module: str) -> Any:
    """Import a library of the extra ``train``."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error}. It comes with: pip install "pml-distill[train]"', name=error.name
        ) from None


def in_hub_cache(repository: str) -> bool:
    """Whether timm's weights of this repository are on this machine."""
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)


def announce(name: str) -> None:
    """Say that weights are about to be downloaded."""
    tqdm.write(f"The weights of {name} are not on this machine yet; they are downloaded once and kept.", sys.stderr)


def unknown(name: str, known: Sequence[str]) -> ValueError:
    """Return the error for a name that nobody knows."""
    near = near_names(name, known)
    return ValueError(f"{name} is unknown" + (f"; near are {', '.join(near)}." if near else "."))


def near_names(name: str, known: Sequence[str]) -> list[str]:
    """Return up to three names like this one."""
    return difflib.get_close_matches(name, known, 3, 0.6)


def not_to_be_had(name: str, error: Exception) -> ValueError:
    """Return the error for weights that are missing."""
    return ValueError(f"The weights of {name} cannot be had ({first_line(error)}). {HOW_TO_GIVE}")


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
