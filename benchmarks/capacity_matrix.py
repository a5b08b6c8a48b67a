"""Which networks of timm and torchvision can shrink, how far, and whether the exported ones compute the same.

    python benchmarks/capacity_matrix.py --out capacity_matrix.csv

Each network has random weights and normalisations that do something. A row for each name and positions: how many
compactors, or why it is refused; the largest difference of the outputs after the insertion; the same, relative to the
largest output, between the network with half of its rows at zero and the exported one, and between that one in PyTorch
and in ONNX Runtime; the shares of parameters and FLOPs that can go. With --peer FOLDER, where Torch-Pruning was
installed by ``pip install --target FOLDER torch-pruning``, the share of FLOPs that its magnitude pruner takes at half
of the channels, or its error, stands beside. A run that was stopped goes on where it was.
"""

import argparse
import csv
import gc
import math
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from pml_distill.capacity import ExportMeter, export, find_compactors, insert_compactors
from pml_distill.utils.report import format_table

NAMES = """
torchvision.resnet18 torchvision.resnet50 torchvision.wide_resnet50_2 torchvision.resnext50_32x4d
torchvision.regnet_y_400mf torchvision.regnet_x_400mf torchvision.mobilenet_v2 torchvision.mobilenet_v3_small
torchvision.mobilenet_v3_large torchvision.efficientnet_b0 torchvision.convnext_tiny torchvision.vgg11
torchvision.vgg11_bn torchvision.densenet121 torchvision.vit_b_32 torchvision.swin_t torchvision.mnasnet0_5
torchvision.shufflenet_v2_x0_5 torchvision.squeezenet1_1 torchvision.googlenet torchvision.alexnet
resnet18 resnet26d seresnet50 resnetblur18 resnetv2_50 resnet50_gn resnext26ts resnext50_32x4d regnetx_002 regnety_002
mobilenetv2_050 mobilenetv3_small_050 mobilenetv3_large_100 mobilenetv4_conv_small efficientnet_b0 efficientnet_lite0
tinynet_e mnasnet_small ghostnet_050 convnext_atto convnextv2_atto convnext_tiny vit_tiny_patch16_224
deit_tiny_patch16_224 deit3_small_patch16_224 vit_small_patch32_224 swin_tiny_patch4_window7_224 mixer_s32_224
resmlp_12_224 vgg11_bn densenet121 repvgg_a0 repvgg_a0.deployed mobileone_s0.deployed fastvit_t8.deployed
edgenext_xx_small mobilevit_xxs hardcorenas_a iresnet18
""".split()
FIELDS = (
    *("network", "positions", "compactors", "refused", "insertion", "export", "onnx", "parameters_that_can_go"),
    *("flops_that_can_go", "peer", "seconds"),
)


