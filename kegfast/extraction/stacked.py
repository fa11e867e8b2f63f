"""Several networks of one shape in one module: each layer holds the parameters of all of them.

`copies` networks share every kernel launch and nothing else. Dense layers are one batched matrix
product on (copies, N, features); convolutions and normalizations fold the copies into the channels,
(N, copies * channels, H, W), and keep them apart by groups and by per-channel statistics. Network i of
a stack therefore computes what it would compute alone.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def fold(x: Tensor) -> Tensor:  # (G, N, C, ...) -> (N, G * C, ...)
    """Moves the copies into the channels, where grouped and per-channel layers keep them apart."""
    return x.transpose(0, 1).flatten(1, 2)


def unfold(x: Tensor, copies: int) -> Tensor:  # (N, G * C, ...) -> (G, N, C, ...)
    """The inverse of `fold`."""
    return x.unflatten(1, (copies, -1)).transpose(0, 1)


class StackedLinear(nn.Module):
    """`copies` independent linear layers: (G, N, in) -> (G, N, out), initialized as `nn.Linear` is."""

    def __init__(self, copies: int, in_features: int, out_features: int):
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        weight = torch.empty(copies, in_features, out_features)
        bias = torch.empty(copies, 1, out_features)
        self.weight = nn.Parameter(nn.init.uniform_(weight, -bound, bound))
        self.bias = nn.Parameter(nn.init.uniform_(bias, -bound, bound))

    def forward(self, x: Tensor) -> Tensor:  # (G, N, in)
        return torch.baddbmm(self.bias, x, self.weight)


class StackedStart(nn.Module):
    """`copies` transposed convolutions of a map of one pixel: (G, N, in) -> (N, G * out, *size).

    One batched matrix product, which torch's grouped transposed convolution is not; initialized as that is.
    """

    def __init__(self, copies: int, in_channels: int, out_channels: int, size: Sequence[int]):
        super().__init__()
        self.shape = (*size, out_channels)
        weight = torch.empty(copies * in_channels, out_channels, *size)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        weight = weight.permute(0, 2, 3, 1).reshape(copies, in_channels, -1)  # channels last
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:  # (G, N, in)
        maps = torch.bmm(x, self.weight).unflatten(-1, self.shape)  # (G, N, H, W, out)
        return maps.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)


class StackedNorm(nn.Module):
    """Batch normalization per copy and feature: (G, N, C) -> the same shape."""

    def __init__(self, copies: int, features: int, affine: bool = True):
        super().__init__()
        self.copies = copies
        self.norm = nn.BatchNorm1d(copies * features, affine=affine)

    def forward(self, x: Tensor) -> Tensor:  # (G, N, C)
        return unfold(self.norm(fold(x)), self.copies)


def stacked_mlp(copies: int, sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """`copies` perceptrons: linear, normalization, activation per hidden size, a linear layer last."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes[:-1]):
        layers += [StackedLinear(copies, n_in, n_out), StackedNorm(copies, n_out), activation()]
    return nn.Sequential(*layers, StackedLinear(copies, sizes[-2], sizes[-1]))
