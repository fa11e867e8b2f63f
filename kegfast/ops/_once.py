"""Gradients that can be taken once: nobody has derived theirs, and a wrong one is worse than none."""

from typing import Any

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    """Hands a gradient on; stands for its own gradient."""

    @staticmethod
    def forward(ctx: Any, why: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.why = why
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(ctx.why)


def once(why: str, gradients: list[Tensor | None], *sources: Tensor) -> list[Tensor | None]:
    """The gradients; where autograd records how they follow from `sources`, theirs is RuntimeError(why)."""
    if not torch.is_grad_enabled():
        return gradients
    return [None if g is None else _Once.apply(why, g, *sources) for g in gradients]
