import torch
from torch import nn

from .small_resnet import BasicBlock


class CompactResNet(nn.Module):
    """The student of a ResNet-50: a seventh of its parameters, as many features at 224 pixels.

    A 7x7 stem of 64 channels with max pooling, then five stages of 2, 3, 5, 3 and 2 basic blocks with 64, 64,
    128, 128 and 128 channels, each stage but the first with stride 2. There is no global pooling: the output is
    the flattened last map, so that its width depends on the image size, 2048 = 128 x 4 x 4 at 224 pixels and
    128 at 32 and 64.

    At 224 pixels: 3.306 M parameters and 1.087 G multiply-adds (ResNet-50 without classifier: 23.5 M, 4.09 G).

    Source: version 1 of Reddy et al., "Context Unaware Knowledge Distillation for Image Retrieval" (2022).

    Args:
        image_size: side of the square images; decides ``output_size`` alone.
        in_channels: 1 for grey images, 3 for colour.

    Shapes:
        images: (B, in_channels, image_size, image_size). Returns (B, output_size), not negative. The stages are
        named ``layer1`` to ``layer5``.

    Example:
        >>> CompactResNet().output_size, CompactResNet(image_size=32).output_size
        (2048, 128)
    """

    last_width = 128

    def __init__(self, image_size: int = 224, in_channels: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = stage(64, 64, 2, 1)
        self.layer2 = stage(64, 64, 3, 2)
        self.layer3 = stage(64, 128, 5, 2)
        self.layer4 = stage(128, 128, 3, 2)
        self.layer5 = stage(128, self.last_width, 2, 2)
        # Six layers of stride 2, each of which rounds up.
        side = -(-image_size // 64)
        self.output_size = self.last_width * side**2

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the flattened features."""
        features = self.maxpool(self.bn1(self.conv1(images)).relu())
        features = self.layer3(self.layer2(self.layer1(features)))
        return self.layer5(self.layer4(features)).flatten(1)


def stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Return a stage whose first block changes width and size."""
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))
