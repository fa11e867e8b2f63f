"""What the operators' random cases have in common: layouts, where a case runs, and how far off it may be."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import kegfast

ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
LEAST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149, torch.float64: 0.0}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
SEEDS = st.integers(0, 2**32 - 1)


def isas() -> list[str]:
    """The instruction sets that are compiled and that this CPU has."""
    info = kegfast.build_info()
    names = info["isa_compiled"]
    return names[: names.index(info["isa_detected"]) + 1] if info["native"] else []


if not isas():
    pytest.skip("kegfast's compiled part is not built", allow_module_level=True)

PLACES = st.tuples(st.sampled_from(isas()), st.sampled_from([1, 2]))
"""An instruction set and a number of threads."""


@contextmanager
def running(place: tuple[str, int]) -> Iterator[None]:
    """Runs the kernels there inside the block."""
    isa, threads = place
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with kegfast.cpu_isa(isa):
            yield
    finally:
        torch.set_num_threads(before)


def _wider(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """A copy of x that is a slice, with steps, of a larger tensor full of NaN."""
    shape = [n * factor + factor for n, factor in zip(x.shape, factors, strict=True)]
    slices = tuple(slice(factor - 1, n * factor, factor) for n, factor in zip(x.shape, factors, strict=True))
    view = torch.full(shape, torch.nan, dtype=x.dtype)[slices]
    return view.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second number": lambda x: _wider(x, (1, 1, 1, 2)),
    "rows and channels apart": lambda x: _wider(x, (1, 2, 2, 1)),
    "images apart": lambda x: _wider(x, (2, 1, 1, 1)),
    "pixels apart": lambda x: _wider(x.permute(0, 2, 3, 1), (1, 1, 2, 1)).permute(0, 3, 1, 2),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "images expanded": lambda x: x[:1].expand(x.shape),
    "channels expanded": lambda x: x[:, :1].expand(x.shape),
    "pixels expanded": lambda x: x[:, :, :1, :1].expand(x.shape),
}
"""Images (N, C, H, W) laid out anew; those expanded repeat the first of a dimension."""


def check(got: Tensor, want: Tensor, sizes: Tensor, share: float) -> None:
    """Element by element: rounding to the dtype once, and `share` of the sum of magnitudes.

    Args:
        got: what came.
        want: float64 of the same inputs.
        sizes: float64 of the magnitudes of the same inputs: what rounding errors are proportional to.
        share: of `sizes`.
    """
    assert got.shape == want.shape
    bound = ROUNDOFF[got.dtype] * want.abs() + share * sizes + LEAST[got.dtype]
    wide = got.double()
    beyond = wide.isinf() & (want.sign() == wide.sign()) & (want.abs() + bound > torch.finfo(got.dtype).max)
    off = (torch.where(beyond, want, wide) - want).abs()
    assert bool((off <= bound).all()), (
        f"{got.dtype} off by {(off / bound).max().item():.3g} times its bound: got {got[off > bound][:4]}, "
        f"expected {want[off > bound][:4]} at {(off > bound).nonzero()[:4].tolist()} "
        f"({int((off > bound).sum())} of {off.numel()} numbers)"
    )
