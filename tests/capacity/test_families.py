"""Kinds of networks that can shrink: exact at the insertion and after the export, and trained in between."""

import copy

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torchvision import models

from pml_distill.capacity import (
    CapacityDynamics,
    ChannelGate,
    ExportMeter,
    RetrievalReset,
    SizeBudget,
    export,
    find_compactors,
    insert_compactors,
    load_compact,
    save_compact,
)
from pml_distill.evaluation import model_cost


class FaceBlock(nn.Module):
    """Of an iResNet: normalisation first, and a PReLU with a weight for each channel."""

    def __init__(self, width):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2, self.prelu = nn.BatchNorm2d(width), nn.PReLU(width)
        self.conv2, self.bn3 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))


class Gated(nn.Module):
    """A gated MLP, and one whose activation turns zeros into a constant."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)
        self.d, self.act, self.e = nn.Linear(12, 20), nn.Sigmoid(), nn.Linear(20, 12)
        self.prelu = nn.PReLU()

    def forward(self, x):
        x = x + self.c(self.prelu(nn.functional.silu(self.a(x)) * self.b(x)))
        return x + self.e(self.act(self.d(x)))


def face_network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.PReLU(16), FaceBlock(16), FaceBlock(16)
    )


def timm_model(name, **options):
    return lambda: timm.create_model(name, num_classes=10, **options)


def small_vit(**options):
    return timm.models.VisionTransformer(32, 8, num_classes=10, embed_dim=24, depth=2, num_heads=2, **options)


def convnext(**options):
    return timm.models.ConvNeXt(num_classes=10, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), **options)


def resnet_v2():
    layers = {"conv_layer": timm.layers.create_conv2d, "norm_layer": timm.layers.BatchNormAct2d}
    return timm.models.ResNetV2([1] * 4, [32, 64, 64, 64], 10, **layers)


def vgg(norm):
    layers = models.vgg.make_layers([16, "M", 16, "M", 24], batch_norm=norm)
    model = models.VGG(layers, num_classes=10)
    model.avgpool = nn.AdaptiveAvgPool2d(3)
    model.classifier = nn.Sequential(nn.Linear(24 * 9, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10))
    return model


def second_round():
    model = models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10).eval()
    for compactor in insert_compactors(model).values():
        compactor.weight.data[::2] = 0
    return export(model)


#: Family: (how to make one, the least number of compactors).
FAMILIES = {
    "MobileNetV2": (lambda: models.mobilenet_v2(width_mult=0.25, num_classes=10), 16),
    "MobileNetV3": (lambda: models.mobilenet_v3_small(width_mult=0.5, num_classes=10), 11),
    "MobileNetV3 of timm": (timm_model("mobilenetv3_small_050"), 11),
    "MobileNetV4": (timm_model("mobilenetv4_conv_small"), 12),
    "EfficientNet": (timm_model("tinynet_e"), 12),
    "EfficientNet-Lite": (timm_model("efficientnet_lite0"), 16),
    "RegNet": (timm_model("regnetx_002"), 12),
    "RegNet with squeezing": (timm_model("regnety_002"), 12),
    "ResNeXt": (lambda: models.ResNet(models.resnet.Bottleneck, [1] * 4, 10, groups=32, width_per_group=1), 4),
    "ResNetV2": (resnet_v2, 8),
    "ResNet with blur": (timm_model("resnetblur18", layers=(1, 1, 1, 1)), 4),
    "VGG": (lambda: vgg(False), 4),
    "VGG with norms": (lambda: vgg(True), 4),
    "DenseNet": (lambda: models.DenseNet(8, (2, 2), 16, num_classes=10), 4),
    "DenseNet of timm": (lambda: timm.models.DenseNet(8, (2, 2), 10), 4),
    "ViT": (small_vit, 2),
    "Swin": (
        lambda: timm.models.SwinTransformer(64, 4, num_classes=10, embed_dim=12, depths=(2, 2), num_heads=(2, 2)),
        4,
    ),
    "Swin of torchvision": (lambda: models.SwinTransformer([4, 4], 12, [2, 2], [2, 2], [4, 4], num_classes=10), 4),
    "ConvNeXt": (convnext, 4),
    "ConvNeXt with convolutions": (lambda: convnext(conv_mlp=True), 4),
    "ConvNeXtV2": (lambda: convnext(use_grn=True, ls_init_value=None), 4),
    "ConvNeXtV2 with convolutions": (lambda: convnext(use_grn=True, ls_init_value=None, conv_mlp=True), 4),
    "iResNet": (face_network, 2),
    "RepVGG, deployed": (lambda: reparameterize_model(timm.create_model("repvgg_a0", num_classes=10)), 20),
    "second round": (second_round, 4),
    "gated MLP": (Gated, 2),
}


def made(name):
    """A network in float64 whose normalisations do something."""
    torch.manual_seed(0)
    model = FAMILIES[name][0]().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
        if isinstance(module, nn.BatchNorm2d) or type(module).__name__ == "GlobalResponseNorm":
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, 0, 0.1)
        elif isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.1)
        if hasattr(module, "gamma") and isinstance(module.gamma, nn.Parameter):
            nn.init.ones_(module.gamma)
    return model


def batch(name):
    generator = torch.Generator().manual_seed(1)
    shape = (2, 5, 12) if name == "gated MLP" else (2, 3, 32, 32) if name == "ViT" else (2, 3, 64, 64)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def pruned(model):
    with torch.no_grad():
        for compactor in find_compactors(model).values():
            if isinstance(compactor, ChannelGate):
                compactor.weight.mul_(0.5 + torch.rand_like(compactor.weight))
            else:
                compactor.weight.add_(0.02 * torch.randn_like(compactor.weight))
            compactor.weight[torch.rand(len(compactor.weight)) < 0.5] = 0
            compactor.weight[0] = 0.7
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_exact_and_trained_and_counted(name):
    model, images = made(name), batch(name)
    plain = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = model(images)
        compactors = insert_compactors(model, "all")
        assert len(compactors) >= FAMILIES[name][1]
        torch.testing.assert_close(model(images), before, rtol=2e-12, atol=2e-12)
    model.load_state_dict(plain)  # plain weights, strictly
    with torch.no_grad():
        torch.testing.assert_close(model(images), before, rtol=2e-12, atol=2e-12)
    model(images).square().sum().backward()
    for key, compactor in compactors.items():
        assert compactor.weight.grad is not None and compactor.weight.grad.isfinite().all(), key
        assert (compactor.weight.grad.flatten(1).norm(dim=1) > 0).any(), key
    pruned(model)
    small = export(model)
    with torch.no_grad():
        expected = model(images)
        assert (expected - before).abs().max() > 1e-6
        torch.testing.assert_close(small(images), expected, rtol=2e-12, atol=2e-12)
    assert not any("capacity" in type(module).__module__ for module in small.modules())
    meter = ExportMeter(model, example_inputs=images[:1])
    cost = meter.measure()
    assert cost.parameters == sum(parameter.numel() for parameter in small.parameters())
    if images.ndim == 4:
        assert cost.flops == model_cost(small.float(), images.shape[1:], ()).flops


@pytest.mark.parametrize("name", ["MobileNetV3 of timm", "ConvNeXtV2", "iResNet", "ResNet with blur", "VGG"])
def test_what_is_exported_comes_back_from_a_file(name, tmp_path):
    model, images = made(name), batch(name)
    plain = copy.deepcopy(model)
    insert_compactors(model)
    small = export(pruned(model), multiple_of=2)
    save_compact(small, tmp_path / "small.safetensors")
    with torch.no_grad():
        assert torch.equal(load_compact(tmp_path / "small.safetensors", plain)(images), small(images))


@pytest.mark.parametrize("name", ["MobileNetV3", "RegNet", "ViT", "VGG"])
def test_a_family_shrinks_to_its_budget_with_its_own_copy_as_teacher(name):
    student, images = made(name).float(), batch(name).float()
    insert_compactors(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    dynamics = CapacityDynamics(
        student,
        optimizer,
        images.shape[1:],
        reset=RetrievalReset(warmup_epochs=0, queue_size=8),
        budget=SizeBudget(flops=0.75, steps=4, multiple_of=4),
    )
    student.train()
    for _ in range(4):
        optimizer.zero_grad()
        student(images).square().mean().backward()
        optimizer.step()
    cost, whole = dynamics.measure(), dynamics.meter.measure(0.0)
    assert dynamics.budget.met and 0.6 * whole.flops < cost.flops <= 0.75 * whole.flops
    for key, width in dynamics.widths().items():
        chain = dynamics.compactors[key].chain
        channels = width * (chain.width // chain.units)
        assert channels % 4 == 0 or width == chain.units
    small = dynamics.export()
    with torch.no_grad():
        expected = student.eval()(images)
        torch.testing.assert_close(small(images), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert sum(parameter.numel() for parameter in small.parameters()) == cost.parameters
