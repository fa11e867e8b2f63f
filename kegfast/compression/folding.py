"""fuse: BatchNorm into the weights of the layers before it, ReLU and additions into the fused operator."""

import logging
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kegfast._util import check
from kegfast._util.check import accepts, expected
from kegfast._util.graph import called, target_name
from kegfast._util.inputs import Inputs, as_inputs, call, copied, named_tensors
from kegfast._util.modules import clone, evaluation
from kegfast.compression import rewriting
from kegfast.compression.normalizers import Normalizer, normalizer, reads_matrices
from kegfast.compression.rewriting import LAYERS, Layer, count_calls, only_user
from kegfast.compression.structure import LayerTracer, trace_graph
from kegfast.compression.surgery import HOOKS, has_own_weights, is_plain, owners_of, tail_of, unwrap
from kegfast.extraction.moments import running_statistics
from kegfast.nn import TuckerConv2d, TuckerLinear
from kegfast.nn.factors import Dense

log = logging.getLogger(__name__)

METADATA = ("dtype", "device", "shape", "ndim")
"""Of a weight, what folding leaves as it is."""


def fuse(model: nn.Module, example_input: Any = None, *, final: bool = False) -> nn.Module:
    """Folds BatchNorm and ReLU into the layers before them, for inference.

    A BatchNorm (by its running statistics) goes into the weights and bias of the convolution or Linear
    before it, factored or dense; of a subclass that does more, such as an activation, the rest stays. An
    addition that follows a TuckerConv2d (a residual network's shortcut) and
    a ReLU behind it or the layer go into its operator, which applies them in its last store, at next to no
    cost; any other ReLU before a max pooling moves behind it, where less is left to rectify, and one of a
    layer's output, of a sum or of a maximum overwrites it, as fresh memory costs more than the ReLU; a small
    convolution before a max pooling (a residual network's stem) becomes one operator with it.

    All only where nothing else reads the value between, and where the layer's weights are plain parameters
    of its own: none that are shared, pruned, parametrized or read elsewhere, no hooks, no BatchNorm without
    running statistics. A BatchNorm1d is folded where its input is known to be a matrix, by what comes before
    or by the example. What stays, and why, is logged (level INFO of "kegfast"). In a model that cannot be
    traced by torch.fx nothing is folded: whether its next input takes a way past a BatchNorm, or reads a
    weight by itself, is not known.

    Args:
        model: any module; it stays as it is. Wrappers such as DataParallel are taken off.
        example_input: what the model is called with (a tensor, a tuple of tensors, or a mapping by keyword),
            or None. With it the folded model's outputs are compared with the model's.
        final: promises that nobody writes to the folded model's weights, which its Tucker-2 layers then need
            not compare in each call; see `kegfast.nn.TuckerConv2d.final_` (default False).

    Returns:
        The folded model in eval mode: a torch.fx GraphModule with the same names, or a copy of the model
        where it cannot be traced. Where the folded outputs differ from the model's by more than rounding,
        a copy of the model as it is, with a warning in the log.

    Raises:
        TypeError, ValueError: no module, or an example that it does not take.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    check.flag("final", final)
    model, kind = unwrap(model), type(unwrap(model)).__name__
    inputs = None if example_input is None else as_inputs("example_input", example_input, alike=False)
    folded = clone(model).eval()
    wanted = None if inputs is None else _answers(folded, inputs)
    graph = trace_graph(folded, _Tracer())
    if graph is not None:
        _fuse_graph(graph, inputs)
        folded = graph.eval()
    else:
        log.info("%s cannot be traced: nothing is folded", kind)
    difference = "" if inputs is None or wanted is None else _difference(wanted, _answers(folded, inputs))
    if difference:
        log.warning("%s stays as it is: folded it answered otherwise (%s)", kind, difference)
        folded = clone(model).eval()
    for layer in folded.modules() if final else ():
        if isinstance(layer, TuckerConv2d):
            layer.final_()
    return folded


class _Tracer(LayerTracer):
    """Leaves whole what a graph of its parts would lose: hooks, and BatchNorm with more than BatchNorm."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, _BatchNorm) or any(getattr(m, hooks) for hooks in HOOKS)
        return whole or super().is_leaf_module(m, module_qualified_name)


@torch.no_grad()
def _answers(model: nn.Module, inputs: Inputs) -> list[tuple[str, Tensor]]:
    with evaluation(model), accepts("example_input", inputs):
        return [(name, tensor.clone()) for name, tensor in named_tensors(call(model, copied(inputs)))]


