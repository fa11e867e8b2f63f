"""A model's structure as plain data: its modules' arguments, and what its forward does with them.

Nothing here is executed when it is read: modules are torch.nn's and kegfast's own, rebuilt from their
arguments; the forward pass is a torch.fx graph whose functions all come from the lists below.
"""

import inspect
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from kegfast._util.check import expected
from kegfast.compression.surgery import HOOKS
from kegfast.nn import TuckerConv2d, TuckerLinear
from kegfast.nn.build import FactorChain
from kegfast.ops.conv_max_pool import conv_max_pool2d

Plain = Any  # what JSON can hold

OWN = {cls.__name__: cls for cls in (TuckerConv2d, TuckerLinear, FactorChain)}
NAME = re.compile(r"[A-Za-z_0-9]+(\.[A-Za-z_0-9]+)*")
MOST_LAYERS = 1000
"""In one module of torch.nn: a file must not ask for billions of them, which would take hours to make."""
ATTRIBUTES = {"shape", "ndim"}
METHOD_NAMES = """
    abs add amax amin argmax bmm chunk clamp clamp_min contiguous dim div exp expand expand_as flatten
    float log log_softmax matmul max mean min mul narrow neg norm numel permute pow relu repeat reshape
    rsqrt sigmoid sin size softmax split sqrt square squeeze std sub sum swapaxes t tanh transpose
    type_as unbind unflatten unsqueeze var view view_as
"""
METHODS = set(METHOD_NAMES.split())
FUNCTIONS: dict[str, Callable[..., Any]] = {}
for _module, _names in (
    (
        operator,
        "add sub mul truediv floordiv mod pow neg matmul getitem eq ne lt le gt ge iadd imul isub",
    ),
    (
        torch,
        "abs add amax amin bmm cat chunk clamp concat div einsum exp flatten log log_softmax matmul max "
        "mean min mul neg permute pow relu reshape rsqrt sigmoid sin softmax split sqrt square squeeze "
        "stack sub sum swapaxes tanh transpose unbind unflatten unsqueeze where adaptive_avg_pool1d "
        "avg_pool1d conv2d max_pool2d",
    ),
    (
        F,
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d batch_norm celu conv1d "
        "conv2d dropout elu gelu group_norm hardsigmoid hardswish hardtanh interpolate layer_norm "
        "leaky_relu linear log_softmax max_pool2d mish normalize pad pixel_shuffle prelu relu relu6 "
        "scaled_dot_product_attention selu sigmoid silu softmax softplus tanh unfold",
    ),
):
    for _name in _names.split():
        if hasattr(_module, _name):
            FUNCTIONS.setdefault(f"{_module.__name__.lstrip('_')}.{_name}", getattr(_module, _name))
FUNCTIONS["getattr"] = getattr
FUNCTIONS["kegfast.conv_max_pool2d"] = conv_max_pool2d
TARGETS = {function: name for name, function in reversed(FUNCTIONS.items())}


class LayerTracer(fx.Tracer):
    """Keeps kegfast's layers whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in OWN.values() or super().is_leaf_module(m, module_qualified_name)


def trace_graph(model: nn.Module, tracer: LayerTracer | None = None) -> fx.GraphModule | None:
    """The model as a torch.fx graph with kegfast's layers as leaves; None where it has no such graph.

    Hooks of the model itself go with it.
    """
    try:
        graph = fx.GraphModule(model, (tracer or LayerTracer()).trace(model), type(model).__name__)
    except Exception:  # whatever the model's own forward raises when values are not there
        return None
    for hooks in HOOKS:
        getattr(graph, hooks).update(getattr(model, hooks))
    return _complete(graph, model)


def _complete(graph: fx.GraphModule, root: nn.Module) -> fx.GraphModule:
    """Adds what the forward pass does not use, under all names, so that the state dict is the model's."""
    present = dict(graph.named_modules(remove_duplicate=False))
    for name, module in root.named_modules(remove_duplicate=False):
        absent = name not in present or type(present[name]) is nn.Module  # which holds what get_attr names
        if absent and not any(module.children()):
            graph.add_submodule(name, module)
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        owner, _, last = name.rpartition(".")
        holder = container(graph, owner)
        if last not in holder._parameters and last not in holder._buffers:
            setattr(holder, last, tensor)
    return graph


