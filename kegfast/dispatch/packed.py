"""What a Tucker-2 layer keeps between calls on the CPU: packed factors, and the last call, settled."""

from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from kegfast.ops import _native
from kegfast.ops._operands import check_in_memory

if TYPE_CHECKING:
    from kegfast.dispatch.tucker2 import Call

Weights = tuple[Tensor, Tensor, Tensor, Tensor | None]  # first, core, last, bias
Copies = tuple[Tensor, Tensor, Tensor]


class OwnMemory:
    """Kept between calls by one object alone: copies and pickles of it are empty."""

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return type(self)()


def copies_of(weights: Weights) -> Copies | None:
    """The factors' bytes as they are now; None where they leave gaps in memory, or overlap."""
    check_in_memory(
        **dict(zip(("first", "core", "last"), weights[:3], strict=True))
    )  # torch's clone does not
    first, core, last = (w.detach().clone() for w in weights[:3])
    strides = (w.stride() == copy.stride() for w, copy in zip(weights[:3], (first, core, last), strict=True))
    return (first, core, last) if all(strides) else None


def holds(copies: Copies | None, weights: Weights) -> bool:
    """Whether the factors still are, byte for byte, what they were: one read of both."""
    return copies is not None and _native._C.same_bytes(weights[:3], copies)


class PackedFactors(OwnMemory):
    """Packs a layer's three factors once, and again whenever a byte of them changes, however it was written.

    Attributes:
        copies: per memory layout, the factors as they were packed.
    """

    def __init__(self) -> None:
        # One entry per memory layout: key, buffer, copies. Replaced as a whole, so that another
        # thread meets one state or the other.
        self._entries: list[tuple[tuple[object, ...], Tensor, Copies] | None] = [None, None]

    def __call__(
        self, weights: Weights, stride: tuple[int, int], dilation: tuple[int, int], channels_last: bool
    ) -> tuple[Tensor, Copies] | None:
        """The packed buffer for `torch.ops.kegfast.tucker2` and the bytes that it was made of.

        None for factors that leave gaps in memory, which the operator packs in each call.
        """
        key = stride, dilation, _native._C.tucker2_winograd()
        entry = self._entries[channels_last]
        if entry is None or entry[0] != key or not holds(entry[2], weights):
            copies = copies_of(weights)
            if copies is None:
                return None
            packed = torch.ops.kegfast.tucker2_pack(*copies, *stride, *dilation, channels_last)
            entry = self._entries[channels_last] = key, packed, copies
        return entry[1], entry[2]


class SettledCall(OwnMemory):
    """Repeats a layer's last call without the dispatcher.

    That costs more than a small layer computes, and out of cache, after other layers' work, a tenth of a
    millisecond: a sixth of 256 -> 256 on 14 x 14 at ranks 32/32 and batch 8.

    Taken only where nothing could tell the difference: float32, or bfloat16 where the CPU multiplies it; the
    shape, modules, options and factors of last time, the latter compared byte for byte; plain tensors in a
    thread that nobody watches (`kegfast.dispatch.plain`).

    Attributes:
        call: what `repeat` takes; None: there is none.
    """

    def __init__(self) -> None:
        self.call: object | None = None
        self._seen: tuple[object, ...] = ()

    def learn(self, call: "Call", packed: tuple[Tensor, Copies], parts: object, final: bool) -> None:
        """Settles the call that has just been made, when it is the second of its shape in a row.

        `parts`: the modules as they were seen. `final`: the factors' bytes need no comparison.
        """
        x, factors = call.x, call.weights[:3]
        seen, self._seen = self._seen, (x.shape, x.stride())
        if seen != self._seen or not is_dense(x):
            return
        pairs = x.dtype is torch.bfloat16 and _native._C.pairs_bfloat16()
        if x.dtype is not torch.float32 and not pairs:
            return
        buffer, copies = packed
        self.call = _native._C.settle_tucker2(
            parts=parts,
            activation=call.activation,
            x=x,
            weights=call.weights,
            copies=copies,
            packed=buffer,
            addend=call.addend,
            final=final and not any(w.is_inference() for w in factors),  # these count no versions
            geometry=call.ints,
        )


def is_dense(x: Tensor) -> bool:
    """Whether x, of four dimensions, is all of its memory in one of the two layouts."""
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
