"""Drop-in layers: a Tucker-2 convolution and a Linear in factors."""

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function

from kegfast import functional
from kegfast._util import check
from kegfast._util.check import expected
from kegfast.decomposition.decompose import factorize
from kegfast.decomposition.ranks import RankRule, layer_rank
from kegfast.dispatch.forms import Form
from kegfast.dispatch.packed import SettledCall
from kegfast.dispatch.tucker2 import LayerMemory, call_of, choose, repeat, run
from kegfast.nn.factors import FactoredConv2d, FactoredLinear
from kegfast.ops import reference
from kegfast.ops._operands import Geometry, Pair, autocasts, check_activation, check_addend, pair


class TuckerConv2d(FactoredConv2d, nn.Module):
    """A Tucker-2 convolution: first 1x1, core kh x kw, last 1x1, run as one fused operator.

    Its state dict is that of the three `nn.Conv2d` that it stands for, and it has the attributes of the dense
    one (`weight`, made on demand, `in_channels`, `stride`, ...), read-only.

    Args:
        in_channels, out_channels: C and K.
        kernel_size: of the core, an int or a (vertical, horizontal) pair.
        rank: (in_rank, out_rank), the core's input and output channels.
        stride, padding, dilation: of the core, each an int or a pair; padding is by zeros.
        bias: whether `last` carries a bias.
        activation: None or "relu", applied inside the operator.
        device, dtype: of the parameters; torch's defaults.

    Attributes:
        activation: as above; `kegfast.fuse` sets it where a ReLU follows.
        recompute: compute intermediates anew in the backward pass instead of keeping them (False).

    Raises:
        TypeError, ValueError: for a size, a geometry or an activation that no such layer has.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        rank: tuple[int, int],
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        bias: bool = True,
        activation: Literal["relu"] | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self._memory = LayerMemory()
        self.activation, self.recompute = activation, False
        if not isinstance(rank, tuple | list) or len(rank) != 2:
            raise ValueError(expected("rank", "a pair (in_rank, out_rank)", rank))
        if not all(isinstance(side, int) and side > 0 for side in rank):
            raise ValueError(expected("rank", "a pair of positive ints", rank))
        check.counts(in_channels=in_channels, out_channels=out_channels)
        kernel_size = pair("kernel_size", kernel_size, 1)
        stride, padding = pair("stride", stride, 1), pair("padding", padding, 0)
        dilation = pair("dilation", dilation, 1)
        in_rank, out_rank = rank
        where = check.placement(device, dtype)
        self.first = nn.Conv2d(in_channels, in_rank, 1, bias=False, **where)
        self.core = nn.Conv2d(in_rank, out_rank, kernel_size, stride, padding, dilation, bias=False, **where)
        self.last = nn.Conv2d(out_rank, out_channels, 1, bias=bias, **where)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, rank: RankRule = "evbmf") -> "TuckerConv2d":
        """The Tucker-2 decomposition of a convolution.

        Args:
            conv: with groups=1 and zero padding, equal on both sides.
            rank: "evbmf" (variational Bayesian choice), a float in (0, 1] (that share of the
                channels on each side), or (in_rank, out_rank).

        Raises:
            ValueError: for a convolution or a rank that has no such layer.
        """
        from kegfast.nn.build import build  # which makes layers of this class

        if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
            raise ValueError(expected("conv", "an nn.Conv2d with groups=1", conv))
        if nn.parameter.is_lazy(conv.weight) or conv.weight.is_meta:
            raise ValueError(expected("conv", "a convolution whose weight has values", conv))
        layer = build(conv, factorize(conv.weight, layer_rank(conv.weight, rank)))
        if not isinstance(layer, cls):
            what = "a spatial convolution with zero padding, ranked on both sides"
            raise ValueError(expected("conv", what, conv))
        return layer

    def forward(
        self,
        input: Tensor,  # (N, C, H, W); nn.Conv2d's own name for it
        addend: Tensor | float | None = None,  # (N, K, H', W')
    ) -> Tensor:  # (N, K, H', W')
        """last(core(first(input))), plus the addend where there is one, then the activation."""
        x = input
        if not is_dynamo_compiling():
            y = repeat(self._memory.settled.call, self._modules, self.activation, x, addend)
            if y is not None:
                return y
        call = call_of(self, self._memory, x, addend)
        form = choose(call)
        if call is None or form is Form.PARTS:
            y = self.last(self.core(self.first(x)))
            check_addend(addend, y.shape, y.device)
            return reference.finish(y, addend, self.activation)
        plain = isinstance(x, Tensor) and x.dim() == 4 and not has_torch_function((x, addend))
        if plain and not autocasts(x):
            return run(call, form)
        return functional.tucker_conv2d(
            x, *call.weights, *call.geometry, self.activation, self.recompute, addend
        )

    def extra_repr(self) -> str:
        """The dense layer's, the rank, and options that are not the default."""
        told = [super().extra_repr()]
        told += [f"activation={self.activation!r}"] * (self.activation is not None)
        told += ["recompute=True"] * self.recompute
        return ", ".join(filter(None, told))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":
            check_activation(value)
        if name == "recompute":
            check.flag(name, value)
        super().__setattr__(name, value)

    def final_(self, final: bool = True) -> Self:
        """Promises that the numbers of the three factors will not be written to any more.

        A call reads all of its factors to see whether they are still what their packed form was made of, so
        that no write is missed, whoever made it; docs/how/dispatch.md tells what that costs. With
        this promise the comparison is left out.

        What is still noticed: parameters that are replaced, writes that torch counts (in-place operators,
        `load_state_dict`, optimizers), changes of modules, hooks and options. What is not: writes through
        `.data`, NumPy arrays that share the memory, or other processes. Copies and pickles of the layer are
        not bound by it.

        Args:
            final: False takes the promise back.

        Returns:
            The layer.
        """
        check.flag("final", final)
        self._memory.final = final
        self._memory.settled = SettledCall()
        return self

    def to_sequential(self) -> nn.Sequential:
        """The three convolutions (sharing these parameters), for quantization or other tools."""
        layers: list[nn.Module] = [self.first, self.core, self.last]
        return nn.Sequential(*layers, nn.ReLU()) if self.activation else nn.Sequential(*layers)

    @torch.no_grad()
    def to_conv(self) -> nn.Conv2d:
        """The dense convolution that this layer equals."""
        first, last = self.first.weight.flatten(1), self.last.weight.flatten(1)  # (R1, C), (K, R2)
        conv = nn.Conv2d(
            first.shape[1],
            last.shape[0],
            self.kernel_size,
            *Geometry.of(self.core),
            bias=self.last.bias is not None,
            device=first.device,
            dtype=first.dtype,
        )
        conv.weight.copy_(torch.einsum("kr,rshw,sc->kchw", last, self.core.weight, first))
        if self.last.bias is not None and conv.bias is not None:
            conv.bias.copy_(self.last.bias)
        return conv.train(self.training)


