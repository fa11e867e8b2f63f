"""The layers that Tucker-2 convolutions are measured on: LeNet's, CIFAR's and ResNet's."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """One layer of the grid: C -> K channels on size x size pixels."""

    family: str
    channels: int
    features: int
    size: int
    ranks: tuple[int, int]
    kernel: int = 3
    padding: int = 1
    stride: int = 1

    @property
    def name(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        r1, r2 = self.ranks
        return f"{self.channels}->{self.features}@{self.size}{stride} ranks {r1}/{r2}"

    def multiply_adds(self, batch: int) -> int:
        """Of the factored layer."""
        r1, r2 = self.ranks
        out = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        per_output = r2 * (r1 * self.kernel**2 + self.features)
        return batch * (self.size**2 * self.channels * r1 + out**2 * per_output)

    def bytes_moved(self, batch: int, dtype: torch.dtype) -> int:
        """Of input and output, each once: the least that any implementation moves."""
        out = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        return batch * dtype.itemsize * (self.size**2 * self.channels + out**2 * self.features)


def shapes() -> list[Shape]:
    """The 17 layers of the grid, each with three pairs of ranks: 51 configurations."""
    lenet = {(6, 16): [(3, 8), (2, 4), (2, 2)], (20, 50): [(10, 25), (5, 12), (2, 6)]}
    grid = [
        Shape("lenet", c, k, 14, ranks, kernel=5, padding=0)
        for (c, k), pairs in lenet.items()
        for ranks in pairs
    ]
    cifar = [(16, 32), (32, 16), (64, 8), (64, 32), (128, 16), (256, 8)]
    resnet = [(64, 56), (128, 28), (256, 14), (512, 7)]
    strided = {"cifar": [(16, 32), (64, 32)], "resnet": [(64, 56), (128, 28), (256, 14)]}
    for share in (2, 4, 8):
        for family, plain in (("cifar", cifar), ("resnet", resnet)):
            grid += [Shape(family, c, c, h, (c // share, c // share)) for c, h in plain]
            grid += [
                Shape(family, c, 2 * c, h, (c // share, 2 * c // share), stride=2) for c, h in strided[family]
            ]
    return grid


def bf16_shapes() -> list[Shape]:
    """The 11 layers that bfloat16 is measured on: ResNet's and CIFAR's wide ones of stride 1, ranks C/4."""
    return [
        s for s in shapes() if s.channels == 4 * s.ranks[0] >= 64 and (s.family == "resnet" or s.stride == 1)
    ]
