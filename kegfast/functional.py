"""What users call: argument checks, then one operator each."""

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from kegfast._util import check
from kegfast._util.check import expected
from kegfast.dispatch.tucker2 import Call, choose, run
from kegfast.ops import _native, diversity, reference
from kegfast.ops._operands import (
    Pair,
    autocast,
    check_activation,
    check_addend,
    check_tucker2,
    is_dense_float,
    tucker2_size,
)
from kegfast.ops.soft_target import fused as _fused_soft_target

Metric = Literal["l1", "sqeuclidean", "l2", "euclidean", "cosine"]
NoiseMetric = Literal["sqeuclidean", "euclidean"]
Reduction = Literal["mean", "sum"]
_REDUCTIONS = ("mean", "sum")


def diversity_loss(
    noises: Tensor,  # (B, nz)
    samples: Tensor,  # (B, ...)
    *,
    metric: Metric = "l1",
    noise_metric: NoiseMetric = "sqeuclidean",
    reduction: Reduction = "mean",
    log: bool = False,
    labels: Tensor | None = None,  # (B,)
) -> Tensor:  # ()
    """exp(-reduce_ij noise_dist_ij * sample_dist_ij) over all B*B ordered pairs (KegNet, eq. 7).

    Args:
        noises: (B, nz) the noise vectors that the samples were made from; more dimensions are flattened.
        samples: (B, ...) the samples; everything after the batch is flattened.
        metric: distance of two samples: "l1" mean |.| (the one used in training), "sqeuclidean"
            (alias "l2") mean square, "euclidean" the norm, "cosine" 1 - cos.
        noise_metric: distance of two noises: "sqeuclidean" mean square (the authors' code),
            "euclidean" the norm (the paper's formula).
        reduction: "mean" over pairs (the code) or "sum" (the paper; underflows to 0 from B = 8 on
            in float32, so use it with log=True).
        log: return the exponent itself, which never underflows.
        labels: (B,) integers on the noises' device; they restrict the pairs to those of equal labels, and
            the mean is over these pairs.

    Returns:
        A scalar in float32, or float64 for float64 samples; gradients flow to samples and to noises,
        once: a gradient of the gradient raises RuntimeError. Where two coordinates, two samples
        ("euclidean") or two noises coincide, the gradient of their distance is 0, and so is that of a
        sample of norm 0 ("cosine"). One number that is not finite makes the loss and its gradients NaN.

        Computation is in float32, or float64 for float64 samples, of rounding error u. Between samples that
        point nearly the same way, the cosine's gradient is a small difference: it is off by about u times
        what it is between unlike ones. Where it is beyond the dtype (samples of tiny norm), it stays at the
        dtype's end. Under "euclidean", pairs closer than 1e-27 of the furthest one's distance (1e-240 in
        float64) pull less than they should.

    Raises:
        TypeError: for something other than dense floating-point tensors of 16, 32 or 64 bits, integer labels.
        ValueError: for shapes, devices or options that do not fit, or nothing to compare.
    """
    distance = check_diversity(noises, samples, metric, noise_metric, reduction, log, labels)
    batch = noises.shape[0]
    if noises.dim() != 2:
        noises = noises.reshape(batch, -1)
    if samples.dim() != 2:
        samples = samples.reshape(batch, -1)
    if labels is not None:
        exponent = _within_groups(noises, samples, distance, noise_metric, reduction, labels)
        return exponent if log else exponent.exp()
    scale = batch**2 if reduction == "sum" else 1
    return _diversity(noises, samples, distance, noise_metric, scale, log)


def _diversity(
    noises: Tensor, samples: Tensor, metric: str, noise_metric: str, scale: float, log: bool
) -> Tensor:  # (B, nz), (B, D) -> ()
    # No CUDA kernel computes in float64.
    wide = samples.is_cuda and torch.float64 in (samples.dtype, noises.dtype)
    if not wide and _native.use_native() and _native.has_kernel("diversity_forward", samples.device):
        return diversity.diversity(noises, samples, metric, noise_metric, scale, log)
    exponent = reference.diversity_exponent(noises, samples, metric, noise_metric)
    return diversity.finish(exponent, samples.dtype, scale, log)


def _within_groups(
    noises: Tensor, samples: Tensor, metric: str, noise_metric: str, reduction: str, labels: Tensor
) -> Tensor:  # (B, nz), (B, D), (B,) -> ()
    """The exponent over pairs of equal labels: a sum of one exponent a label."""
    order = labels.argsort()
    sizes = labels.unique(return_counts=True)[1].tolist()
    pairs = 1 if reduction == "sum" else sum(size**2 for size in sizes)
    groups = zip(noises[order].split(sizes), samples[order].split(sizes), sizes, strict=True)
    exponents = [_diversity(z, x, metric, noise_metric, size**2 / pairs, True) for z, x, size in groups]
    return torch.stack(exponents).sum()


def check_diversity(
    noises: Tensor,
    samples: Tensor,
    metric: str,
    noise_metric: str,
    reduction: str,
    log: bool,
    labels: Tensor | None = None,
) -> str:
    """Raises what `diversity_loss` documents; the metric, without its alias."""
    _check_batch("noises", noises)
    _check_batch("samples", samples)
    if len(noises) != len(samples):
        what = f"a batch of {len(noises)}, one sample a noise"
        raise ValueError(expected("samples", what, samples))
    if noises.device != samples.device:
        raise ValueError(expected("samples", f"on the noises' device {noises.device}", samples))
    if labels is not None:
        _check_groups(labels, noises)
    return check_diversity_options(metric, noise_metric, reduction, log)