class TuckerLinear(FactoredLinear, nn.Module):
    """A Linear as U core V, the form that the paper uses for its MLPs (Tucker-2 of a matrix).

    Args:
        in_features, out_features: of the Linear that it stands for.
        rank: (in_rank, out_rank); None for a side leaves that side's width unfactored.
        bias: whether the last factor carries a bias.
        device, dtype: of the parameters; torch's defaults.

    Raises:
        TypeError, ValueError: for sizes that no such layer has, or ranks on neither side.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: tuple[int | None, int | None],
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check.counts(in_features=in_features, out_features=out_features)
        if not isinstance(rank, tuple | list) or len(rank) != 2 or tuple(rank) == (None, None):
            raise ValueError(expected("rank", "a pair (in_rank, out_rank), at most one of them None", rank))
        for side, size in zip(("in_rank", "out_rank"), rank, strict=True):
            if size is not None:
                check.count(side, size)
        in_rank, out_rank = rank
        core_in, core_out = in_rank or in_features, out_rank or out_features
        where = check.placement(device, dtype)
        self.first = nn.Linear(in_features, core_in, bias=False, **where) if in_rank else None
        self.core = nn.Linear(core_in, core_out, bias=bias and out_rank is None, **where)
        self.last = nn.Linear(core_out, out_features, bias=bias, **where) if out_rank else None

    def forward(self, input: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """last(core(first(input))), skipping the sides that are not factored."""
        x = input
        for layer in (self.first, self.core, self.last):
            x = x if layer is None else layer(x)
        return x
