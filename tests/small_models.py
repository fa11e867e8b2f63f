"""Networks small enough for tests."""

from itertools import pairwise

import torch
from torch import nn

SHAPE = (1, 12, 10)  # of image_teacher's samples


def perceptron(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 3),
    )


def agreement(student: nn.Module, teacher: nn.Module) -> float:
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return (student(x).argmax(dim=1) == teacher(x).argmax(dim=1)).float().mean().item()


def image_teacher(num_classes: int = 4, channels: int = 1) -> nn.Module:
    torch.manual_seed(3)
    teacher = nn.Sequential(
        nn.Conv2d(channels, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(num_classes),
    )
    teacher(torch.randn(16, channels, *SHAPE[1:]))  # running statistics and lazy shapes
    return teacher
