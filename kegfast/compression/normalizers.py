"""What a BatchNorm module computes: plain BatchNorm by its running statistics, and what its class adds."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kegfast._util.graph import called, target_name
from kegfast.compression.rewriting import is_a, skip
from kegfast.nn import TuckerLinear

OWN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
KEEP_MATRICES = (
    nn.Linear, TuckerLinear, nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU,
    nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardswish, nn.BatchNorm1d, nn.LayerNorm,
)  # fmt: skip
"""Modules whose output has as many dimensions as their input."""
KEEPING_CALLS = (torch.relu, F.relu, F.dropout, "relu", "contiguous")


@dataclass
class Normalizer:
    """A BatchNorm taken apart: what remains to do once its scale and shift are in the layer before it."""

    dimensions: int  # 1 or 2: of BatchNorm1d, or of images
    rest: nn.Module  # holds what the remaining nodes call, under the norm's own names
    behind: list[fx.Node] = field(default_factory=list)  # the remaining nodes
    norm: fx.Node | None = None  # what they read
    result: fx.Node | None = None

    def inline(self, model: fx.GraphModule, node: fx.Node, layer: fx.Node) -> None:
        """Puts the remaining nodes in the place of the norm's call, behind the layer."""
        with model.graph.inserting_before(node):
            result, copies = self._copy(model.graph, layer, f"{node.target}.")
        node.replace_all_uses_with(result)
        model.graph.erase_node(node)
        for copy in copies:
            if copy.op == "call_module" and is_a(model.get_submodule(target_name(copy)), nn.Identity):
                skip(model, copy)

    def _copy(self, graph: fx.Graph, layer: fx.Node, prefix: str) -> tuple[fx.Node, list[fx.Node]]:
        values = {self.norm: layer}
        for node in self.behind:
            values[node] = graph.node_copy(node, values.__getitem__)
            if node.op in ("call_module", "get_attr"):
                values[node].target = prefix + target_name(node)
        return values[self.result], [values[node] for node in self.behind]


class _Parts(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def normalizer(norm: _BatchNorm) -> Normalizer | None:
    """A BatchNorm in eval mode taken apart into a scale and shift and what follows; None for other classes.

    A class with a forward of its own is traced: it must normalize its only input by its own statistics and
    weights, once, and may do anything with the result.
    """
    dimensions = 1 if isinstance(norm, nn.BatchNorm1d) else 2
    if type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        known = isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm)
        return Normalizer(dimensions, nn.Identity()) if known else None
    try:
        with _any_shape(norm):
            graph = _Parts().trace(norm)
    except Exception:  # whatever a forward raises when values are not there
        return None
    x, *options = graph.find_nodes(op="placeholder")
    for check in graph.find_nodes(op="call_function", target=torch._assert):
        graph.erase_node(check)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    found = graph.find_nodes(op="call_function", target=F.batch_norm)
    if len(found) != 1 or any(option.users for option in options) or not _is_own(norm, x, found[0]):
        return None
    nodes = list(graph.nodes)
    place = nodes.index(found[0])
    before, behind, output = nodes[:place], nodes[place + 1 : -1], nodes[-1]
    separate = all(list(node.users) in ([], [found[0]]) for node in before)
    if not separate or not isinstance(output.args[0], fx.Node):
        return None
    if any(node.op == "get_attr" and node.target in OWN for node in behind):
        return None
    return Normalizer(dimensions, _rest(norm) if behind else nn.Identity(), behind, found[0], output.args[0])


@contextmanager
def _any_shape(norm: nn.Module) -> Iterator[None]:
    """Without the checks of the input's shape, which a trace cannot answer."""
    names = [name for name in ("_check_input_dim", "_check_non_zero_input_channels") if hasattr(norm, name)]
    for name in names:
        vars(norm)[name] = lambda x: None
    try:
        yield
    finally:
        for name in names:
            del vars(norm)[name]


def _is_own(norm: _BatchNorm, x: fx.Node, call: fx.Node) -> bool:
    """Whether a call of batch_norm normalizes x by the module's statistics and weights, in eval mode."""
    given = inspect.signature(F.batch_norm).bind(*call.args, **call.kwargs)
    given.apply_defaults()

    def is_own(value: Any, name: str) -> bool:
        if value is None:
            return getattr(norm, name) is None
        return isinstance(value, fx.Node) and value.op == "get_attr" and value.target == name

    arguments = given.arguments
    own = all(is_own(arguments[name], name) for name in OWN[:4])
    return own and arguments["input"] is x and arguments["training"] is False and arguments["eps"] == norm.eps


def _rest(norm: nn.Module) -> nn.Module:
    """A module with all that the norm holds, less what is BatchNorm's."""
    rest = nn.Module()
    rest._modules.update(norm._modules)
    rest._parameters.update({name: p for name, p in norm._parameters.items() if name not in OWN})
    for name, buffer in norm._buffers.items():
        if name not in OWN:
            rest.register_buffer(name, buffer, name not in norm._non_persistent_buffers_set)
    return rest.train(norm.training)


def reads_matrices(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a layer's output is known to be two-dimensional, by what the graph does before it."""
    while node.all_input_nodes:
        module = called(node, modules)
        if isinstance(module, nn.Flatten):
            return (module.start_dim, module.end_dim) == (1, -1)
        keeps = isinstance(module, KEEP_MATRICES) if module is not None else node.target in KEEPING_CALLS
        if not keeps:
            return _flattens(node)
        node = node.all_input_nodes[0]
    return False


def _flattens(node: fx.Node) -> bool:
    """Whether a function or method has a matrix as its result: flatten from 1 on, view as two sizes."""
    rest = node.args[1:]
    if node.target in (torch.flatten, "flatten"):
        return (rest == (1,) and not node.kwargs) or (not rest and dict(node.kwargs) == {"start_dim": 1})
    if node.target in (torch.reshape, "view", "reshape"):
        sizes = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
        return len(sizes) == 2 and not node.kwargs
    return False
