"""Which form a Tucker-2 convolution takes: `choose` decides for every caller, `run` obeys.

Inside the fused operator on the CPU its own plan decides between the direct sum and Winograd
(`winograd_wins` in csrc/cpu/tucker2_winograd_policy.inl), unless `kegfast.autotune` has measured the call.
"""

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Literal, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from kegfast.dispatch import cpu, cuda, onednn
from kegfast.dispatch.forms import Form
from kegfast.dispatch.packed import OwnMemory, PackedFactors, SettledCall, Weights
from kegfast.dispatch.plain import are_plain, convolutions_are_torchs, watched
from kegfast.ops import _native, reference
from kegfast.ops._operands import Geometry, check_addend, check_in_memory, check_tucker2, tucker2_size
from kegfast.ops.tucker2 import reads_channels_last, tucker2_training

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_TAPS = 256  # of a core, in the kernels
# What shadows a method of nn.Conv2d where an instance has it.
_SHADOWS = frozenset(dir(nn.Conv2d)) - vars(nn.Conv2d(1, 1, 1)).keys()


def _repeat_nothing(*_: object) -> Tensor | None:
    """Nothing was compiled that could repeat a call."""
    return None


# A layer's last call, if nothing has changed: its output, else None.
repeat = _repeat_nothing if _native._C is None else _native._C.repeat_tucker2


class LayerMemory(OwnMemory):
    """What a layer keeps between calls; copies and pickles of it are empty.

    Attributes:
        parts: the layer's modules as they were when they stood for the operator, or None.
        packed, convolutions, settled: of its forms.
        final: whether the factors' bytes are promised not to change.
    """

    def __init__(self) -> None:
        self.parts: object | None = None
        self.packed, self.settled = PackedFactors(), SettledCall()
        self.convolutions = onednn.PackedConvolutions()
        self.final = False


class Call(NamedTuple):
    """A call of the operator."""

    x: Tensor
    weights: Weights
    geometry: Geometry
    activation: str | None
    recompute: bool
    addend: Tensor | float | None
    memory: LayerMemory | None  # of a layer

    @property
    def training(self) -> bool:
        """Whether gradients flow to what the operator itself takes."""
        tensors = self.x, *self.weights
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    @property
    def ints(self) -> tuple[int, ...]:
        """Stride, padding and dilation one after the other, as operators take them."""
        return tuple(chain.from_iterable(self.geometry))


def choose(call: Call | None) -> Form:
    """The form of a call: the one place where it is decided. None is that of a layer which `call_of` refuses.

    A layer runs as its three modules unless these are plain convolutions (`own_weights`) on plain tensors.
    torch's convolutions run what the kernels do not compute, what `kegfast.backend("reference")`, torch.func,
    TorchScript's tracer and forward-mode differentiation ask for, and what was measured to be faster so.
    """
    if call is None:
        return Form.PARTS
    x, weights = call.x, call.weights
    if not isinstance(x, Tensor):
        return Form.REFERENCE
    of_layer = call.memory is not None and not is_compiling()
    if of_layer and not are_plain(x, *weights):
        return Form.PARTS
    core = weights[1]
    if x.dim() != 4 or core.dim() != 4 or x.dtype not in _TYPES:
        return Form.REFERENCE
    if core.shape[2] * core.shape[3] > _MOST_TAPS:
        return Form.REFERENCE
    if not (_native.use_native() and _native.has_kernel("tucker2", x.device)):
        return Form.REFERENCE
    if x.is_cuda:
        return _choose_cuda(call)
    if call.training:
        return Form.TRAINING
    if of_layer and cpu.by_convolutions(x, weights, call.geometry) and onednn.takes(x, weights):
        return Form.OPERATOR if watched() else Form.CONVOLUTIONS
    return Form.OPERATOR


def _choose_cuda(call: Call) -> Form:
    if any(w.dtype is not call.x.dtype for w in call.weights[:3]):
        return Form.REFERENCE
    number = cuda.form(call.x, *call.weights[:3], call.geometry, call.training)
    if number is None:
        return Form.REFERENCE
    if call.training:
        return Form.TRAINING
    return _BY_NUMBER[number]


class Layer(Protocol):
    """Of modules first, core and last: a `kegfast.nn.TuckerConv2d`."""

    _modules: dict[str, nn.Module | None]
    activation: Literal["relu"] | None
    recompute: bool


