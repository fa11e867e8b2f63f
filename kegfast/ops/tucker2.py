"""The compiled operators for torch: fakes, autograd and FLOP formulas of `torch.ops.kegfast`."""

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from kegfast.ops import _native, reference
from kegfast.ops._flops import register_flop_formula
from kegfast.ops._once import once

Pair = tuple[int, int]


def reads_channels_last(x: Tensor) -> bool:  # (N, C, H, W)
    """Whether tucker2 takes x, and gives y, as pixels of contiguous channels (else as planes)."""
    return x.stride(1) == 1 and x.shape[2] * x.shape[3] > 1


def tucker2_output_size(
    height: int, width: int, core: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[int, int]:
    """(H', W') of a convolution with `core` (R2, R1, kh, kw)."""
    sizes = zip((height, width), core.shape[2:], stride, padding, dilation, strict=True)
    rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
    return rows, columns


def _empty_image(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """An empty image batch in the layout that the kernels choose for input x."""
    layout = torch.channels_last if reads_channels_last(x) else torch.contiguous_format
    n, c, h, w = size
    if layout is torch.channels_last:  # exact strides, also where a size of 1 leaves them open
        return x.new_empty((n, h, w, c)).permute(0, 3, 1, 2)
    return x.new_empty(size)


def _is_dense_pixels(x: Tensor) -> bool:  # (N, C, H, W)
    _, c, h, w = x.shape
    return reads_channels_last(x) and x.stride() == (h * w * c, 1, w * c, c)


def _kept_dtype(x: Tensor) -> torch.dtype:
    """Of the intermediates: x's, but for float16 on the CPU, which is computed in float32."""
    return torch.float32 if x.device.type == "cpu" and x.dtype == torch.float16 else x.dtype


def _kept_rank(x: Tensor, rank: int) -> int:
    """The channels of an intermediate: bfloat16 comes in pairs on the CPU."""
    return rank + rank % 2 if x.device.type == "cpu" and x.dtype == torch.bfloat16 else rank


def _tucker2_fake(x, first, core, last, bias, packed, sh, sw, ph, pw, dh, dw, relu):
    size = tucker2_output_size(x.shape[2], x.shape[3], core, (sh, sw), (ph, pw), (dh, dw))
    return _empty_image(x, (x.shape[0], last.shape[0], *size))


def _tucker2_add_fake(x, first, core, last, bias, addend, packed, sh, sw, ph, pw, dh, dw, relu):
    return _tucker2_fake(x, first, core, last, bias, packed, sh, sw, ph, pw, dh, dw, relu)


def _tucker2_forward_fake(x, first, core, last, bias, sh, sw, ph, pw, dh, dw, relu, keep):
    y = _tucker2_fake(x, first, core, last, bias, None, sh, sw, ph, pw, dh, dw, relu)
    n, _, h, w = x.shape
    dtype = _kept_dtype(x)
    if not keep:
        return y, x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
    t1 = x.new_empty((n, h + 2 * ph, w + 2 * pw, _kept_rank(x, core.shape[1])), dtype=dtype)
    t2 = x.new_empty((n, y.shape[2], y.shape[3], _kept_rank(x, core.shape[0])), dtype=dtype)
    return y, t1, t2


def _tucker2_backward_fake(
    gradient, x, t1, t2, first, core, last, ph, pw, dh, dw, need_x, need_first, need_core, need_last
):
    nothing = gradient.new_empty(0)
    grad_x = _empty_image(gradient, x.shape) if need_x else nothing
    needs = zip((first, core, last), (need_first, need_core, need_last), strict=True)
    return grad_x, *(w.new_empty(w.shape) if need else w.new_empty(0) for w, need in needs)


def _tucker2_gradients_fake(
    gradient, y, x, t1, t2, first, core, last, sh, sw, ph, pw, dh, dw, *needs
):  # fmt: skip
    need_x, *need_weights, need_bias = needs
    grad_x = x.new_empty(x.shape if need_x else 0)
    if need_x and _is_dense_pixels(x):
        grad_x = _empty_image(x, x.shape)
    weights = zip((first, core, last), need_weights, strict=True)
    wide = {"dtype": torch.float32}
    grads = [w.new_empty(w.shape if need else 0, **wide) for w, need in weights]
    return grad_x, *grads, x.new_empty(last.shape[0] if need_bias else 0, **wide)


def _tucker2_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    _tucker2_save(ctx, inputs, output)


def _tucker2_save(ctx, inputs, output):
    x, first, core, last, bias, sh, sw, ph, pw, dh, dw, relu, _ = inputs
    y, t1, t2 = output
    ctx.save_for_backward(x, first, core, last, t1, t2, y if relu else None)
    ctx.has_bias, ctx.relu = bias is not None, relu
    # A stride past the image means the same as one to its end, but the gradient visits all of its pixels.
    ctx.stride = min(sh, x.shape[2] + 2 * ph), min(sw, x.shape[3] + 2 * pw)
    ctx.padding = ph, pw
    ctx.dilation = tuple(d if k > 1 else 1 for d, k in zip((dh, dw), core.shape[2:], strict=True))


class _Tucker2(torch.autograd.Function):
    """`torch.ops.kegfast.tucker2_forward` with its gradients, at less cost than the autograd of operators.

    That one reads the operator's schema in each call, which takes longer than a small layer computes.
    """

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = torch.ops.kegfast.tucker2_forward.default(*inputs)
        _tucker2_save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad):
        return _tucker2_backward(ctx, grad)


def tucker2_training(*inputs: Tensor | int | bool | None) -> Tensor:
    """The output of `torch.ops.kegfast.tucker2_forward`, with gradients."""
    if torch.compiler.is_compiling():
        return torch.ops.kegfast.tucker2_forward(*inputs)[0]
    return _Tucker2.apply(*inputs)


def _tucker2_backward(ctx, grad, *_):
    with torch.no_grad():
        grads = _tucker2_gradients(ctx, grad)
    why = "kegfast's compiled tucker2 has no second derivative; run it under kegfast.backend('reference')"
    return *once(why, grads, grad, *ctx.saved_tensors[:4]), *([None] * 8)


def _tucker2_gradients(ctx, grad):
    x, first, core, last, t1, t2, y = ctx.saved_tensors
    *needs, need_bias = ctx.needs_input_grad[:5]
    need_bias = need_bias and ctx.has_bias
    geometry = (*ctx.stride, *ctx.padding, *ctx.dilation)
    if t1.dim() == 1 and any(needs[1:]):  # nothing was kept: recompute
        _, t1, t2 = torch.ops.kegfast.tucker2_forward(x, first, core, last, None, *geometry, False, True)
    if t1.dim() == 4 and t1.shape[3] + t2.shape[3] != core.shape[0] + core.shape[1]:  # ranks made even
        t1, t2 = t1[..., : core.shape[1]].contiguous(), t2[..., : core.shape[0]].contiguous()
    weights = (x, first, core, last)
    fits = _runs_backwards(core, ctx.stride, ctx.padding, ctx.dilation)
    if x.is_cpu and (fits or ctx.dilation == (1, 1)):
        grads = torch.ops.kegfast.tucker2_gradients(
            grad, y, x, t1, t2, first, core, last, *geometry, *needs, need_bias
        )
        every = zip(grads, (*weights, x), (*needs, need_bias), strict=True)
        return [g.to(w.dtype) if need else None for g, w, need in every]
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    if x.is_cuda and fits:
        grads = torch.ops.kegfast.tucker2_backward(grad, x, t1, t2, *weights[1:], *geometry[2:], *needs)
        grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
    else:
        grads = _unfused_gradients(ctx, grad, x, t1, t2, first, core, last, needs)
        grads = [g if g is None else g.to(x.dtype) for g in grads]
    return [*grads, grad.sum((0, 2, 3)) if need_bias else None]


def _runs_backwards(core: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> bool:
    """Whether the gradient of x is the same operator with transposed factors."""
    reach = [d * (k - 1) for k, d in zip(core.shape[2:], dilation, strict=True)]
    return stride == (1, 1) and reach[0] >= padding[0] and reach[1] >= padding[1]


def _unfused_gradients(ctx, grad, x, t1, t2, first, core, last, needs):
    """The chain rule by torch's own convolutions, on the kept intermediates."""
    (ph, pw), h, w = ctx.padding, x.shape[2], x.shape[3]
    need_x, need_first, need_core, need_last = needs
    below_core, below_last = need_x or need_first, need_x or need_first or need_core
    one, zero = (1, 1), (0, 0)
    wide = reference.computed_in(x)
    grad, x, first, core, last = (t.to(wide) for t in (grad, x, first, core, last))

    def step(grad, z, weight, stride, padding, dilation, need_z, need_weight):
        # Some of torch's kernels take no gradient, input or weight of another layout.
        layout = torch.channels_last if reads_channels_last(z) else torch.contiguous_format
        dense = (t.contiguous(memory_format=layout) for t in (grad, z, weight))
        gradients = torch.ops.aten.convolution_backward(
            *dense, None, stride, padding, dilation, False, zero, 1,
            (need_z, need_weight, False),
        )  # fmt: skip
        return gradients[:2]

    if t1.dim() == 4:
        t1, t2 = (t.to(wide).permute(0, 3, 1, 2) for t in (t1[:, ph : ph + h, pw : pw + w], t2))
    else:  # no weight needs a gradient: shapes are all that torch reads
        t1 = x.new_empty((x.shape[0], first.shape[0], h, w))
        t2 = x.new_empty((x.shape[0], core.shape[0], *grad.shape[2:]))
    dz2, dlast = step(grad, t2, last, one, zero, one, below_last, need_last)
    dz1 = dcore = dx = dfirst = None
    if below_last:
        dz1, dcore = step(dz2, t1, core, ctx.stride, ctx.padding, ctx.dilation, below_core, need_core)
    if below_core:
        dx, dfirst = step(dz1, x, first, one, zero, one, need_x, need_first)
    return dx, dfirst, dcore, dlast


def tucker2_flops(
    x_shape: tuple[int, ...],
    first_shape: tuple[int, ...],
    core_shape: tuple[int, ...],
    last_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
) -> int:
    """Multiply-adds times two of the three convolutions."""
    n, c, h, w = x_shape
    _, _, out_h, out_w = out_shape
    r2, r1, kh, kw = core_shape
    per_output = r2 * (r1 * kh * kw + last_shape[0])
    return 2 * n * (h * w * c * r1 + out_h * out_w * per_output)


def _register_tucker2() -> None:
    def tucker2_formula(x, first, core, last, *args, out_shape=None, **kwargs) -> int:
        return tucker2_flops(x, first, core, last, out_shape)

    def forward_formula(x, first, core, last, *args, out_shape=None, **kwargs) -> int:
        return tucker2_flops(x, first, core, last, out_shape[0])

    def backward_formula(
        gradient, x, t1, t2, first, core, last, ph, pw, dh, dw, *needs, out_shape=None, **kwargs
    ) -> int:
        forward = tucker2_flops(x, first, core, last, gradient)
        return forward + (forward if any(needs[1:]) else 0)

    def gradients_formula(gradient, y, x, t1, t2, first, core, last, *args, **kwargs) -> int:
        forward = tucker2_flops(x, first, core, last, gradient)
        return forward + (forward if any(args[7:10]) else 0)

    ops = torch.ops.kegfast
    register_fake("kegfast::tucker2", _tucker2_fake)
    register_fake("kegfast::tucker2_add", _tucker2_add_fake)
    register_fake("kegfast::tucker2_forward", _tucker2_forward_fake)
    register_fake("kegfast::tucker2_backward", _tucker2_backward_fake)
    register_fake("kegfast::tucker2_gradients", _tucker2_gradients_fake)
    register_autograd("kegfast::tucker2_forward", _tucker2_backward, setup_context=_tucker2_setup)
    register_flop_formula(ops.tucker2, tucker2_formula)
    register_flop_formula(ops.tucker2_add, tucker2_formula)
    register_flop_formula(ops.tucker2_forward, forward_formula)
    register_flop_formula(ops.tucker2_backward, backward_formula)
    register_flop_formula(ops.tucker2_gradients, gradients_formula)


if _native._C is not None:
    _register_tucker2()
