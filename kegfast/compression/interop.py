"""Factored weights that others wrote: loading them into kegfast's layers."""

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from kegfast._util.check import expected
from kegfast._util.files import bare_names, state_in
from kegfast.compression.surgery import KINDS, Site, replace, unwrap
from kegfast.decomposition.factors import Factors
from kegfast.nn.build import build
from kegfast.nn.factors import Dense

Roles = dict[str, str]  # "first", "core" and "last", or one of the outer two less, to names

LAYOUTS: dict[str, list[Roles]] = {
    "three convolutions": [
        {"first": "first", "core": "core", "last": "last"},
        {"first": "first", "core": "core"},
        {"core": "core", "last": "last"},
    ],
    "KegNet": [{"first": "in_channel_layer", "core": "core_layer", "last": "out_channel_layer"}],
    "Sequential": [  # e.g. jacobgil's pytorch-tensor-decompositions
        {"first": "0", "core": "1", "last": "2"},
        {"first": "0", "core": "1"},
        {"core": "0", "last": "1"},
    ],
}
"""Names of the factors in published students: the first 1x1 convolution, the core and the last 1x1 one."""


def from_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The student whose weights `state` holds, whatever names its factors have.

    Args:
        model: the uncompressed architecture; it stays as it is.
        state: a state dict in which some convolutions appear as three, or two, named as in `LAYOUTS`; or a
            checkpoint that has it under a usual key ("model_state_dict", "ema", ...). What wrappers such as
            DataParallel and torch.compile add to names is dropped.

    Returns:
        A copy of the model with `TuckerConv2d` (or `TuckerLinear`) in those places and all weights of
        the state dict.

    Raises:
        TypeError: `model` is no module, or `state` no mapping.
        ValueError: a factor that does not fit, missing or unexpected weights, NaN or infinite values.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    model, state = unwrap(model), state_in(state)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TypeError(expected("state", "a state dict", state))
    if bad := [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"state must hold finite weights, got NaN or infinity in {', '.join(bad[:3])}")
    student = copy.deepcopy(model)
    rest = bare_names(state, student.state_dict())
    layers = [
        (name, module)
        for name, module in student.named_modules(remove_duplicate=False)
        if isinstance(module, Dense) and type(module) in KINDS
    ]
    for name, module in layers:
        prefix = f"{name}." if name else ""
        if f"{prefix}weight" in rest:
            continue
        found = [roles for layout in LAYOUTS.values() for roles in layout if _holds(rest, prefix, roles)]
        fitting = next((roles for roles in found if _fits(rest, prefix, roles, module)), None)
        if fitting is None and found:
            shapes = ", ".join(str(tuple(rest[f"{prefix}{part}.weight"].shape)) for part in found[0].values())
            what = f"factors of {name!r} with weight {tuple(module.weight.shape)}"
            raise ValueError(expected("state", what, shapes))
        if fitting is not None:
            factors, named = _take(rest, prefix, fitting)
            site = Site(name, module, [name])
            student = replace(student, site, build(module, factors.to(module.weight)))
            rest |= named
    try:
        student.load_state_dict(rest)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"state must fit {type(model).__name__}, got: {reason[:300]}") from error
    return student


def _holds(state: Mapping[str, Tensor], prefix: str, roles: Roles) -> bool:
    return all(f"{prefix}{part}.weight" in state for part in roles.values())


def _fits(state: Mapping[str, Tensor], prefix: str, roles: Roles, module: Dense) -> bool:
    """Whether the factors are those of a weight such as the layer's."""
    given = [state[f"{prefix}{part}.weight"] for part in roles.values()]
    if any(part.dim() != module.weight.dim() or part.numel() == 0 for part in given):
        return False
    factors, named = _take(dict(state), prefix, roles)
    first, core, last = factors
    outputs, inputs, *kernel = module.weight.shape
    core_inputs = inputs if first is None else first.shape[0]
    core_outputs = outputs if last is None else last.shape[1]
    sides = [state[f"{prefix}{roles[role]}.weight"] for role in ("first", "last") if role in roles]
    return (
        all(side[0, 0].numel() == 1 for side in sides)
        and tuple(core.shape) == (core_outputs, core_inputs, *kernel)
        and (first is None or first.shape[1] == inputs)
        and (last is None or last.shape[0] == outputs)
        and any(key.endswith(".bias") for key in named) == (module.bias is not None)
    )


def _take(state: dict[str, Tensor], prefix: str, roles: Roles) -> tuple[Factors, dict[str, Tensor]]:
    """Removes the factors of a layer from the state dict: they, and all their tensors by kegfast's names."""
    weights = {role: state.pop(f"{prefix}{part}.weight") for role, part in roles.items()}
    tail = "last" if "last" in roles else "core"
    bias = state.pop(f"{prefix}{roles[tail]}.bias", None)
    core = weights["core"]
    first, last = (weights[role].flatten(1) if role in weights else None for role in ("first", "last"))
    spatial = (1, 1) if core.dim() == 4 else ()
    named = {f"{prefix}core.weight": core}
    for role, side in (("first", first), ("last", last)):
        if side is not None:
            named[f"{prefix}{role}.weight"] = side.reshape(*side.shape, *spatial)
    if bias is not None:
        named[f"{prefix}{tail}.bias"] = bias
    return Factors(first, core, last), named
