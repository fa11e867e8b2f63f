"""Residual networks for 32x32 images (He et al. 2016, section 4.2): ResNet14, and those of 6 n + 2 layers."""

import torch.nn.functional as F
from torch import Tensor, nn

from kegfast._util import check


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalization around a shortcut without parameters (option A).

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out; the shortcut appends zeros for the missing ones.
        stride: stride of the first convolution; the shortcut subsamples by it.
        bias: whether the convolutions have biases.
        centered: whether half of the appended zeros come before the channels, half behind; all behind if not.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, bias: bool = True, centered: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        extra = out_channels - in_channels
        self.extra = (extra // 2, extra - extra // 2) if centered else (0, extra)

    def forward(
        self,
        x: Tensor,  # (N, in_channels, H, W)
    ) -> Tensor:
        """Features (N, out_channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """The input, subsampled and padded to the block's output."""
        if self.stride == 1 and not any(self.extra):
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.extra))


class ResNet14(nn.Module):
    """A 3x3 convolution, three stages of two blocks (16, 32, 64 channels), average pooling, one linear layer.

    Args:
        in_channels: channels of the images.
        num_classes: number of logits.

    Raises:
        TypeError, ValueError: one of them is no positive int.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        check.counts(in_channels=in_channels, num_classes=num_classes)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.layers1 = _stage(16, 16, stride=1)
        self.layers2 = _stage(16, 32, stride=2)
        self.layers3 = _stage(32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)

    def forward(
        self,
        x: Tensor,  # (N, in_channels, H, W), 32x32 in the paper
    ) -> Tensor:
        """Logits (N, num_classes)."""
        x = F.relu(self.norm1(self.conv1(x)))
        x = self.layers3(self.layers2(self.layers1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride), BasicBlock(out_channels, out_channels, 1)
    )


class CifarResNet(nn.Module):
    """He et al.'s residual network for CIFAR, with the state-dict keys of the published ResNet-20 to -1202.

    Args:
        depth: 6 n + 2 layers, n blocks in each of three stages: 20, 32, 44, 56, ...
        num_classes: number of logits.

    Raises:
        TypeError, ValueError: `depth` is no such number, or `num_classes` no positive int.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10) -> None:
        super().__init__()
        self.layer1: nn.Sequential
        self.layer2: nn.Sequential
        self.layer3: nn.Sequential
        blocks, rest = divmod(check.count("depth", depth, least=8) - 2, 6)
        if rest:
            raise ValueError(check.expected("depth", "6 n + 2", depth))
        check.count("num_classes", num_classes)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for number, (before, channels) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            first = BasicBlock(before, channels, min(number, 2), bias=False, centered=True)
            others = (BasicBlock(channels, channels, 1, bias=False, centered=True) for _ in range(blocks - 1))
            self.add_module(f"layer{number}", nn.Sequential(first, *others))
        self.linear = nn.Linear(64, num_classes)

    def forward(
        self,
        x: Tensor,  # (N, 3, H, W), 32x32 in the paper
    ) -> Tensor:
        """Logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return self.linear(x.mean((2, 3)))
