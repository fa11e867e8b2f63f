"""The definition of every operator in plain torch: fallback, oracle and documentation in one."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_distance(x: Tensor, metric: str) -> Tensor:  # (B, D) -> (B, B)
    """All pairwise distances of the rows of x; see `kegfast.functional.diversity_loss`."""
    if metric == "cosine":
        unit = F.normalize(x, dim=1, eps=torch.finfo(x.dtype).tiny)
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
) -> Tensor:  # ()
    """-mean_ij w(noises_i, noises_j) d(samples_i, samples_j) over all B*B ordered pairs."""
    return -(pair_distance(noises, noise_metric) * pair_distance(samples, metric)).mean()


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
) -> Tensor:  # (N, K, H', W')
    """Three convolutions in a row: 1x1, core kh x kw, 1x1."""
    y = F.conv2d(F.conv2d(x, first), core, None, stride, padding, dilation)
    y = F.conv2d(y, last, bias)
    return F.relu(y) if activation == "relu" else y