def _difference(wanted: list[tuple[str, Tensor]], found: list[tuple[str, Tensor]]) -> str:
    """Which output differs by more than half of its dtype's digits; empty where none does."""
    if not wanted:
        return "it returns no tensors to compare"
    if [name for name, _ in wanted] != [name for name, _ in found]:
        return "other outputs"
    for (name, a), (_, b) in zip(wanted, found, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {name} of another shape or dtype"
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"output {name}"
            continue
        known = a.isfinite()
        size = float(a[known].abs().max()) if bool(known.any()) else 0.0
        bound = max(size, 1e-6) * torch.finfo(a.dtype).eps ** 0.5
        if not torch.allclose(a, b, rtol=0, atol=bound, equal_nan=True):
            return f"output {name} by {float((a - b)[known].abs().max()):.3g} of {size:.3g}"
    return ""


def _fuse_graph(model: fx.GraphModule, inputs: Inputs | None) -> None:
    rewriting.skip_identities(model)
    _fold_norms(model, inputs)
    rewriting.fuse_epilogues(model)
    rewriting.fuse_pools(model)
    rewriting.overwrite_with_relus(model)
    model.graph.lint()
    model.recompile()


def _fold_norms(model: fx.GraphModule, inputs: Inputs | None) -> None:
    modules, calls = dict(model.named_modules(remove_duplicate=False)), count_calls(model)
    owners, read = owners_of(model), _read_elsewhere(model)
    dims = {} if inputs is None else _dims_of_norm_inputs(model, inputs)
    for node in list(model.graph.nodes):
        norm = called(node, modules)
        if not isinstance(norm, _BatchNorm):
            continue
        before = node.all_input_nodes[0]
        layer = called(before, modules)
        if not isinstance(layer, Layer):
            continue
        parts = normalizer(norm)
        reason = _why_not(layer, norm, parts, owners)
        if calls[id(layer)] > 1 or calls[id(norm)] > 1:
            reason = "it or the layer before it runs several times"
        elif only_user(before) is not node or len(before.args) + len(before.kwargs) > 1:
            reason = "something else reads or adds to what it normalizes"
        elif read & {id(tensor) for tensor in (*_tail(layer).parameters(False), *_tensors(norm))}:
            reason = "its weights, or the layer's, are read elsewhere"
        elif isinstance(layer, nn.Linear | TuckerLinear) and not (
            dims.get(id(norm)) == 2 or reads_matrices(before, modules)
        ):
            reason = "its input is not known to be a matrix"
        if reason is None and not _fold(layer, norm):
            reason = "the folded weights would not be finite"
        if parts is None or reason is not None:
            log.info("%s stays: %s", node.target, reason)
            continue
        log.debug("%s is folded into %s", node.target, before.target)
        model.set_submodule(target_name(node), parts.rest)
        parts.inline(model, node, before)
        modules.update(dict(model.named_modules(remove_duplicate=False)))


def _read_elsewhere(model: fx.GraphModule) -> set[int]:
    """Parameters and buffers that the graph itself reads, or modules that it calls whole, by id."""
    found = set()
    for node in model.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = target_name(node).rpartition(".")
            if any(user.target is not getattr or user.args[1] not in METADATA for user in node.users):
                found.add(id(getattr(model.get_submodule(owner), name)))
        elif node.op == "call_module" and type(whole := model.get_submodule(target_name(node))) not in LAYERS:
            found |= {id(tensor) for part in whole.children() for tensor in _tensors(part)}
    return found


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _dims_of_norm_inputs(model: fx.GraphModule, inputs: Inputs) -> dict[int, int]:
    """How many dimensions each BatchNorm's input has, by the module's id."""
    dims: dict[int, int] = {}

    def note(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        dims[id(norm)] = next(x.dim() for x in (*args, *kwargs.values()) if isinstance(x, Tensor))

    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm)]
    handles = [norm.register_forward_pre_hook(note, with_kwargs=True) for norm in norms]
    model.recompile()
    try:
        _answers(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return dims


def _why_not(
    layer: Layer, norm: _BatchNorm, parts: Normalizer | None, owners: dict[int, set[str]]
) -> str | None:
    """What about the two modules themselves keeps a BatchNorm from being folded into the layer before it."""
    if type(layer) not in LAYERS or not is_plain(layer) or not has_own_weights(_tail(layer), owners):
        return "the layer before it has hooks, or weights that are not plain parameters of its own"
    if not is_plain(norm) or norm.training:
        return "it has hooks, or another mode"
    if norm.running_mean is None:
        return "it has no running statistics"
    if parts is None:
        return f"{type(norm).__name__} does other things than a BatchNorm with something behind it"
    if isinstance(layer, TuckerConv2d) and layer.activation is not None:
        return "the layer before it has an activation"
    linear = isinstance(layer, nn.Linear | TuckerLinear)
    if linear != (parts.dimensions == 1) or norm.num_features != len(_tail(layer).weight):
        return "it normalizes something else than the layer's outputs"
    return None


def _tail(layer: Layer) -> Dense:
    return layer if isinstance(layer, nn.Conv2d | nn.Linear) else tail_of(layer)


@torch.no_grad()
def _fold(layer: Layer, norm: _BatchNorm) -> bool:
    """Scales and shifts the layer's outputs as the norm does; False where that would overflow."""
    tail = _tail(layer)
    mean, variance = running_statistics(norm)
    scale = (variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = tail.bias.double() if tail.bias is not None else torch.zeros_like(scale)
    shift = (bias - mean.double()) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    old = tail.weight
    weight = (old.double() * scale.reshape(-1, *[1] * (old.dim() - 1))).to(old.dtype)
    shift = shift.to(old.dtype)
    if not bool(weight.isfinite().all() and shift.isfinite().all()):
        return False
    tail.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    tail.bias = nn.Parameter(shift, requires_grad=old.requires_grad)
    return True
