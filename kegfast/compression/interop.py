"""Factored weights that others wrote: loading them into kegfast's layers."""

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from kegfast._util.check import expected
from kegfast.compression.surgery import Site, build, replace
from kegfast.nn.factors import Factors

LAYOUTS = {
    "three convolutions": ("first", "core", "last"),
    "KegNet": ("in_channel_layer", "core_layer", "out_channel_layer"),
    "Sequential": ("0", "1", "2"),  # e.g. jacobgil's pytorch-tensor-decompositions
}
"""Names of the first 1x1 convolution, the core and the last 1x1 convolution in published students."""


def from_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The student whose weights `state` holds, whatever names its factors have.

    Args:
        model: the uncompressed architecture; it stays as it is.
        state: a state dict in which some convolutions appear as three, named as in `LAYOUTS`.

    Returns:
        A copy of the model with `TuckerConv2d` (or `TuckerLinear`) in those places and all weights of
        the state dict.

    Raises:
        TypeError: `model` is no module, or `state` no mapping.
        ValueError: a factor that does not fit, missing or unexpected weights, NaN or infinite values.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    if not isinstance(state, Mapping):
        raise TypeError(expected("state", "a state dict", state))
    if bad := [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"state must hold finite weights, got NaN or infinity in {', '.join(bad[:3])}")
    student = copy.deepcopy(model)
    rest = dict(state)
    layers = [
        (name, module)
        for name, module in student.named_modules(remove_duplicate=False)
        if type(module) in (nn.Conv2d, nn.Linear)
    ]
    for name, module in layers:
        prefix = f"{name}." if name else ""
        if f"{prefix}weight" in rest:
            continue
        for names in LAYOUTS.values():
            parts = _take(rest, prefix, names)
            if parts is not None:
                factors, bias = _factors(name, module, *parts)
                student = replace(
                    student, Site(name, module, [name]), build(module, factors.to(module.weight))
                )
                rest |= {f"{prefix}{key}": value for key, value in _named(factors, bias).items()}
                break
    try:
        student.load_state_dict(rest)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"state must fit {type(model).__name__}, got: {reason[:300]}") from error
    return student


def _take(
    state: dict[str, Tensor], prefix: str, names: tuple[str, str, str]
) -> tuple[list[Tensor], Tensor | None] | None:
    """Removes the three factors and the bias of a layer from the state dict."""
    keys = [f"{prefix}{name}.weight" for name in names]
    if not all(key in state for key in keys):
        return None
    bias = state.pop(f"{prefix}{names[2]}.bias", None)
    return [state.pop(key) for key in keys], bias


def _factors(
    name: str, module: nn.Module, parts: list[Tensor], bias: Tensor | None
) -> tuple[Factors, Tensor | None]:
    first, core, last = parts
    outputs, inputs, *kernel = module.weight.shape
    fits = (
        min(part.dim() for part in parts) >= 2
        and all(part.numel() for part in parts)
        and first.shape[1] == inputs
        and last.shape[0] == outputs
        and core.shape[:2] == (last.shape[1], first.shape[0])
        and list(core.shape[2:]) == kernel
        and first.shape[2:].numel() == last.shape[2:].numel() == 1
        and (bias is None) == (module.bias is None)
    )
    if not fits:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        what = f"factors of {name!r} with weight {tuple(module.weight.shape)}"
        raise ValueError(expected("state", what, shapes))
    return Factors(first.flatten(1), core, last.flatten(1)), bias


def _named(factors: Factors, bias: Tensor | None) -> dict[str, Tensor]:
    spatial = (1, 1) if factors.core.dim() == 4 else ()
    named = {
        "first.weight": factors.first.reshape(*factors.first.shape, *spatial),
        "core.weight": factors.core,
        "last.weight": factors.last.reshape(*factors.last.shape, *spatial),
    }
    return named if bias is None else {**named, "last.bias": bias}
