"""Folding what follows a layer into it: BatchNorm into the weights, ReLU into the fused operator."""

import logging
import operator

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kegfast._util.check import expected
from kegfast.compression.structure import trace_graph
from kegfast.compression.surgery import FactorChain, clone, explicit_padding, tail_of
from kegfast.functional import Pair
from kegfast.nn import TuckerConv2d, TuckerLinear
from kegfast.ops.conv_max_pool import conv_max_pool2d

log = logging.getLogger(__name__)

LAYERS = (nn.Conv2d, nn.Linear, TuckerConv2d, TuckerLinear, FactorChain)
RELU = (torch.relu, nn.functional.relu, torch.relu_)
ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
ADD_IN_PLACE = (operator.iadd, "add_")
MAX_POOL = (nn.functional.max_pool2d, torch.max_pool2d)
MOST_POOLED = 1 << 16  # weights of a convolution that is pooled at once: L2 keeps them beside its rows


def fuse(model: nn.Module) -> nn.Module:
    """Folds BatchNorm and ReLU into the layers before them, for inference.

    A BatchNorm (by its running statistics) goes into the weights and bias of the convolution or Linear
    before it, factored or dense; an addition that follows a TuckerConv2d (a residual network's shortcut) and
    a ReLU behind it or the layer go into its operator, which applies them in its last store, at next to no
    cost; any other ReLU before a max pooling moves behind it, where less is left to rectify, and one of a
    layer's output, of a sum or of a maximum overwrites it, as fresh memory costs more than the ReLU; a small
    convolution before a max pooling (a residual network's stem) becomes one operator with it. All only
    where nothing else reads the value between.

    Args:
        model: any module; it stays as it is.

    Returns:
        The folded model in eval mode: a torch.fx GraphModule with the same names. Where the forward
        pass cannot be traced, a copy in which only neighbours inside an `nn.Sequential` are folded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    folded = clone(model).eval()
    graph = trace_graph(folded)
    if graph is None:
        log.info("%s cannot be traced: only neighbours in Sequentials are folded", type(model).__name__)
        for module in list(folded.modules()):
            if type(module) is nn.Sequential:
                _fuse_sequential(module)
        return folded
    _fuse_graph(graph)
    return graph.eval()


def _fuse_graph(model: fx.GraphModule) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in list(model.graph.nodes):
        if node.op == "call_module" and type(modules[node.target]) is nn.Identity:
            _skip(model, node)
    calls: dict[int, int] = {}
    for node in model.graph.nodes:
        if node.op == "call_module":
            calls[id(modules[node.target])] = calls.get(id(modules[node.target]), 0) + 1
    for node in list(model.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], LAYERS):
            continue
        layer = modules[node.target]
        # What follows differs from call to call; a layer with an addend has been fused.
        if calls[id(layer)] > 1 or len(node.args) + len(node.kwargs) > 1:
            continue
        follower = _only_user(node)
        if follower is not None and follower.op == "call_module":
            norm = modules[follower.target]
            if _folds(layer, norm) and calls[id(norm)] == 1:
                _fold(layer, norm)
                model.set_submodule(follower.target, nn.Identity())
                _skip(model, follower)
                follower = _only_user(node)
        if not isinstance(layer, TuckerConv2d) or follower is None:
            continue
        addend = _addend(node, follower, modules) if layer.activation is None else None
        if addend is not None:
            follower = _only_user(_take_addend(model, node, follower, addend))
        if follower is not None and _is_relu(follower, modules):
            layer.activation = "relu"
            _skip(model, follower)
    for node in list(model.graph.nodes):
        if _is_relu(node, modules) and _only_user(node.all_input_nodes[0]) is node:
            pool = _only_user(node)
            if pool is not None and _is_max_pool(pool, modules):
                _move_behind(model, node, pool)
    for node in list(model.graph.nodes):
        if _is_max_pool(node, modules):
            conv = node.all_input_nodes[0]
            once = conv.op == "call_module" and calls[id(modules[conv.target])] == 1
            if once and _only_user(conv) is node and type(modules[conv.target]) is nn.Conv2d:
                _pool_at_once(model, conv, node, modules)
    for node in list(model.graph.nodes):
        if _is_relu(node, modules) and _is_fresh(node.all_input_nodes[0], modules):
            _overwrite(model, node)
    model.graph.lint()
    model.recompile()


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[node.target]) is nn.ReLU
    return node.target in RELU if node.op == "call_function" else node.target in ("relu", "relu_")


def _addend(call: fx.Node, addition: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """What a layer's output is added to, where the layer may run as late as that."""
    if addition.op == "call_module" or addition.target not in ADD:
        return None
    if len(addition.args) != 2 or addition.kwargs:
        return None
    left, right = addition.args
    other = right if left is call else left
    if not isinstance(other, fx.Node) or other is call:
        return None
    if addition.target in ADD_IN_PLACE and left is other and not _is_fresh(other, modules):
        return None
    between = call.next
    while between is not addition:
        if _may_write(between, modules):
            return None
        between = between.next
    return other


