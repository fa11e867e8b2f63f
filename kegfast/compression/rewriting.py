"""Rewriting a traced model for inference: what follows a layer into it, ReLUs to where they cost least."""

import operator
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import fx, nn

from kegfast._util.graph import called, target_name
from kegfast._util.modules import Kind
from kegfast.compression.surgery import is_plain
from kegfast.nn import TuckerConv2d, TuckerLinear
from kegfast.nn.build import FactorChain, FactoredLayer, explicit_padding
from kegfast.nn.factors import Dense
from kegfast.ops._operands import Pair
from kegfast.ops.conv_max_pool import conv_max_pool2d

Layer = Dense | FactoredLayer
LAYERS: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear, TuckerConv2d, TuckerLinear, FactorChain)
RELU = (torch.relu, nn.functional.relu, torch.relu_)
ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
ADD_IN_PLACE = (operator.iadd, "add_")
MAX_POOL = (nn.functional.max_pool2d, torch.max_pool2d)
MOST_POOLED = 1 << 16  # weights of a convolution that is pooled at once: L2 keeps them beside its rows


def skip_identities(model: fx.GraphModule) -> None:
    """Takes out the calls of modules that do nothing."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in list(model.graph.nodes):
        if is_a(called(node, modules), nn.Identity):
            skip(model, node)


def count_calls(model: fx.GraphModule) -> dict[int, int]:
    """How often each module is called, by its id."""
    calls: dict[int, int] = {}
    for node in model.graph.nodes:
        if node.op == "call_module":
            module = model.get_submodule(target_name(node))
            calls[id(module)] = calls.get(id(module), 0) + 1
    return calls


def fuse_epilogues(model: fx.GraphModule) -> None:
    """Additions and ReLUs behind Tucker-2 convolutions go into their operator."""
    modules, calls = dict(model.named_modules(remove_duplicate=False)), count_calls(model)
    for node in list(model.graph.nodes):
        layer = called(node, modules)
        # What follows differs from call to call; a layer with an addend has been fused.
        if not is_a(layer, TuckerConv2d) or calls[id(layer)] > 1 or len(node.args) + len(node.kwargs) > 1:
            continue
        follower = only_user(node)
        if follower is None:
            continue
        addend = _addend(node, follower, modules) if layer.activation is None else None
        if addend is not None:
            follower = only_user(_take_addend(model, node, follower, addend))
        if follower is not None and _is_relu(follower, modules):
            layer.activation = "relu"
            skip(model, follower)


def fuse_pools(model: fx.GraphModule) -> None:
    """ReLUs move behind max pooling; a small convolution before one becomes one operator with it."""
    modules, calls = dict(model.named_modules(remove_duplicate=False)), count_calls(model)
    nodes: list[fx.Node] = list(model.graph.nodes)
    for node in nodes:
        if _is_relu(node, modules) and only_user(node.all_input_nodes[0]) is node:
            pool = only_user(node)
            if pool is not None and _is_max_pool(pool, modules):
                _move_behind(model, node, pool)
    nodes = list(model.graph.nodes)
    for node in nodes:
        if _is_max_pool(node, modules):
            conv = node.all_input_nodes[0]
            layer = called(conv, modules)
            if is_a(layer, nn.Conv2d) and calls[id(layer)] == 1 and only_user(conv) is node:
                _pool_at_once(model, conv, layer, node, modules)


def overwrite_with_relus(model: fx.GraphModule) -> None:
    """A ReLU of memory that only it reads writes there."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in list(model.graph.nodes):
        if _is_relu(node, modules) and _is_fresh(node.all_input_nodes[0], modules):
            _overwrite(model, node)


def is_a(module: nn.Module | None, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether it is of that very class and nothing else happens at its call."""
    return module is not None and type(module) is kind and is_plain(module)


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads its value; None where there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return is_a(called(node, modules), nn.ReLU)
    return node.target in RELU if node.op == "call_function" else node.target in ("relu", "relu_")


def _addend(call: fx.Node, addition: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | None:
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
        if may_write(between, modules):
            return None
        between = between.next
    return other


def may_write(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether it may change a tensor that others read."""
    if node.op == "call_module":
        return bool(getattr(called(node, modules), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "unknown_")
    in_place = getattr(operator, name, None) is node.target and name.startswith(("i", "set"))
    in_place |= name.partition(".")[0].endswith("_")
    return in_place or "out" in node.kwargs or any(v is True for v in (*node.args, *node.kwargs.values()))


def _take_addend(model: fx.GraphModule, call: fx.Node, addition: fx.Node, addend: fx.Node) -> fx.Node:
    with model.graph.inserting_before(addition):
        fused = model.graph.call_module(target_name(call), (call.all_input_nodes[0], addend))
    addition.replace_all_uses_with(fused)
    model.graph.erase_node(addition)
    model.graph.erase_node(call)
    return fused


def _is_fresh(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether it makes memory of its own that only one other node reads."""
    if len(node.users) != 1:
        return False
    module = called(node, modules)
    if module is not None and type(module) in LAYERS and is_plain(module):
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


def _is_max_pool(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = called(node, modules)
        return is_a(module, nn.MaxPool2d) and not module.return_indices
    indices = len(node.args) > 6 or node.kwargs.get("return_indices", False)
    return node.op == "call_function" and node.target in MAX_POOL and not indices


def _move_behind(model: fx.GraphModule, relu: fx.Node, pool: fx.Node) -> None:
    pool.replace_input_with(relu, relu.all_input_nodes[0])
    with model.graph.inserting_after(pool):
        late = model.graph.call_function(nn.functional.relu, (pool,))
    pool.replace_all_uses_with(late, delete_user_cb=lambda user: user is not late)
    model.graph.erase_node(relu)


def _pool_at_once(
    model: fx.GraphModule, conv: fx.Node, layer: nn.Conv2d, pool: fx.Node, modules: Mapping[str, nn.Module]
) -> None:
    """One operator for a convolution of few weights, the max pooling behind it and a ReLU behind that."""
    padding = explicit_padding(layer)
    options = _pool_options(pool, modules)
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    if options is None or padding is None or not plain or layer.weight.numel() > MOST_POOLED:
        return
    follower = only_user(pool)
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


def _pool_options(pool: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[Pair, Pair, Pair] | None:
    """Window, stride and padding of a max pooling; None for one that has more to it."""
    names = "kernel_size", "stride", "padding", "dilation", "ceil_mode"
    if pool.op == "call_module":
        given: dict[str, Any] = {name: getattr(called(pool, modules), name) for name in names}
    else:
        given = dict(zip(names, pool.args[1:], strict=False)) | dict(pool.kwargs)
    size, padding = given["kernel_size"], given.get("padding", 0)
    options = size, given.get("stride") or size, padding
    if given.get("dilation", 1) not in (1, (1, 1), [1, 1]) or given.get("ceil_mode", False) is not False:
        return None
    parts = [n for option in options for n in (option if isinstance(option, tuple | list) else (option,))]
    return options if all(isinstance(n, int) for n in parts) else None


def skip(model: fx.GraphModule, node: fx.Node) -> None:
    """Takes a node out; its only input stands in for it."""
    node.replace_all_uses_with(node.all_input_nodes[0])
    model.graph.erase_node(node)