class FaceBlock(nn.Module):
    """The block of face recognition networks: normalisation first, PReLU with a weight for each channel."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn2, self.prelu = nn.BatchNorm2d(outputs), nn.PReLU(outputs)
        self.conv2, self.bn3 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv1(self.bn1(x)))
        return self.bn3(self.conv2(self.prelu(out))) + self.downsample(x)


def iresnet18() -> nn.Module:
    """Return a ResNet-18 as face recognition uses it, for images of 112 pixels."""
    widths = [(64, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    blocks = [FaceBlock(*width) for width in [*widths, (512, 512, 1)]]
    head = [nn.BatchNorm2d(512), nn.Dropout(), nn.Flatten(), nn.Linear(512 * 49, 512), nn.BatchNorm1d(512)]
    return nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64), *blocks, *head)


def build(name: str) -> tuple[nn.Module, int]:
    """Return a network and the size of its images."""
    torch.manual_seed(0)
    if name == "iresnet18":
        model, size = iresnet18(), 112
    elif name.startswith("torchvision."):
        import torchvision

        options = {"init_weights": True, "aux_logits": False} if name.endswith("googlenet") else {}
        model = torchvision.models.get_model(name.split(".")[1], **options)
        size = 224 if "vit" in name else 64
    else:
        import timm

        model = timm.create_model(name.split(".")[0])
        if name.endswith(".deployed"):
            model = timm.utils.reparameterize_model(model)
        whole = model.pretrained_cfg["input_size"][1]
        size = whole if model.pretrained_cfg.get("fixed_input_size") or any("mixer" in m for m in [name]) else 64
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            if isinstance(module.weight, nn.Parameter):
                nn.init.uniform_(module.weight, 0.5, 1)  # some begin at zero, which would hide the block
        if type(module).__name__ == "GlobalResponseNorm":
            nn.init.normal_(module.weight, 0, 0.5)
            nn.init.normal_(module.bias, 0, 0.1)
        if isinstance(getattr(module, "gamma", None), nn.Parameter):
            nn.init.ones_(module.gamma)  # a layer scale of 1e-6 would hide the block
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, 0, 0.02)
        if isinstance(getattr(module, "layer_scale", None), nn.Parameter):
            nn.init.ones_(module.layer_scale)
    return model.eval(), size


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())


@torch.no_grad()
def prune(model: nn.Module) -> None:
    """Put half of all rows to zero, at random, and let the others be no identity."""
    for compactor in find_compactors(model).values():
        if compactor.chain.full:
            compactor.weight.add_(0.02 * torch.randn_like(compactor.weight))
        else:
            compactor.weight.mul_(0.8 + 0.4 * torch.rand_like(compactor.weight))
        compactor.weight[torch.randperm(len(compactor.weight))[: len(compactor.weight) // 2]] = 0


def peer(name: str) -> str:
    """Return the share of FLOPs that Torch-Pruning takes with half of all channels, or why it does not."""
    import torch_pruning

    model, size = build(name)
    images = torch.randn(1, 3, size, size)
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("no end within 30 seconds")))
    signal.alarm(30)
    try:
        before, _ = torch_pruning.utils.count_ops_and_params(model, images)
        importance = torch_pruning.importance.MagnitudeImportance(p=2)
        options = {"pruning_ratio": 0.5, "ignored_layers": heads}
        torch_pruning.pruner.MagnitudePruner(model, images, importance, **options).step()
        with torch.no_grad():
            model(images)
        after, _ = torch_pruning.utils.count_ops_and_params(model, images)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:80]
    finally:
        signal.alarm(0)
    return f"{1 - after / before:.2f}"


def row(name: str, positions: str) -> dict[str, object]:
    """Return what one network does in PyTorch."""
    start, (model, size) = time.perf_counter(), build(name)
    images = torch.randn(2, 3, size, size)
    found: dict[str, object] = {"network": name, "positions": positions}
    plain = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        before = model(images)
        try:
            compactors = insert_compactors(model, positions)
        except ValueError as error:
            return found | {"compactors": 0, "refused": str(error).split("shrink (")[-1].split(";")[0][:100]}
        found |= {"compactors": len(compactors), "insertion": f"{float((model(images) - before).abs().max()):.1e}"}
        meter = ExportMeter(model, (3, size, size))
        least, whole = meter.measure(math.inf), meter.measure(0.0)
        # Merged convolutions have biases, which the plain network has not.
        found["parameters_that_can_go"] = f"{1 - least.parameters / plain:.2f}"
        found["flops_that_can_go"] = f"{1 - least.flops / whole.flops:.2f}"
        prune(model)
        found["export"] = f"{difference(export(model)(images), model(images)):.1e}"
    return found | {"seconds": f"{time.perf_counter() - start:.1f}"}


def onnx_difference(name: str, positions: str) -> str:
    """Return how far ONNX Runtime is from PyTorch on the exported network, or the error."""
    import onnxruntime

    model, size = build(name)
    images = torch.randn(2, 3, size, size)
    insert_compactors(model, positions)
    prune(model)
    small = export(model)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = str(Path(folder) / "small.onnx")
            torch.onnx.export(small, (images,), path, dynamo=True, verbose=False)
            session = onnxruntime.InferenceSession(path)
            (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
            return f"{difference(torch.from_numpy(output), small(images)):.1e}"
    except Exception as error:
        return type(error).__name__


def write(rows: list[dict[str, object]], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("capacity_matrix.csv"))
    parser.add_argument("--names", nargs="*", default=NAMES)
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument("--peer", type=Path, help="a folder that Torch-Pruning is installed in")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.peer:
        sys.path.append(str(options.peer))
    rows: list[dict[str, object]] = []
    if options.out.exists():
        rows = [dict(one) for one in csv.DictReader(options.out.open(newline=""))]
    done = {one["network"] for one in rows}
    for name in (name for name in options.names if name not in done):
        beside = peer(name) if options.peer else ""
        gc.collect()
        rows += [row(name, positions) | {"peer": beside} for positions in ("inner", "all")]
        write(rows, options.out)
        print(*rows[-2:], sep="\n", flush=True)
    # Last, and once for each network with the most cut, since it takes longest.
    for one in [] if options.no_onnx else rows:
        if one["positions"] == "all" and one.get("insertion") and not one.get("onnx"):
            one["onnx"] = onnx_difference(str(one["network"]), "all")
            write(rows, options.out)
            print(one["network"], one["onnx"], flush=True)
    print(format_table([{field: str(one.get(field, "")) for field in FIELDS} for one in rows]))


if __name__ == "__main__":
    main()
