"""The soft-target operator for torch: fake, autograd and FLOP formula of `kegfast::soft_target_forward`."""

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from kegfast.ops import _native, reference  # noqa: F401  (native loads the operators)
from kegfast.ops._flops import register_flop_formula


def fused(
    student: Tensor,  # (B, C) float32 logits
    teacher: Tensor,  # (B, C) float32 logits
    temperature: float,
) -> Tensor:  # ()
    """`kegfast.reference.soft_target` by the compiled operator."""
    want_gradient = student.requires_grad and torch.is_grad_enabled()
    return torch.ops.kegfast.soft_target_forward(student, teacher, temperature, want_gradient)[0]


def _fake(student, teacher, temperature, want_gradient):
    return student.new_empty(()), student.new_empty(student.shape if want_gradient else 0)


def _save(ctx, inputs, output):
    student, teacher, ctx.temperature, ctx.has_gradient = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(student, teacher, output[1])


def _gradients(ctx, grad, _):
    student, teacher, gradient = ctx.saved_tensors
    if torch.is_grad_enabled() or not ctx.has_gradient:  # to be differentiated again
        gradient = reference.soft_target_gradient(student, teacher, ctx.temperature)
    return grad * gradient, None, None, None


def _flops(student, teacher, temperature, want_gradient, *, out_shape=None, **_) -> int:
    """Per entry: 2 exponentials of 16 operations, 9 for the sums, 3 for the gradient."""
    return student[0] * student[1] * (44 if want_gradient else 41)


if hasattr(torch.ops.kegfast, "soft_target_forward"):
    register_fake("kegfast::soft_target_forward", _fake)
    register_autograd("kegfast::soft_target_forward", _gradients, setup_context=_save)
    register_flop_formula(torch.ops.kegfast.soft_target_forward, _flops)
