"""Networks with random statistics, and with rows of their compactors zeroed at random."""

import timm
import torch
import torchvision
from torchvision.models.resnet import Bottleneck, ResNet

from pml_distill.capacity import insert_compactors
from pml_distill.models import SmallResNet

NETWORKS = {
    "torchvision resnet18": torchvision.models.resnet18,
    "torchvision resnet50": torchvision.models.resnet50,
    "torchvision resnet101": torchvision.models.resnet101,
    "torchvision, wide": lambda: ResNet(Bottleneck, [1, 2, 1, 1], width_per_group=128),
    "timm resnet50": lambda: timm.create_model("resnet50"),
    "timm resnet18": lambda: timm.create_model("resnet18"),
    "timm resnetaa50": lambda: timm.create_model("resnetaa50"),
    "timm resnet50, drop_block": lambda: timm.create_model("resnet50", drop_block_rate=0.1, drop_path_rate=0.1),
    "timm seresnet50t": lambda: timm.create_model("seresnet50t"),
    "SmallResNet": lambda: SmallResNet(width=8, in_channels=3),
}


def network(name):
    """In eval mode, with normalisations that do something."""
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
            torch.nn.init.uniform_(module.weight, 0.5, 1)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return model


def pruned(name, positions="inner", share=0.6):
    """A network with compactors that mix channels, a share of whose rows is zero, and one row left in one of them."""
    model = network(name)
    compactors = insert_compactors(model, positions)
    with torch.no_grad():
        for compactor in compactors.values():
            compactor.weight.add_(0.02 * torch.randn_like(compactor.weight))
            compactor.weight[torch.rand(len(compactor.weight)) < share] = 0
        next(iter(compactors.values())).weight[1:] = 0
        next(iter(compactors.values())).weight[0] = 1
    return model


def images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
