"""The diversity operators for torch: fakes, autograd and FLOP formulas."""

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel, register_autograd, register_fake

from kegfast.ops import _native  # noqa: F401  (loads the operators)
from kegfast.ops._flops import register_flop_formula
from kegfast.ops._once import once

METRICS = {"l1": 0, "sqeuclidean": 1, "euclidean": 2, "cosine": 3}
"""The sample metrics by their number in `torch.ops.kegfast.diversity_forward`."""
NOISE_METRICS = {"sqeuclidean": 0, "euclidean": 1}
ONCE = "kegfast: the diversity loss can be differentiated once, got a gradient of its gradient"


def _widened(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _gradients_fake(noises, samples, noise_grad, sample_grad):
    wanted = (noises, noise_grad), (samples, sample_grad)
    return [x.new_empty(x.shape if want else (0,), dtype=_widened(x)) for x, want in wanted]


def _forward_fake(noises, samples, metric, noise_metric, noise_grad, sample_grad):
    gradients = _gradients_fake(noises, samples, noise_grad, sample_grad)
    return samples.new_empty((), dtype=torch.float64), *gradients


def _loss_fake(noises, samples, metric, noise_metric, scale, log, noise_grad, sample_grad):
    gradients = _gradients_fake(noises, samples, noise_grad, sample_grad)
    return samples.new_empty((), dtype=_widened(samples)), *gradients


def _diversity_save(ctx, inputs, output):
    noises, samples = inputs[:2]
    ctx.dtypes = noises.dtype, samples.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(noises, samples, *output[1:])


def _diversity_gradients(ctx, grad, *_):
    with torch.no_grad():
        found = zip(ctx.saved_tensors[2:], ctx.dtypes, ctx.needs_input_grad, strict=False)
        gradients = [(g * grad.to(g.dtype)).to(dtype) if need else None for g, dtype, need in found]
    return *once(ONCE, gradients, grad, *ctx.saved_tensors[:2]), None, None, None, None


class _Diversity(torch.autograd.Function):
    """The eager path: one node, and one buffer of the samples' size.

    The gradient that the forward pass leaves is scaled in place and handed on; a second backward
    pass through a retained graph computes it anew.

    At 32 x 1024 with cold caches a step takes 0.25 ms, of which the operator's own code takes 0.06 and a
    node that does nothing, with torch.autograd.grad, 0.12. Loss and scale in the operator, and outputs
    allocated past the dispatcher, brought it down from 0.36.
    """

    @staticmethod
    def forward(ctx, noises, samples, metric, noise_metric, scale, log):  # -> ()
        noise_grad, sample_grad = ctx.needs_input_grad[:2]
        value, *ctx.gradients = _evaluate(
            noises, samples, metric, noise_metric, scale, log, noise_grad, sample_grad
        )
        ctx.arguments = metric, noise_metric, scale, log
        ctx.save_for_backward(noises, samples, value)
        return value

    @staticmethod
    def backward(ctx, grad):  # ()
        if not torch.is_grad_enabled():
            return _Diversity.scaled(ctx, grad)
        with torch.no_grad():
            found = _Diversity.scaled(ctx, grad)
        return *once(ONCE, found[:2], grad, *ctx.saved_tensors[:2]), *found[2:]

    @staticmethod
    def scaled(ctx, grad):
        """The gradients of all arguments."""
        noises, samples, value = ctx.saved_tensors
        noise_grad, sample_grad = ctx.needs_input_grad[:2]
        found, ctx.gradients = ctx.gradients, None
        if found is None:
            found = _evaluate(noises, samples, *ctx.arguments, noise_grad, sample_grad)[1:]
        factor = grad if ctx.arguments[3] else grad * value
        noise_gradient = _scale(found[0], factor, noises.dtype) if noise_grad else None
        sample_gradient = _scale(found[1], factor, samples.dtype) if sample_grad else None
        return noise_gradient, sample_gradient, None, None, None, None


def _scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    gradient.mul_(factor)
    return gradient if gradient.dtype is dtype else gradient.to(dtype)


def _evaluate(noises, samples, metric, noise_metric, scale, log, noise_grad, sample_grad):
    """The loss in the samples' widened dtype, and the gradients of the exponent."""
    if samples.is_cpu:
        arguments = metric, noise_metric, scale, log, noise_grad, sample_grad
        return _operator(noises, samples, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        arguments = metric, noise_metric, noise_grad, sample_grad
        exponent, *gradients = torch.ops.kegfast.diversity_forward.default(noises, samples, *arguments)
        if scale != 1:
            gradients = [g.mul_(scale) for g in gradients]
    return finish(exponent, samples.dtype, scale, log), *gradients


def finish(exponent: Tensor, dtype: torch.dtype, scale: float, log: bool) -> Tensor:
    """The loss () from the float64 exponent (); samples of half types give a float32 loss."""
    if scale != 1:
        exponent = exponent * scale
    value = exponent if log else exponent.exp()
    return value if dtype is torch.float64 else value.to(torch.float32)


def diversity(
    noises: Tensor,  # (B, nz)
    samples: Tensor,  # (B, D)
    metric: str,
    noise_metric: str,
    scale: float = 1,
    log: bool = False,
) -> Tensor:  # ()
    """exp(scale * exponent), or with `log` scale * exponent, by the compiled operator."""
    numbers = METRICS[metric], NOISE_METRICS[noise_metric]
    if not torch.compiler.is_compiling():
        return _Diversity.apply(noises, samples, *numbers, scale, log)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (noises, samples)]
    exponent = torch.ops.kegfast.diversity_forward(noises, samples, *numbers, *needs)[0]
    return finish(exponent, samples.dtype, scale, log)


def _register_diversity() -> None:
    def formula(noises, samples, *args, out_shape=None, **kwargs) -> int:
        (batch, width), features = noises, samples[1]
        return 4 * batch * features * (width + 2)  # a prefix sum and a product for each number

    name = "kegfast::diversity_forward"
    register_fake(name, _forward_fake)
    register_fake("kegfast::diversity_loss", _loss_fake)
    register_autograd(name, _diversity_gradients, setup_context=_diversity_save)
    # _Diversity is its autograd: on the way to the kernel nothing is left to do.
    _library.impl("diversity_loss", fallthrough_kernel, "Autograd")
    register_flop_formula(torch.ops.kegfast.diversity_forward, formula)
    register_flop_formula(torch.ops.kegfast.diversity_loss, formula)


_library = Library("kegfast", "IMPL")  # registrations end with it
if hasattr(torch.ops.kegfast, "diversity_forward"):
    _register_diversity()
    _operator = torch.ops.kegfast.diversity_loss.default  # found once, not at each step