class Part(Protocol):
    """Of a layer: an `nn.Conv2d` with its geometry in pairs, unless `own_weights` finds something else."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    _parameters: dict[str, nn.Parameter | None]


def own_weights(modules: Mapping[str, Part], memory: LayerMemory) -> Weights | None:
    """The tensors of a layer's parts where these are what the operator stands for, else None.

    That is: three of torch's own `nn.Conv2d`, the outer ones of 1x1, no bias but the last one's, padding by
    zeros; no hooks, neither theirs nor for all modules, no parametrization, nothing put over a method; plain
    parameters. Whatever else hangs there (a pruned or a quantized convolution, an adapter, one of another
    stride) is called as the module that it is.
    """
    sees = _native._C is not None and not is_compiling()
    if not (sees and _native._C.parts_unchanged(memory.parts, modules)):
        if not _stand(modules):
            return None
        if sees:
            memory.parts = _native._C.see_parts(modules)
    first, core, last = (modules[name]._parameters for name in ("first", "core", "last"))
    try:
        head, middle, tail = first["weight"], core["weight"], last["weight"]
        if first["bias"] is not None or core["bias"] is not None:
            return None
        bias = last["bias"]
    except KeyError:
        return None
    if head is None or middle is None or tail is None:
        return None
    if head.dim() != 4 or tail.dim() != 4 or head.shape[2:] != (1, 1) or tail.shape[2:] != (1, 1):
        return None
    return head, middle, tail, bias


def _stand(modules: Mapping[str, Part]) -> bool:
    as_built = all(_is_as_built(modules.get(name)) for name in ("first", "core", "last"))
    if not as_built or not convolutions_are_torchs():
        return False
    outer = modules["first"], modules["last"]
    return all(part.stride == (1, 1) and part.padding == (0, 0) for part in outer)


def _is_as_built(part: object) -> bool:
    if type(part) is not nn.Conv2d or part.groups != 1 or part.padding_mode != "zeros":
        return False
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return False
    own = vars(part).keys()
    if not _SHADOWS.isdisjoint(own) or "weight" in own or "bias" in own:
        return False
    geometry = part.stride, part.padding, part.dilation
    ints = all(type(two) is tuple and len(two) == 2 and all(type(n) is int for n in two) for two in geometry)
    return ints and {"weight", "bias"} <= part._parameters.keys()


def call_of(layer: Layer, memory: LayerMemory, x: Tensor, addend: Tensor | float | None) -> Call | None:
    """A layer's call of the operator; None where its parts are not what that stands for."""
    modules: dict[str, Part] = layer._modules  # type: ignore[assignment]  # own_weights looks what they are
    weights = own_weights(modules, memory)
    if weights is None:
        return None
    core = modules["core"]
    geometry = Geometry(core.stride, core.padding, core.dilation)
    return Call(x, weights, geometry, layer.activation, layer.recompute, addend, memory)


def check(call: Call) -> None:
    """Raises what `kegfast.functional.tucker_conv2d` documents of its tensors."""
    x, weights = call.x, call.weights
    geometry = check_tucker2((x, *weights), *call.geometry)
    check_addend(call.addend, tucker2_size(x, weights[1], weights[2], geometry), x.device)


def run(call: Call, form: Form) -> Tensor:  # (N, K, H', W')
    """The output, by the form that `choose` gave the call: any but `Form.PARTS`, which the layer runs."""
    if form is Form.REFERENCE or is_compiling():
        check(call)
        return _RUNS[form](call)
    try:
        return _RUNS[form](call)
    except RuntimeError:  # the operator's own refusal: say in words what is wrong with which argument
        x, (first, core, last, bias) = call.x, call.weights
        check(call)
        check_in_memory(x=x, first=first, core=core, last=last, bias=bias)
        raise


def _reference(call: Call) -> Tensor:
    _native.note_unfused()
    return reference.tucker_conv2d(call.x, *call.weights, *call.geometry, call.activation, call.addend)


def _convolutions(call: Call) -> Tensor:
    if call.memory is None:
        return _reference(call)
    _native.note_unfused()
    return call.memory.convolutions(call.x, call.weights, call.geometry, call.activation, call.addend)


def _operator(call: Call) -> Tensor:
    x, weights, relu = call.x, call.weights, call.activation is not None
    addend = call.addend
    if addend is not None and not _adds(addend, call):
        return _added(call)
    memory, packed = call.memory, None
    if memory is not None and x.is_cpu and not is_compiling() and not watched():
        stride, _, dilation = call.geometry
        if addend is None or are_plain(addend):
            packed = memory.packed(weights, stride, dilation, reads_channels_last(x))
    buffer = None if packed is None else packed[0]
    if addend is not None:
        y = torch.ops.kegfast.tucker2_add.default(x, *weights, addend, buffer, *call.ints, relu)
    else:
        y = torch.ops.kegfast.tucker2.default(x, *weights, buffer, *call.ints, relu)
    if memory is not None and packed is not None and not torch.is_grad_enabled():
        parts = memory.parts
        if parts is not None:
            memory.settled.learn(call, packed, parts, memory.final)
    return y


def _adds(addend: Tensor | float, call: Call) -> TypeGuard[Tensor]:
    """Whether the compiled operator takes the addend; otherwise torch's addition does."""
    return (
        isinstance(addend, Tensor)
        and addend.is_cpu
        and addend.dtype is call.x.dtype
        and addend.shape == tucker2_size(call.x, call.weights[1], call.weights[2], call.geometry)
        and not (torch.is_grad_enabled() and addend.requires_grad)
    )


def _added(call: Call) -> Tensor:
    check(call)
    alone = call._replace(activation=None, addend=None)
    y = run(alone, choose(alone))
    return reference.finish(y, call.addend, call.activation)


def _as(number: int | None) -> Callable[[Call], Tensor]:
    def fused(call: Call) -> Tensor:
        if call.addend is not None:
            return _added(call)
        relu = call.activation is not None
        return torch.ops.kegfast.tucker2_as.default(call.x, *call.weights, *call.ints, relu, number)

    return fused


def _training(call: Call) -> Tensor:
    if call.addend is not None:
        return _added(call)
    keep = not call.recompute and any(w.requires_grad for w in call.weights[:3])
    return tucker2_training(call.x, *call.weights, *call.ints, call.activation is not None, keep)


_NUMBERS = {form: number for form, number in cuda.FORMS.items() if number is not None}
_BY_NUMBER = {0: Form.OPERATOR} | {number: form for form, number in _NUMBERS.items()}
_RUNS = {
    Form.REFERENCE: _reference,
    Form.CONVOLUTIONS: _convolutions,
    Form.OPERATOR: _operator,
    Form.TRAINING: _training,
    **{form: _as(number) for form, number in _NUMBERS.items()},
}