def container(root: nn.Module, name: str) -> nn.Module:
    """The module of that name, made of empty ones where there is none yet."""
    for part in filter(None, name.split(".")):
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root


def module_spec(module: nn.Module) -> dict[str, Plain] | None:
    """A module's type and constructor arguments; None for one that is not torch.nn's or kegfast's own.

    torch.nn's modules keep their constructor's arguments under the same names.
    """
    if isinstance(module, FactorChain):
        parts = {name: module_spec(part) for name, part in module.named_children()}
        return {"type": "FactorChain", "parts": parts}
    if isinstance(module, TuckerConv2d | TuckerLinear):
        return {"type": type(module).__name__, "arguments": _tucker_arguments(module)}
    kind = type(module)
    if getattr(nn, kind.__name__, None) is not kind or kind in CONTAINERS:
        return None
    arguments = {}
    for name, parameter in _parameters(kind).items():
        if name in ("self", "device", "dtype", "args", "kwargs") or name.startswith("_"):
            continue
        if not hasattr(module, name):
            if parameter.default is inspect.Parameter.empty:
                return None
            continue
        value = getattr(module, name)
        if name == "bias":
            value = value is not None and value is not False
        try:
            arguments[name] = encode(value)
        except ValueError:
            return None
    return {"type": kind.__name__, "arguments": arguments}


