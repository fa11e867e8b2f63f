"""ResNet-18 and ResNet-50 (He et al. 2016) for timing; random weights."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Convolutions of the given kernel sizes around a shortcut."""

    def __init__(self, channels: int, widths: tuple[int, ...], kernels: tuple[int, ...], stride: int):
        super().__init__()
        steps = [1] * len(widths)
        steps[kernels.index(3)] = stride  # the first 3x3
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        inner = channels
        for width, kernel, step in zip(widths, kernels, steps, strict=True):
            self.convs.append(nn.Conv2d(inner, width, kernel, step, kernel // 2, bias=False))
            self.norms.append(nn.BatchNorm2d(width))
            inner = width
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inner != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, inner, 1, stride, bias=False), nn.BatchNorm2d(inner)
            )

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            if i < len(self.convs) - 1:
                y = torch.relu(y)
        return torch.relu(y + self.shortcut(x))


def _resnet(depths: tuple[int, ...], expansion: int) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    channels = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        for block in range(depth):
            stride = 2 if stage > 0 and block == 0 else 1
            if expansion == 1:
                layers.append(Block(channels, (width, width), (3, 3), stride))
            else:
                layers.append(Block(channels, (width, width, 4 * width), (1, 3, 1), stride))
            channels = expansion * width
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
    return nn.Sequential(*layers, *pool)


def resnet18() -> nn.Sequential:
    """11.7 million parameters."""
    return _resnet((2, 2, 2, 2), 1)


def resnet50() -> nn.Sequential:
    """25.6 million parameters."""
    return _resnet((3, 4, 6, 3), 4)
