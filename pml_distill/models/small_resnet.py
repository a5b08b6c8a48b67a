import torch
from torch import nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (He et al. 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + self.downsample(x)).relu()


class SmallResNet(nn.Module):
    """A residual trunk for small images: a stem of stride 2 and three stages of two basic blocks.

    About 680 * width^2 parameters: 0.69 M at width 32, 0.04 M at width 8.

    Args:
        width: channels of the first stage; the next have 2 and 4 times as many.
        in_channels: 1 for grey images, 3 for colour.

    Shapes:
        images: (B, in_channels, H, W), H and W from 8. Returns the pooled features (B, 4 * width);
        ``output_size`` is their number. The stages are named ``layer1`` to ``layer3``.
    """

    def __init__(self, width: int = 32, in_channels: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(BasicBlock(width, width, 1), BasicBlock(width, width, 1))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(BasicBlock(2 * width, 4 * width, 2), BasicBlock(4 * width, 4 * width, 1))
        self.output_size = 4 * width

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the pooled features."""
        features = self.bn1(self.conv1(images)).relu()
        return self.layer3(self.layer2(self.layer1(features))).mean(dim=(2, 3))
