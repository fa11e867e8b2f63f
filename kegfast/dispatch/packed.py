"""What a Tucker-2 layer keeps between calls on the CPU: its packed factors, and the last call, settled."""

from collections.abc import Callable

import torch
from torch import Tensor

from kegfast.ops import _native

_BYSTANDERS = (
    torch._C._len_torch_dispatch_stack, torch.autograd._profiler_enabled, torch._C._is_any_autocast_enabled,
    torch._C._get_tracing_state,
)  # fmt: skip
if _native._C is None:

    def repeat(*_: object) -> None:
        """Nothing was compiled that could repeat a call."""
else:
    _native._C.learn_torch(Tensor, torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs, _BYSTANDERS)
    repeat = _native._C.repeat_tucker2

Weights = tuple[Tensor, Tensor, Tensor, Tensor | None]  # first, core, last, bias


class PackedFactors:
    """Packs a layer's three factors once, and again whenever one of them changes.

    The key of the cache is each factor's address, version, dtype, shape and strides, and `kegfast.tuning`. It
    also holds the storages it was made from, so an address cannot come back as another tensor's. Writes that
    torch does not count (through `.data`) are caught by the operator, which compares samples of the packed
    buffer with the factors in every call.

    Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        # One entry per memory layout: key, buffer, sources. Replaced as a whole, so that another
        # thread meets one state or the other.
        self._entries: list[tuple[tuple[object, ...], Tensor | None, tuple[Tensor, ...]]]
        self._entries = [((), None, ()), ((), None, ())]

    def __call__(
        self,
        first: Tensor,  # (R1, C, 1, 1)
        core: Tensor,  # (R2, R1, kh, kw)
        last: Tensor,  # (K, R2, 1, 1)
        stride: tuple[int, int],
        dilation: tuple[int, int],
        channels_last: bool,
    ) -> Tensor | None:
        """The packed buffer for `torch.ops.kegfast.tucker2`, or None where versions are not kept."""
        try:
            key = tuple((w.data_ptr(), w._version, w.dtype, w.shape, w.stride()) for w in (first, core, last))
            key += (_native._C.tucker2_winograd(),)
        except RuntimeError:  # inference tensors have no version: pack in every call
            return None
        kept, packed, _ = self._entries[channels_last]
        if key != kept:
            sources = (first.detach(), core.detach(), last.detach())
            packed = torch.ops.kegfast.tucker2_pack(*sources, *stride, *dilation, channels_last)
            self._entries[channels_last] = (key, packed, sources)
        return packed

    def __reduce__(self) -> tuple[Callable[[], "PackedFactors"], tuple[()]]:
        return PackedFactors, ()

    def __deepcopy__(self, memo: dict[int, object]) -> "PackedFactors":
        return PackedFactors()


class PreparedCall:
    """Repeats a layer's last call without the dispatcher.

    That costs more than a small layer computes, and out of cache, after other layers' work, a tenth of a
    millisecond: a sixth of 256 -> 256 on 14 x 14 at ranks 32/32 and batch 8.

    Taken only where nothing could tell the difference: float32, or bfloat16 where the CPU multiplies it; the
    shape, options and factors of last time; no mode, tracer, profiler or autocast that wants to see
    operators.

    Copies and pickles of it are empty.

    Attributes:
        settled: the call, for `repeat`; None: there is none.
    """

    def __init__(self) -> None:
        self.settled: object | None = None
        self._seen: tuple[object, ...] = ()

    def learn(
        self,
        x: Tensor,
        weights: Weights,
        options: tuple[object, ...],
        packed: Tensor | None,
        arguments: tuple[int | bool, ...],
        addend: Tensor | None = None,
    ) -> None:
        """Settles the call that has just been made, when it is the second of its shape in a row.

        `options`: all else that decides it.
        """
        if watched():
            return
        seen, self._seen = self._seen, (x.shape, x.stride())
        if packed is None or seen != self._seen or not is_dense(x):
            return
        if x.dtype is not torch.float32 and not (x.dtype is torch.bfloat16 and _native._C.pairs_bfloat16()):
            return
        address = torch.ops.kegfast.tucker2_prepare(x, *weights, addend, packed, *arguments)
        if address:
            kept = tuple(w if w is None else w.detach() for w in weights), packed
            self.settled = _native._C.settle_tucker2(address, x, weights, options, kept)

    def __reduce__(self) -> tuple[Callable[[], "PreparedCall"], tuple[()]]:
        return PreparedCall, ()

    def __deepcopy__(self, memo: dict[int, object]) -> "PreparedCall":
        return PreparedCall()


def watched() -> bool:
    """Whether something wants to see operators, or to change them."""
    return any(asks() for asks in _BYSTANDERS)


def is_dense(x: Tensor) -> bool:
    """Whether x, of four dimensions, is all of its memory in one of the two layouts."""
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
