"""What a layer made of three factors tells of the dense layer that it stands for."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from kegfast._util.modules import two
from kegfast.decomposition.factors import Factors, Side, reconstruct

Dense = nn.Conv2d | nn.Linear


class Factored:
    """Attributes of the dense layer that a layer of `first`, `core` and `last` stands for, all read-only.

    Code that was written for the dense layer reads them: its dtype, its geometry, its weight to fold
    something into. Whoever writes to one gets an error from `nn.Module`.
    """

    core: Dense

    @property
    def factors(self) -> Factors:
        """The weights of the three parts, those of 1x1 convolutions as matrices."""
        first, last = self._sides
        return Factors(
            None if first is None else first.weight.flatten(1),
            self.core.weight,
            None if last is None else last.weight.flatten(1),
        )

    @property
    def rank(self) -> tuple[Side, Side]:
        """(in_rank, out_rank), None for a side without a factor."""
        return self.factors.rank

    @property
    def weight(self) -> Tensor:
        """The dense weight, computed from the factors on each access; gradients flow to them."""
        return reconstruct(self.factors).contiguous()

    @property
    def bias(self) -> Tensor | None:
        """That of the part that runs last."""
        return self._tail.bias

    def reset_parameters(self) -> None:
        """Draws each part's weights anew, as its constructor does."""
        first, last = self._sides
        for part in (first, self.core, last):
            if part is not None:
                part.reset_parameters()

    def extra_repr(self) -> str:
        """The dense layer's sizes and the rank; nothing where a part is of a kind that does not tell them."""
        try:
            return self._sizes()
        except (AttributeError, IndexError):
            return ""

    def _sizes(self) -> str:
        raise NotImplementedError

    @property
    def _sides(self) -> tuple[Dense | None, Dense | None]:
        return getattr(self, "first", None), getattr(self, "last", None)

    @property
    def _parts(self) -> Sequence[Dense]:
        """Those that there are, in the order in which they run."""
        first, last = self._sides
        return tuple(part for part in (first, self.core, last) if part is not None)

    @property
    def _head(self) -> Dense:
        first, _ = self._sides
        return self.core if first is None else first

    @property
    def _tail(self) -> Dense:
        _, last = self._sides
        return self.core if last is None else last


class FactoredConv2d(Factored):
    """Those of an `nn.Conv2d`; `weight` is (K, C, kh, kw)."""

    core: nn.Conv2d
    _parts: Sequence[nn.Conv2d]
    _head: nn.Conv2d
    _tail: nn.Conv2d

    groups, transposed, output_padding = 1, False, (0, 0)

    @property
    def in_channels(self) -> int:
        """C."""
        return self._head.in_channels

    @property
    def out_channels(self) -> int:
        """K."""
        return self._tail.out_channels

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Of the core."""
        return two(self.core.kernel_size)

    @property
    def stride(self) -> tuple[int, int]:
        """Of the core, or of the first part where that leaves out pixels already."""
        (top, left), (down, right) = self._head.stride, self.core.stride
        return (down, right) if self._head is self.core else (top * down, left * right)

    @property
    def padding(self) -> tuple[int, int] | str:
        """Of the core."""
        padding = self.core.padding
        return padding if isinstance(padding, str) else two(padding)

    @property
    def dilation(self) -> tuple[int, int]:
        """Of the core."""
        return two(self.core.dilation)

    @property
    def padding_mode(self) -> Literal["zeros", "reflect", "replicate", "circular"]:
        """Of the core."""
        return self.core.padding_mode

    def _sizes(self) -> str:
        geometry = ("kernel_size", "stride", "padding", "dilation", "rank")
        told = ", ".join(f"{name}={getattr(self, name)}" for name in geometry)
        return f"{self.in_channels}, {self.out_channels}, {told}, bias={self.bias is not None}"


class FactoredLinear(Factored):
    """Those of an `nn.Linear`; `weight` is (out_features, in_features)."""

    core: nn.Linear
    _parts: Sequence[nn.Linear]
    _head: nn.Linear
    _tail: nn.Linear

    @property
    def in_features(self) -> int:
        """Size of the last dimension of the inputs."""
        return self._head.in_features

    @property
    def out_features(self) -> int:
        """Size of the last dimension of the outputs."""
        return self._tail.out_features

    def _sizes(self) -> str:
        told = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{told}, bias={self.bias is not None}"
