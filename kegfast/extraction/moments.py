"""A frozen batch normalization that also says what it was given: mean and variance, with a gradient."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from kegfast._util.check import expected

_EPS = 1e-5  # inside torch's inverse deviation; taken out again


class NormMoments(NamedTuple):
    """A BatchNorm layer, and per generator the mean and biased variance of each channel of its input."""

    layer: _BatchNorm
    mean: Tensor  # (G, C)
    variance: Tensor  # (G, C)


class _WatchedNorm(torch.autograd.Function):
    """y = scale x + shift per channel, and the moments of x per copy.

    All passes are torch's own batch normalization, which is fast in every dtype and layout; `var_mean`
    and its chain of elementwise gradients cost six times as much in bfloat16 on a CPU. One node instead
    of one per output: the gradients of y and of all moments meet in one buffer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (G * N, C, ...)
        scale: Tensor,  # (C,)
        shift: Tensor,  # (C,)
        copies: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # (G * N, C, ...), (G, C), (G, C)
        zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
        y = F.batch_norm(x, zeros, ones, scale, shift, eps=0.0)
        moments = [
            torch.native_batch_norm(own, ones, zeros, None, None, True, 0.0, _EPS)[1:]
            for own in x.chunk(copies)
        ]
        mean, inverse = (torch.stack(part) for part in zip(*moments, strict=True))
        ctx.copies = copies
        ctx.save_for_backward(x, scale, mean)
        return y, mean, (inverse.square().reciprocal() - _EPS).clamp_min(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor, grad_variance: Tensor) -> tuple[Any, ...]:
        x, scale, mean = ctx.saved_tensors
        zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
        total = F.batch_norm(grad, zeros, ones, scale, zeros, eps=0.0)
        # d mean / d x = 1 / count, d variance / d x = 2 (x - mean) / count: an affine map per channel
        count = x.numel() / x.shape[1] / ctx.copies
        slope, offset = 2 / count * grad_variance, grad_mean / count
        for i, (own, part) in enumerate(zip(x.chunk(ctx.copies), total.chunk(ctx.copies), strict=True)):
            part.add_(F.batch_norm(own, mean[i], ones, slope[i], offset[i], eps=0.0))
        return total, None, None, None


def running_statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:  # (C,), (C,)
    """The mean and the variance that a BatchNorm layer remembers."""
    mean, variance = layer.running_mean, layer.running_var
    if mean is None or variance is None:
        raise ValueError(expected("layer", "a BatchNorm with running statistics", layer))
    return mean, variance


def watched_norm(
    x: Tensor,  # (G * N, C, ...)
    layer: _BatchNorm,  # with running statistics
    copies: int,
) -> tuple[Tensor, NormMoments]:
    """What a BatchNorm layer in eval mode makes of x, and the moments of x, in float32 for narrower x.

    No gradient goes to the layer's own parameters.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, variance = running_statistics(layer)
    with torch.no_grad():
        scale = torch.rsqrt(variance + layer.eps)
        shift = -mean * scale
        if layer.affine:
            scale, shift = scale * layer.weight, shift * layer.weight + layer.bias
    y, mean, variance = _WatchedNorm.apply(x, scale.to(dtype), shift.to(dtype), copies)
    return y, NormMoments(layer, mean, variance)
