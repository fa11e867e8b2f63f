"""The factors of a Tucker-2 layer in the order in which the CPU kernels read them, kept between calls."""

from collections.abc import Callable

import torch
from torch import Tensor


class PackedFactors:
    """Packs a layer's three factors once, and again whenever one of them changes.

    The key of the cache is each factor's address, version and dtype. It also holds the storages it
    was made from, so an address cannot come back as another tensor's. Writes that torch does not
    count (through `.data`) are caught by the operator, which compares samples of the packed buffer
    with the factors in every call.

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
            key = (
                first.data_ptr(), first._version, core.data_ptr(), core._version,
                last.data_ptr(), last._version, core.dtype,
            )  # fmt: skip
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
