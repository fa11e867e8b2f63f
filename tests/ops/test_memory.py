"""Operators refuse tensors whose numbers are not in memory, as torch's convolutions do."""

import pytest
import torch
from needs import needs_native

from kegfast.functional import diversity_loss, soft_target
from kegfast.ops.conv_max_pool import conv_max_pool2d

pytestmark = needs_native
OPERATORS = {
    "conv_max_pool": (conv_max_pool2d, {"x": (2, 3, 8, 8), "weight": (4, 3, 3, 3), "bias": (4,)}),
    "diversity": (diversity_loss, {"noises": (6, 4), "samples": (6, 3, 5)}),
    "soft_target": (soft_target, {"student": (6, 4), "teacher": (6, 4)}),
}
CASES = [(name, argument) for name, (_, shapes) in OPERATORS.items() for argument in shapes]


def emptied(shape: tuple[int, ...]) -> torch.Tensor:
    x = torch.ones(shape)
    x.untyped_storage().resize_(0)
    return x


def shortened(shape: tuple[int, ...]) -> torch.Tensor:
    x = torch.ones(shape)
    x.untyped_storage().resize_(4 * x.numel() - 4)
    return x


def slice_of_nothing(shape: tuple[int, ...]) -> torch.Tensor:
    x = torch.ones(3, *shape)[1]
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("make", [emptied, shortened, slice_of_nothing])
@pytest.mark.parametrize(("name", "argument"), CASES)
def test_storage_that_was_resized(name, argument, make):
    operator, shapes = OPERATORS[name]
    given = {key: torch.randn(shape) for key, shape in shapes.items()}
    with pytest.raises(RuntimeError, match=f"{argument} must be a tensor whose numbers are in memory"):
        operator(**given | {argument: make(shapes[argument])})


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_zeros_that_take_no_memory(name, argument):
    operator, shapes = OPERATORS[name]
    given = {key: torch.randn(shape) for key, shape in shapes.items()}
    zeros = operator(**given | {argument: torch.zeros(shapes[argument])})
    assert torch.equal(operator(**given | {argument: torch._efficientzerotensor(shapes[argument])}), zeros)
