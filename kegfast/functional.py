"""What users call: argument checks, then one operator each."""

from typing import Literal

import torch
from torch import Tensor

from kegfast import reference
from kegfast.check import expected

Metric = Literal["l1", "sqeuclidean", "l2", "euclidean", "cosine"]
NoiseMetric = Literal["sqeuclidean", "euclidean"]
Pair = int | tuple[int, int]


def diversity_loss(
    noises: Tensor,  # (B, nz)
    samples: Tensor,  # (B, ...)
    *,
    metric: Metric = "l1",
    noise_metric: NoiseMetric = "sqeuclidean",
    reduction: Literal["mean", "sum"] = "mean",
    log: bool = False,
) -> Tensor:  # ()
    """exp(-reduce_ij noise_dist_ij * sample_dist_ij) over all B*B ordered pairs (KegNet, eq. 7).

    Args:
        noises: (B, nz) the noise vectors that the samples were made from.
        samples: (B, ...) the samples; everything after the batch is flattened.
        metric: distance of two samples: "l1" mean |.| (the one used in training), "sqeuclidean"
            (alias "l2") mean square, "euclidean" the norm, "cosine" 1 - cos.
        noise_metric: distance of two noises: "sqeuclidean" mean square (the authors' code),
            "euclidean" the norm (the paper's formula).
        reduction: "mean" over pairs (the code) or "sum" (the paper; underflows to 0 from B = 8 on
            in float32, so use it with log=True).
        log: return the exponent itself, which never underflows.

    Returns:
        A scalar; gradients flow to samples and to noises.
    """
    if noises.shape[0] != samples.shape[0]:
        raise ValueError(expected("samples", f"a batch of {noises.shape[0]}, one sample a noise", samples))
    metric = "sqeuclidean" if metric == "l2" else metric
    exponent = reference.diversity_exponent(noises.flatten(1), samples.flatten(1), metric, noise_metric)
    if reduction == "sum":
        exponent = exponent * (noises.shape[0] ** 2)
    return exponent if log else exponent.exp()


def tucker_conv2d(
    x: Tensor,  # (N, C, H, W)
    first: Tensor,  # (R1, C, 1, 1)
    core: Tensor,  # (R2, R1, kh, kw)
    last: Tensor,  # (K, R2, 1, 1)
    bias: Tensor | None = None,  # (K,)
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    activation: Literal["relu"] | None = None,
) -> Tensor:  # (N, K, H', W')
    """last(core(first(x))) + bias, then the activation: a Tucker-2 convolution as one operator.

    Args:
        x: (N, C, H, W) input, contiguous or channels_last.
        first: (R1, C, 1, 1) the 1x1 convolution that projects the input channels.
        core: (R2, R1, kh, kw) the small convolution; it alone has stride, padding and dilation.
        last: (K, R2, 1, 1) the 1x1 convolution that restores the output channels.
        bias: (K,) added after `last`, or None.
        stride, padding, dilation: of the core; an int or a (vertical, horizontal) pair.
        activation: None or "relu", applied in the operator's last store.

    Returns:
        (N, K, H', W') in x's dtype and memory format.
    """
    pair = torch.nn.modules.utils._pair
    return reference.tucker_conv2d(
        x, first, core, last, bias, pair(stride), pair(padding), pair(dilation), activation
    )