def _parameters(kind: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    """The constructor's parameters; recurrent layers take theirs as they come, and their base names them."""
    if not issubclass(kind, nn.RNNBase):
        return inspect.signature(kind.__init__).parameters
    other = {"mode"} if kind is nn.LSTM else {"mode", "proj_size"}
    known = inspect.signature(nn.RNNBase.__init__).parameters
    own = {name: parameter for name, parameter in known.items() if name not in other}
    if kind is nn.RNN:
        own["nonlinearity"] = inspect.Parameter("nonlinearity", inspect.Parameter.KEYWORD_ONLY)
    return own


CONTAINERS = {nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict}


def _tucker_arguments(layer: TuckerConv2d | TuckerLinear) -> dict[str, Plain]:
    names = ["in_features", "out_features", "rank"]
    if isinstance(layer, TuckerConv2d):
        names = ["in_channels", "out_channels", "kernel_size", "rank", "stride", "padding", "dilation"]
        names.append("activation")
    return {name: encode(getattr(layer, name)) for name in names} | {"bias": layer.bias is not None}


def module_from(spec: Mapping[str, Plain]) -> nn.Module:
    """The module of a spec, with fresh weights.

    Raises:
        ValueError: the spec names no module of torch.nn or kegfast, or arguments that it refuses.
    """
    name = spec.get("type") if isinstance(spec, Mapping) else None
    if name == "FactorChain":
        parts = FactorChain()
        for part, inner in spec["parts"].items():
            if part not in ("first", "core", "last"):
                raise ValueError(expected("structure", "parts first, core and last", part))
            parts.add_module(part, module_from(inner))
        return parts
    kind = (OWN.get(name) or getattr(nn, name, None)) if isinstance(name, str) else None
    if not inspect.isclass(kind) or not issubclass(kind, nn.Module):
        raise ValueError(expected("structure", "a module of torch.nn or kegfast", name))
    try:
        arguments = {key: decode(value, {}) for key, value in spec["arguments"].items()}
        if any(key.endswith("layers") and value > MOST_LAYERS for key, value in arguments.items()):
            raise ValueError(expected("structure", f"at most {MOST_LAYERS} layers in a module", spec))
        return kind(**arguments)
    except (TypeError, RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(f"structure must hold arguments of {name}, got {spec}") from error


def module_specs(model: nn.Module) -> tuple[dict[str, dict[str, Plain]], dict[str, str]]:
    """Specs of all modules that have one, outermost first, and the further names of shared modules."""
    specs: dict[str, dict[str, Plain]] = {}
    names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(f"{outer}.") for outer in specs if outer) or "" in specs:
            continue
        if id(module) in names:
            aliases[name] = names[id(module)]
            continue
        names[id(module)] = name
        if (spec := module_spec(module)) is not None:
            specs[name] = spec
    return specs, aliases


def graph_of(model: nn.Module) -> list[dict[str, Plain]] | None:
    """The forward pass as plain data; None where it does things that are not in the lists."""
    traced = model if isinstance(model, fx.GraphModule) else trace_graph(model)
    if traced is None:
        return None
    nodes = []
    try:
        for node in traced.graph.nodes:
            if node.op == "get_attr" and not isinstance(_attribute(model, node.target), torch.Tensor):
                return None
            if node.op == "call_module" and module_spec(model.get_submodule(node.target)) is None:
                return None  # torch.nn's own, but not rebuilt from its arguments: TransformerEncoder
            target = TARGETS[node.target] if node.op == "call_function" else node.target
            entry = {"op": node.op, "name": node.name, "target": target}
            if node.args:
                entry["args"] = encode(tuple(node.args))
            if node.kwargs:
                entry["kwargs"] = {key: encode(value) for key, value in node.kwargs.items()}
            _check_node(entry)
            nodes.append(entry)
    except (KeyError, ValueError, TypeError):
        return None
    return nodes


def _attribute(model: nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def graph_from(nodes: list[dict[str, Plain]], root: nn.Module) -> fx.GraphModule:
    """The module that runs a graph on the modules and tensors of `root`.

    Raises:
        ValueError: a node calls anything that is not in the lists.
    """
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for entry in nodes:
        _check_node(entry)
        target = FUNCTIONS[entry["target"]] if entry["op"] == "call_function" else entry["target"]
        args = decode(entry.get("args", {"tuple": []}), made)
        kwargs = {key: decode(value, made) for key, value in entry.get("kwargs", {}).items()}
        if target is getattr and not (len(args) == 2 and args[1] in ATTRIBUTES):
            raise ValueError(expected("structure", f"an attribute of {sorted(ATTRIBUTES)}", args[1:]))
        made[entry["name"]] = graph.create_node(entry["op"], target, args, kwargs, entry["name"])
    graph.lint()
    return _complete(fx.GraphModule(root, graph), root)


def _check_node(entry: Mapping[str, Plain]) -> None:
    """Names become generated code, so only names may pass."""
    op, target, name = entry.get("op"), entry.get("target"), entry.get("name")
    named = isinstance(name, str) and NAME.fullmatch(name)
    known = isinstance(op, str) and isinstance(target, str) and _is_known(op, target)
    keys = all(isinstance(key, str) and key.isidentifier() for key in entry.get("kwargs", {}))
    if not named or not known or not keys:
        raise ValueError(expected("structure", "a graph of known functions", dict(entry)))


def _is_known(op: str, target: str) -> bool:
    if op == "call_function":
        return target in FUNCTIONS
    if op == "call_method":
        return target in METHODS
    if op == "output":
        return target == "output"
    return op in ("placeholder", "get_attr", "call_module") and NAME.fullmatch(target) is not None


def encode(value: Any) -> Plain:
    """An argument as JSON can hold it.

    Raises:
        ValueError: it has no such form.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [encode(part) for part in value]}
    if isinstance(value, list):
        return [encode(part) for part in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": [[key, encode(part)] for key, part in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    raise ValueError(expected("structure", "plain arguments", value))


def decode(value: Plain, nodes: Mapping[str, fx.Node]) -> Any:
    """What `encode` encoded."""
    if isinstance(value, list):
        return [decode(part, nodes) for part in value]
    if not isinstance(value, dict):
        return value
    kind: str = ""
    inner: Plain = None
    if len(value) == 1:
        ((kind, inner),) = value.items()
    if kind == "node" and inner in nodes:
        return nodes[inner]
    if kind == "tuple":
        return tuple(decode(part, nodes) for part in inner)
    if kind == "dict":
        return {str(key): decode(part, nodes) for key, part in inner}
    if kind == "slice" and len(inner) == 3:
        return slice(*(decode(part, nodes) for part in inner))
    if kind == "ellipsis":
        return Ellipsis
    raise ValueError(expected("structure", "a node, tuple, dict or slice", value))
