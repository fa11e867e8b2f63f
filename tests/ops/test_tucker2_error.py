"""The fused kernels' float32 error beside that of torch's three convolutions, over the benchmark's layers."""

import pytest
import torch
from needs import needs_native
from tucker2_cases import exact, make

import kegfast
from benchmarks.tucker2_shapes import Shape, shapes
from kegfast.dispatch import cpu
from kegfast.functional import tucker_conv2d
from kegfast.ops import _native, reference

pytestmark = needs_native

# Several images of the small layers: the error of few outputs is a matter of chance.
BATCH = {size: max(1, 1024 // size**2) for size in (7, 8, 14, 16, 28, 32, 56)}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", shapes(), ids=lambda shape: shape.name.replace(" ", "-"))
def test_error_is_at_most_one_and_a_half_times_that_of_the_sequence(
    shape: Shape, channels_last: bool
) -> None:
    kernel = (shape.kernel, shape.kernel)
    geometry = BATCH[shape.size], shape.channels, shape.size, shape.size, *shape.ranks, shape.features, kernel
    tensors, rest = make(
        (*geometry, shape.stride, shape.padding, 1), torch.float32, channels_last=channels_last
    )
    want = exact(tensors, rest)

    def error(y: torch.Tensor) -> float:
        return ((y.double() - want).norm() / want.norm()).item()

    theirs = error(reference.tucker_conv2d(*tensors, *rest, None))
    pairs = [(n, n) for n in rest]
    call = cpu.shape_of(tensors[0], tensors[2], shape.features, pairs)
    forms = _native._C.Tucker2Form
    ran = set()
    try:
        for form in (forms.direct, forms.winograd, forms.automatic):
            _native._C.choose_tucker2(call, form)
            with kegfast.backend("native"):
                assert error(tucker_conv2d(*tensors, *rest)) <= 1.5 * theirs
            ran.add(kegfast.last_kernel().split()[0])
    finally:
        _native._C.choose_tucker2(call, forms.automatic)
    filters = shape.kernel == 3 and min(shape.ranks) >= 32 * shape.stride
    filters &= channels_last or max(shape.ranks) <= 192
    assert ran == ({"direct", "winograd"} if filters else {"direct"})
