"""The fused Tucker-2 convolution in bfloat16 against float64 of the same rounded numbers."""

import pytest
import torch
from needs import needs_native
from tucker2_cases import GEOMETRIES, exact, make, relative_error

import kegfast
from kegfast.functional import tucker_conv2d
from kegfast.ops import reference

pytestmark = needs_native

SHAPES = GEOMETRIES | {
    "wide": (2, 128, 14, 14, 64, 64, 128, (3, 3), 1, 1, 1),
    "strided": (2, 64, 15, 13, 32, 48, 64, (3, 3), 2, 1, 1),
    "odd channels, odd rank": (2, 33, 12, 12, 17, 19, 35, (3, 3), 1, 1, 1),
    "rank 7": (2, 16, 9, 9, 7, 7, 8, (3, 3), 1, 1, 1),
}


UNIT_ROUNDOFF = 2.0**-9  # what storing y costs alone, on outputs so few that it does not average


def levels() -> list[str]:
    info = kegfast.build_info()
    names = info["isa_compiled"]
    return names[: names.index(info["isa_detected"]) + 1] if info["native"] else []


@pytest.mark.parametrize("isa", levels())
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_error_is_that_of_torch_convolutions(name: str, channels_last: bool, isa: str) -> None:
    tensors, rest = make(SHAPES[name], torch.bfloat16, channels_last=channels_last)
    for activation in (None, "relu"):
        want = exact(tensors, rest, activation)
        theirs = relative_error(reference.tucker_conv2d(*tensors, *rest, activation), want)
        with kegfast.cpu_isa(isa):
            error = relative_error(tucker_conv2d(*tensors, *rest, activation), want)
        assert want.norm() == 0 or error <= max(1.5 * theirs, UNIT_ROUNDOFF), (error, theirs)


@pytest.mark.parametrize("isa", levels())
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["3x3", "rank 2", "odd channels, odd rank", "strided", "wide", "dilated"])
def test_gradient_errors_are_those_of_torch_convolutions(name: str, channels_last: bool, isa: str) -> None:
    tensors, rest = make(SHAPES[name], torch.bfloat16, channels_last=channels_last)

    def gradients(function, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        y = function(*leaves, *rest, None)
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        return torch.autograd.grad(y, leaves, seed.to(dtype))

    wants = gradients(reference.tucker_conv2d, torch.float64)
    theirs = gradients(reference.tucker_conv2d, torch.bfloat16)
    with kegfast.cpu_isa(isa):
        ours = gradients(tucker_conv2d, torch.bfloat16)
    for got, their, want in zip(ours, theirs, wants, strict=True):
        assert relative_error(got, want) <= max(1.5 * relative_error(their, want), UNIT_ROUNDOFF)
