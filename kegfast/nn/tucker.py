"""Drop-in layers: a Tucker-2 convolution and a Linear in factors."""

from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from kegfast import functional
from kegfast._util import check
from kegfast._util.check import expected
from kegfast.dispatch import cpu, cuda
from kegfast.dispatch.onednn import PackedConvolutions
from kegfast.dispatch.packed import PackedFactors, PreparedCall, Weights, repeat
from kegfast.nn.factors import FactoredConv2d, FactoredLinear
from kegfast.ops._native import note_unfused
from kegfast.ops.tucker2 import tucker2_training

if TYPE_CHECKING:
    from kegfast.compression.ranks import RankRule


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
        kernel_size: functional.Pair,
        rank: tuple[int, int],
        stride: functional.Pair = 1,
        padding: functional.Pair = 0,
        dilation: functional.Pair = 1,
        bias: bool = True,
        activation: str | None = None,
    ):
        super().__init__()
        if activation not in (None, "relu"):
            raise ValueError(expected("activation", "None or 'relu'", activation))
        if not isinstance(rank, tuple | list) or len(rank) != 2:
            raise ValueError(expected("rank", "a pair (in_rank, out_rank)", rank))
        if not all(isinstance(side, int) and side > 0 for side in rank):
            raise ValueError(expected("rank", "a pair of positive ints", rank))
        check.counts(in_channels=in_channels, out_channels=out_channels)
        kernel_size = functional.pair("kernel_size", kernel_size, 1)
        stride, padding = functional.pair("stride", stride, 1), functional.pair("padding", padding, 0)
        dilation = functional.pair("dilation", dilation, 1)
        in_rank, out_rank = rank
        self.first = nn.Conv2d(in_channels, in_rank, 1, bias=False)
        self.core = nn.Conv2d(in_rank, out_rank, kernel_size, stride, padding, dilation, bias=False)
        self.last = nn.Conv2d(out_rank, out_channels, 1, bias=bias)
        self.activation = activation
        self.recompute = False
        self._packed, self._prepared = PackedFactors(), PreparedCall()
        self._convolutions = PackedConvolutions()

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, rank: "RankRule" = "evbmf") -> "TuckerConv2d":
        """The Tucker-2 decomposition of a convolution.

        Args:
            conv: with groups=1 and zero padding, equal on both sides.
            rank: "evbmf" (variational Bayesian choice), a float in (0, 1] (that share of the
                channels on each side), or (in_rank, out_rank).

        Raises:
            ValueError: for a convolution or a rank that has no such layer.
        """
        from kegfast.compression.decompose import factorize
        from kegfast.compression.ranks import layer_rank
        from kegfast.nn.build import build

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
        x: Tensor,  # (N, C, H, W)
        addend: Tensor | float | None = None,  # (N, K, H', W')
    ) -> Tensor:  # (N, K, H', W')
        """last(core(first(x))), plus the addend where there is one, then the activation.

        Outside autograd at most one dispatcher call, on prepacked factors; every lookup is on the clock of
        small layers.
        """
        if is_dynamo_compiling():
            return self._forward_checked(x, addend)
        y = repeat(self._prepared.settled, self._modules, self.activation, x, addend)
        return self._forward_anew(x, addend) if y is None else y

    def _forward_anew(self, x: Tensor, addend: Tensor | float | None) -> Tensor:
        if is_compiling():
            return self._forward_checked(x, addend)
        modules = self._modules
        core_layer, last_layer = modules["core"], modules["last"]
        try:
            weights = (
                modules["first"]._parameters["weight"], core_layer._parameters["weight"],
                last_layer._parameters["weight"], last_layer._parameters["bias"],
            )  # fmt: skip
        except KeyError:  # parametrised or pruned
            return self._forward_checked(x, addend)
        options = core_layer.stride, core_layer.padding, core_layer.dilation, self.activation
        if is_grad_enabled():
            return self._forward_training(x, weights, options, addend)
        return self._forward_dispatched(x, weights, options, addend)

    def _forward_training(
        self, x: Tensor, weights: Weights, options: tuple, addend: Tensor | float | None
    ) -> Tensor:
        """Straight to the operator in the plain case: among other layers, checks take as long as it does."""
        plain = type(x) is Tensor and x.is_cpu and weights[0].requires_grad and addend is None
        if plain and functional.fuses_inference(x):
            stride, padding, dilation, activation = options
            arguments = *stride, *padding, *dilation, activation is not None, not self.recompute
            try:
                return tucker2_training(x, *weights, *arguments)
            except RuntimeError:
                pass  # below, what is wrong with the arguments
        return self._forward_checked(x, addend)

    def _forward_checked(self, x: Tensor, addend: Tensor | float | None = None) -> Tensor:
        return functional.tucker_conv2d(
            x,
            self.first.weight,
            self.core.weight,
            self.last.weight,
            self.last.bias,
            self.core.stride,
            self.core.padding,
            self.core.dilation,
            self.activation,
            self.recompute,
            addend,
        )

    def _forward_dispatched(
        self, x: Tensor, weights: Weights, options: tuple, addend: Tensor | float | None
    ) -> Tensor:
        fuses = functional.fuses_inference
        if not fuses(x) or (addend is not None and (x.is_cuda or not fuses(addend))):
            return self._forward_checked(x, addend)
        stride, padding, dilation, activation = options
        if x.is_cuda:
            return self._forward_cuda(x, weights, options)
        if not cpu.takes(x, weights[1], weights[2].shape[0], (stride, padding, dilation)):
            y = self._convolutions(x, weights, options, addend)
            if y is not None:
                note_unfused()
                return y
        packed = self._packed(*weights[:3], stride, dilation, functional.reads_channels_last(x))
        arguments = *stride, *padding, *dilation, activation is not None
        try:
            if addend is None:
                y = torch.ops.kegfast.tucker2.default(x, *weights, packed, *arguments)
            else:
                y = torch.ops.kegfast.tucker2_add.default(x, *weights, addend, packed, *arguments)
        except RuntimeError:  # an addend that only torch adds, or wrong arguments, which this names
            return self._forward_checked(x, addend)
        self._prepared.learn(x, weights, options, packed, arguments, addend)
        return y

    def _forward_cuda(self, x: Tensor, weights: Weights, options: tuple) -> Tensor:
        """The measured form, straight; torch's convolutions where they are faster."""
        *geometry, activation = options
        if all(w.dtype is x.dtype for w in weights[:3]):
            form = cuda.form(x, *weights[:3], tuple(geometry), False)
            if form is not None:
                arguments = *chain.from_iterable(geometry), activation is not None, form
                try:
                    return torch.ops.kegfast.tucker2_as.default(x, *weights, *arguments)
                except RuntimeError:
                    pass  # below, what is wrong with the arguments
        return self._forward_checked(x)

    def to_sequential(self) -> nn.Sequential:
        """The three convolutions (sharing these parameters), for quantisation or other tools."""
        layers: list[nn.Module] = [self.first, self.core, self.last]
        return nn.Sequential(*layers, nn.ReLU()) if self.activation else nn.Sequential(*layers)

    @torch.no_grad()
    def to_conv(self) -> nn.Conv2d:
        """The dense convolution that this layer equals."""
        first, last = self.first.weight.flatten(1), self.last.weight.flatten(1)  # (R1, C), (K, R2)
        conv = nn.Conv2d(
            first.shape[1],
            last.shape[0],
            self.core.kernel_size,
            self.core.stride,
            self.core.padding,
            self.core.dilation,
            bias=self.last.bias is not None,
            device=first.device,
            dtype=first.dtype,
        )
        conv.weight.copy_(torch.einsum("kr,rshw,sc->kchw", last, self.core.weight, first))
        if self.last.bias is not None:
            conv.bias.copy_(self.last.bias)
        return conv.train(self.training)


class TuckerLinear(FactoredLinear, nn.Module):
    """A Linear as U core V, the form that the paper uses for its MLPs (Tucker-2 of a matrix).

    Args:
        in_features, out_features: of the Linear that it stands for.
        rank: (in_rank, out_rank); None for a side leaves that side's width unfactored.
        bias: whether the last factor carries a bias.

    Raises:
        TypeError, ValueError: for sizes that no such layer has, or ranks on neither side.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: tuple[int | None, int | None],
        bias: bool = True,
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
        self.first = nn.Linear(in_features, core_in, bias=False) if in_rank else None
        self.core = nn.Linear(core_in, core_out, bias=bias and out_rank is None)
        self.last = nn.Linear(core_out, out_features, bias=bias) if out_rank else None

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """last(core(first(x))), skipping the sides that are not factored."""
        for layer in (self.first, self.core, self.last):
            x = x if layer is None else layer(x)
        return x
