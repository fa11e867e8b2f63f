"""The definition of every operator in plain torch: fallback, oracle and documentation in one.

Convolutions of half types are computed in float32 on the CPU, each rounded once. oneDNN 3.12, by which torch
2.13 runs them, has wrong answers in bfloat16 where the CPU has AMX (one column of outputs under a stride; 8
channels under 8 columns of taps; a window as wide as its stride), and in both types reads past small images
that a stride leaps over, which ends the process.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

HALVES = torch.float16, torch.bfloat16


def pair_distance(x: Tensor, metric: str) -> Tensor:  # (B, D) -> (B, B)
    """All pairwise distances of the rows of x; see `kegfast.functional.diversity_loss`."""
    if metric == "cosine":
        zero = x.norm(dim=1, keepdim=True) == 0  # no direction: at distance 1, with gradient 0
        unit = torch.where(zero, 0, x / x.masked_fill(zero, 1).norm(dim=1, keepdim=True))
        return 1 - unit @ unit.T
    delta = x[:, None] - x[None]  # (B, B, D)
    if metric == "l1":
        return delta.abs().mean(2)
    if metric == "sqeuclidean":
        return delta.square().mean(2)
    square = delta.square().sum(2)
    coincident = square == 0  # the norm's gradient there is 0 by definition, not NaN
    return square.masked_fill(coincident, 1).sqrt().masked_fill(coincident, 0)


def diversity_exponent(
    noises: Tensor,  # (B, nz)
    samples: Tensor,  # (B, D)
    metric: str,
    noise_metric: str,
) -> Tensor:  # () float64
    """-mean_ij w(noises_i, noises_j) d(samples_i, samples_j) over all B*B ordered pairs."""
    noises, samples = (x if x.dtype is torch.float64 else x.float() for x in (noises, samples))
    product = pair_distance(noises, noise_metric).double() * pair_distance(samples, metric)
    # 1, or NaN where something is not finite: then every gradient is NaN as well
    finite = 1 + (noises.detach() * 0).sum() + (samples.detach() * 0).sum()
    return -product.mean() * finite


def tucker_conv2d(
    x: Tensor,  # (N, C, H, W)
    first: Tensor,  # (R1, C, 1, 1)
    core: Tensor,  # (R2, R1, kh, kw)
    last: Tensor,  # (K, R2, 1, 1)
    bias: Tensor | None,  # (K,)
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    activation: str | None,
    addend: Tensor | float | None = None,
) -> Tensor:  # (N, K, H', W')
    """Three convolutions in a row: 1x1, core kh x kw, 1x1; then the addend, then the activation."""
    y = _conv2d(_conv2d(x, first), core, None, stride, padding, dilation)
    return finish(_conv2d(y, last, bias), addend, activation)


def finish(
    y: Tensor,  # (N, K, H', W')
    addend: Tensor | float | None,
    activation: str | None,
) -> Tensor:  # (N, K, H', W'), or what it broadcasts to
    """What `tucker_conv2d` does behind its last convolution."""
    y = y if addend is None else y + addend
    return F.relu(y) if activation == "relu" else y


def conv_max_pool2d(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C, kh, kw)
    bias: Tensor | None,  # (K,)
    stride: tuple[int, int],
    padding: tuple[int, int],
    pool: tuple[int, int],
    pool_stride: tuple[int, int],
    pool_padding: tuple[int, int],
    activation: str | None,
) -> Tensor:  # (N, K, U, V)
    """A convolution, the maximum over windows of it, then the activation, which commutes with the maximum."""
    y = F.max_pool2d(_conv2d(x, weight, bias, stride, padding), pool, pool_stride, pool_padding)
    return F.relu(y, inplace=True) if activation == "relu" else y


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype in which torch's convolutions of x are to be trusted."""
    return torch.float32 if x.is_cpu and x.dtype in HALVES else x.dtype


def _conv2d(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C, kh, kw)
    bias: Tensor | None = None,  # (K,)
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:  # (N, K, H', W')
    """torch's, in `computed_in(x)`."""
    dtype = computed_in(x)
    if dtype is x.dtype:
        return F.conv2d(x, weight, bias, stride, padding, dilation)
    casts = torch.is_autocast_enabled(x.device.type)  # it would make them narrow again
    with torch.autocast(x.device.type, enabled=False) if casts else nullcontext():
        wide, bias = (x.to(dtype), weight.to(dtype)), bias if bias is None else bias.to(dtype)
        return F.conv2d(*wide, bias, stride, padding, dilation).to(x.dtype)


def soft_target(
    student: Tensor,  # (B, C) logits
    teacher: Tensor,  # (B, C) logits
    temperature: float,
) -> Tensor:  # ()
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), averaged over the batch."""
    ours, theirs = ((_roomy(x) / temperature).log_softmax(1) for x in (student, teacher))
    return (temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)).to(student.dtype)


def soft_target_gradient(
    student: Tensor,  # (B, C) logits
    teacher: Tensor,  # (B, C) logits
    temperature: float,
) -> Tensor:  # (B, C)
    """The gradient of `soft_target` in the student."""
    ours, theirs = ((_roomy(x) / temperature).softmax(1) for x in (student, teacher))
    return ((ours - theirs) * (temperature / len(student))).to(student.dtype)


def _roomy(x: Tensor) -> Tensor:
    """Half types in float64: divided by a temperature, squared or unsquared, they leave their range."""
    return x.double() if x.dtype in HALVES else x