def check_diversity_options(metric: str, noise_metric: str, reduction: str, log: bool) -> str:
    """Raises what `diversity_loss` documents of its options; the metric, without its alias."""
    metric = "sqeuclidean" if metric == "l2" else metric
    _check_one_of("metric", metric, diversity.METRICS)
    _check_one_of("noise_metric", noise_metric, diversity.NOISE_METRICS)
    _check_one_of("reduction", reduction, _REDUCTIONS)
    check.flag("log", log)
    return metric


def _check_groups(labels: Tensor, noises: Tensor) -> None:
    what = f"integers of shape ({len(noises)},) on {noises.device}"
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        raise TypeError(expected("labels", what, labels))
    if labels.shape != noises.shape[:1] or labels.device != noises.device:
        raise ValueError(expected("labels", what, labels))


def _check_batch(name: str, x: Tensor) -> None:
    if not is_dense_float(x):
        raise TypeError(expected(name, "a floating-point tensor", x))
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(expected(name, "of shape (batch, ...), with something in it", x))


def _check_one_of(name: str, value: str, names: Collection[str]) -> None:
    if not isinstance(value, str) or value not in names:
        raise ValueError(expected(name, f"one of {', '.join(map(repr, names))}", value))


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
    recompute: bool = False,
    addend: Tensor | float | None = None,
) -> Tensor:  # (N, K, H', W')
    """last(core(first(x))) + bias + addend, then the activation: a Tucker-2 convolution as one operator.

    Args:
        x: (N, C, H, W) input, contiguous or channels_last, or one image (C, H, W).
        first: (R1, C, 1, 1) the 1x1 convolution that projects the input channels.
        core: (R2, R1, kh, kw) the small convolution; it alone has stride, padding and dilation.
        last: (K, R2, 1, 1) the 1x1 convolution that restores the output channels.
        bias: (K,) added after `last`, or None.
        stride, padding, dilation: of the core; an int or a (vertical, horizontal) pair.
        activation: None or "relu", applied in the operator's last store.
        recompute: compute the two intermediates anew in the backward pass instead of keeping them:
            less memory for about a third more time. Forward values are the same.
        addend: what is added before the activation, a residual network's shortcut, or None. On the CPU,
            where nothing needs a gradient, the last store takes one of the output's shape and dtype, best in
            its memory format; torch adds any other, by its rules of broadcasting and types.

    Returns:
        (N, K, H', W') in x's dtype and memory format, (K, H', W') for one image.

    Raises:
        TypeError: for something other than floating-point tensors of one dtype.
        ValueError: for shapes, devices or geometry that do not fit together.
    """
    given = x, first, core, last, bias
    if has_torch_function((*given, addend)):  # torch.fx's proxies, subclasses with a __torch_function__
        return handle_torch_function(
            tucker_conv2d, (*given, addend), x, first, core, last, bias, stride, padding, dilation,
            activation, recompute, addend,
        )  # fmt: skip
    if isinstance(x, Tensor) and x.dim() == 3:
        options = stride, padding, dilation, activation, recompute, addend
        y = tucker_conv2d(x[None], first, core, last, bias, *options)
        return y if isinstance(addend, Tensor) and addend.dim() > 3 else y[0]
    check_activation(activation)
    geometry = check_tucker2(given, stride, padding, dilation)
    check_addend(addend, tucker2_size(x, core, last, geometry), x.device)
    x, first, core, last, bias = autocast(given)
    call = Call(x, (first, core, last, bias), geometry, activation, recompute, addend, None)
    return run(call, choose(call))


def soft_target(
    student: Tensor,  # (B, C) logits
    teacher: Tensor,  # (B, C) logits
    temperature: float = 4.0,
) -> Tensor:  # ()
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), averaged over the batch, in one pass.

    The loss of Hinton, Vinyals and Dean (2015); `kegfast.distillation.losses.soft_target` mixes labels in.

    Args:
        student: (B, C) logits, finite; they alone receive gradients.
        teacher: (B, C) logits of the same dtype and device.
        temperature: T, above 0.

    Returns:
        A scalar in the dtype of the logits.

    Raises:
        ValueError: for shapes, devices or a temperature that do not fit.
        TypeError: for something other than floating-point tensors of one dtype.
    """
    for name, logits in (("student", student), ("teacher", teacher)):
        if not isinstance(logits, Tensor):
            raise TypeError(expected(name, "logits (B, C)", logits))
    if student.dim() != 2 or student.numel() == 0:
        raise ValueError(expected("student", "logits (B, C)", student))
    if teacher.shape != student.shape or teacher.device != student.device:
        what = f"logits of shape {tuple(student.shape)} on {student.device}"
        raise ValueError(expected("teacher", what, teacher))
    if teacher.dtype != student.dtype or not student.is_floating_point():
        raise TypeError(expected("teacher", "of the student's floating-point dtype", teacher))
    check.number("temperature", temperature, above=0)
    teacher = teacher.detach()
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if student.is_cuda else (torch.float32,)
    known = student.dtype in dtypes and _native.has_kernel("soft_target_forward", student.device)
    fused = known and _native.use_native()
    return (_fused_soft_target if fused else reference.soft_target)(student, teacher, temperature)