def _may_write(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether it may change a tensor that others read."""
    if node.op == "call_module":
        return bool(getattr(modules[node.target], "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "unknown_")
    in_place = getattr(operator, name, None) is node.target and name.startswith(("i", "set"))
    in_place |= name.partition(".")[0].endswith("_")
    return in_place or "out" in node.kwargs or any(v is True for v in (*node.args, *node.kwargs.values()))


def _take_addend(model: fx.GraphModule, call: fx.Node, addition: fx.Node, addend: fx.Node) -> fx.Node:
    with model.graph.inserting_before(addition):
        fused = model.graph.call_module(call.target, (call.all_input_nodes[0], addend))
    addition.replace_all_uses_with(fused)
    model.graph.erase_node(addition)
    model.graph.erase_node(call)
    return fused


def _is_fresh(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether it makes memory of its own that only one other node reads."""
    if len(node.users) != 1:
        return False
    if node.op == "call_module" and type(modules[node.target]) in LAYERS:
        return True
    if _is_max_pool(node, modules):
        return True
    is_sum = node.op == "call_function" and node.target in (operator.add, torch.add)
    return is_sum and "out" not in node.kwargs


def _overwrite(model: fx.GraphModule, relu: fx.Node) -> None:
    with model.graph.inserting_before(relu):
        args = (relu.all_input_nodes[0],)
        in_place = model.graph.call_function(nn.functional.relu, args, {"inplace": True})
    relu.replace_all_uses_with(in_place)
    model.graph.erase_node(relu)


def _is_max_pool(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules[node.target]
        return type(module) is nn.MaxPool2d and not module.return_indices
    indices = len(node.args) > 6 or node.kwargs.get("return_indices", False)
    return node.op == "call_function" and node.target in MAX_POOL and not indices


def _move_behind(model: fx.GraphModule, relu: fx.Node, pool: fx.Node) -> None:
    pool.replace_input_with(relu, relu.all_input_nodes[0])
    with model.graph.inserting_after(pool):
        late = model.graph.call_function(nn.functional.relu, (pool,))
    pool.replace_all_uses_with(late, delete_user_cb=lambda user: user is not late)
    model.graph.erase_node(relu)


def _pool_at_once(model: fx.GraphModule, conv: fx.Node, pool: fx.Node, modules: dict[str, nn.Module]) -> None:
    """One operator for a convolution of few weights, the max pooling behind it and a ReLU behind that."""
    layer, padding = modules[conv.target], explicit_padding(modules[conv.target])
    options = _pool_options(pool, modules)
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    if options is None or padding is None or not plain or layer.weight.numel() > MOST_POOLED:
        return
    follower = _only_user(pool)
    last = follower if follower is not None and _is_relu(follower, modules) else pool
    with model.graph.inserting_before(pool):
        weight = model.graph.get_attr(f"{conv.target}.weight")
        bias = None if layer.bias is None else model.graph.get_attr(f"{conv.target}.bias")
        activation = None if last is pool else "relu"
        args = conv.args[0], weight, bias, layer.stride, padding, *options, activation
        fused = model.graph.call_function(conv_max_pool2d, args)
    last.replace_all_uses_with(fused)
    for node in dict.fromkeys((last, pool, conv)):
        model.graph.erase_node(node)


def _pool_options(pool: fx.Node, modules: dict[str, nn.Module]) -> tuple[Pair, Pair, Pair] | None:
    """Window, stride and padding of a max pooling; None for one that has more to it."""
    names = "kernel_size", "stride", "padding", "dilation", "ceil_mode"
    if pool.op == "call_module":
        given = {name: getattr(modules[pool.target], name) for name in names}
    else:
        given = dict(zip(names, pool.args[1:], strict=False)) | dict(pool.kwargs)
    size, padding = given.get("kernel_size"), given.get("padding", 0)
    options = size, given.get("stride") or size, padding
    if given.get("dilation", 1) not in (1, (1, 1), [1, 1]) or given.get("ceil_mode", False) is not False:
        return None
    parts = [n for option in options for n in (option if isinstance(option, tuple | list) else (option,))]
    return options if all(isinstance(n, int) for n in parts) else None


def _skip(model: fx.GraphModule, node: fx.Node) -> None:
    node.replace_all_uses_with(node.all_input_nodes[0])
    model.graph.erase_node(node)


def _fuse_sequential(parts: nn.Sequential) -> None:
    layer: nn.Module | None = None
    for name, follower in list(parts._modules.items()):
        if layer is not None and _folds(layer, follower):
            _fold(layer, follower)
            parts._modules[name] = nn.Identity()
        elif isinstance(layer, TuckerConv2d) and type(follower) is nn.ReLU:
            layer.activation = "relu"
            parts._modules[name] = nn.Identity()
            layer = None
        elif not isinstance(follower, nn.Identity):
            layer = follower if isinstance(follower, LAYERS) else None


def _folds(layer: nn.Module, norm: nn.Module) -> bool:
    if not isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d) or norm.running_mean is None:
        return False
    if isinstance(layer, TuckerConv2d) and layer.activation is not None:
        return False
    # BatchNorm1d behind a Linear normalises features only on 2-d input; behind a convolution it cannot be.
    linear = isinstance(layer, nn.Linear | TuckerLinear)
    return linear == isinstance(norm, nn.BatchNorm1d) and norm.num_features == len(_tail(layer).weight)


def _tail(layer: nn.Module) -> nn.Module:
    return layer if isinstance(layer, nn.Conv2d | nn.Linear) else tail_of(layer)


@torch.no_grad()
def _fold(layer: nn.Module, norm: _BatchNorm) -> None:
    tail = _tail(layer)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = tail.bias.double() if tail.bias is not None else torch.zeros_like(scale)
    shift = (bias - norm.running_mean.double()) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight: Tensor = tail.weight
    weight.copy_(weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1)))
    tail.bias = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)
