"""Finding the layers of a model that can be factorized, and replacing them."""

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.graph import target_name
from kegfast._util.modules import Kind, clone
from kegfast.nn import TuckerConv2d, TuckerLinear
from kegfast.nn.build import FactorChain, FactoredLayer
from kegfast.nn.factors import Dense
from kegfast.ops.conv_max_pool import conv_max_pool2d

KINDS = (nn.Conv2d, nn.Linear)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


@dataclass
class Site:
    """One layer of a model: where it hangs, and why it must stay as it is, if so."""

    name: str  # the first of its names
    module: nn.Module
    names: list[str] = field(default_factory=list)  # every name that leads to it
    refusal: str | None = None

    @property
    def title(self) -> str:
        """For people: the name, and the shape of the layer's weight."""
        return f"{self.name or 'the model'} ({' x '.join(map(str, self.layer.weight.shape))})"

    @property
    def layer(self) -> Dense:
        """The module of a site that is not refused."""
        return as_dense(self.module)


def as_dense(module: nn.Module) -> Dense:
    """The module, which is a Conv2d or a Linear.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(module, Dense):
        raise TypeError(expected("layer", "an nn.Conv2d or an nn.Linear", module))
    return module


def survey(model: nn.Module) -> list[Site]:
    """Every convolution and Linear of a model, each once, in the order of `named_modules`.

    Layers that are left alone carry the reason in `refusal`.
    """
    owners = owners_of(model)
    sites: dict[int, Site] = {}
    opaque: dict[str, str] = {}  # prefix of modules whose forward reaches into their children
    for name, module in model.named_modules(remove_duplicate=False):
        if (reason := _opaque(module)) is not None:
            opaque[name] = reason
        if not _is_layer(module):
            continue
        if id(module) in sites:
            sites[id(module)].names.append(name)
            continue
        inside = next((why for top, why in opaque.items() if name.startswith(f"{top}.")), None)
        refusal = inside or _refusal(name, module, owners)
        sites[id(module)] = Site(name, module, [name], refusal)
    return list(sites.values())


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear))


def owners_of(model: nn.Module) -> dict[int, set[str]]:
    """The modules that hold each parameter, by the parameter's id."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    return owners


def is_plain(module: nn.Module) -> bool:
    """Whether its call runs the forward of its class, and no hooks."""
    return "forward" not in vars(module) and not any(getattr(module, hooks) for hooks in HOOKS)


def has_own_weights(layer: nn.Module, owners: dict[int, set[str]]) -> bool:
    """Whether a plain layer's weight and bias are parameters, as built, that no other module holds.

    Parameters that `owners` does not know were made since, for this layer alone.
    """
    given = [layer._parameters.get(name, layer) for name in ("weight", "bias")]
    return is_plain(layer) and all(
        p is None or (isinstance(p, nn.Parameter) and len(owners.get(id(p), ())) <= 1) for p in given
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of DataParallel, DistributedDataParallel, AveragedModel and torch.compile."""
    while True:
        if isinstance(model, WRAPPERS):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def _opaque(module: nn.Module) -> str | None:
    if isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"inside {type(module).__name__}, which reads its layers' weights itself"
    if is_factored(module):
        return "a factor already; kegfast.densify first to choose its ranks anew"
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    return None


def _refusal(name: str, module: nn.Module, owners: dict[int, set[str]]) -> str | None:
    kind = type(module).__name__
    if parametrize.is_parametrized(module):
        return "parametrized (torch.nn.utils.parametrize); remove the parametrization first"
    if hasattr(module, "weight_orig") or hasattr(module, "weight_mask"):
        return "pruned or spectrally normalized; make it permanent first"
    if hasattr(module, "weight_g"):
        return "weight-normalized; remove the normalization first"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "not initialized yet; run the model once first"
    if type(module) not in KINDS:
        return f"{kind} is not factorized, only Conv2d and Linear are"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        depthwise = module.groups == module.in_channels
        return "depthwise convolution" if depthwise else f"grouped convolution ({module.groups})"
    if not is_plain(module):
        return "has hooks or a forward of its own, which would be lost"
    for parameter in module.parameters(recurse=False):
        others = sorted(owners[id(parameter)] - {name})
        if others:
            return f"shares a parameter with {', '.join(others)}"
    if not module.weight.dtype.is_floating_point:
        return f"weights of {module.weight.dtype}"
    return None


def tail_of(layer: FactoredLayer) -> Dense:
    """The factor of a layer made by `build` that runs last and has its bias."""
    return layer._tail


def is_factored(layer: nn.Module) -> TypeGuard[FactoredLayer]:
    """Whether `build` makes such layers."""
    return isinstance(layer, FactoredLayer)


def factored_layers(model: nn.Module) -> Iterator[tuple[str, FactoredLayer]]:
    """Every factored layer of a model with its name, each once."""
    for name, module in model.named_modules():
        if is_factored(module):
            yield name, module


def replace(model: nn.Module, site: Site, layer: nn.Module) -> nn.Module:
    """Hangs `layer` under every name of the site.

    Returns:
        The model, or `layer` where the site is the model itself.
    """
    for name in site.names:
        if not name:
            return layer
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return model


def replace_all(
    model: nn.Module, matches: Callable[[nn.Module], TypeGuard[Kind]], make: Callable[[Kind], nn.Module]
) -> nn.Module:
    """Replaces every module that matches, under all its names; `make` is called once for each."""
    found: dict[Kind, list[str]] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if matches(module):
            found.setdefault(module, []).append(name)
    for module, names in found.items():
        model = replace(model, Site(names[0], module, names), make(module))
    return model


def spell_out_addends(model: nn.Module) -> None:
    """Gives graphs additions, and the ReLUs behind them, for the addends that `fuse` has put into layers."""
    spelled = set()
    for graph in (module for module in model.modules() if isinstance(module, fx.GraphModule)):
        nodes = graph.graph.find_nodes(op="call_module")
        calls = [(call, graph.get_submodule(target_name(call))) for call in nodes]
        spelled |= {layer for call, layer in calls if isinstance(layer, TuckerConv2d) and len(call.args) > 1}
        for call, layer in calls:
            if not isinstance(layer, TuckerConv2d) or layer not in spelled:
                continue
            end = call
            if len(call.args) > 1:
                end = _insert_after(call, operator.add, call.args[1])
                call.args = call.args[:1]
            if layer.activation == "relu":
                _insert_after(end, torch.relu)
        graph.recompile()
    for layer in spelled:
        layer.activation = None


def _pooled(graph: fx.GraphModule) -> Sequence[fx.Node]:
    return graph.graph.find_nodes(op="call_function", target=conv_max_pool2d)


def spell_out_pools(model: nn.Module, inplace: bool = True) -> nn.Module:
    """The model with the convolutions as modules that `fuse` has made one operator with a max pooling."""
    graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    if not inplace and any(map(_pooled, graphs)):
        return spell_out_pools(clone(model))
    for graph in filter(_pooled, graphs):
        for node in _pooled(graph):
            x, weight, *bias = node.all_input_nodes
            _, _, _, _, _, *pool, activation = node.args
            with graph.graph.inserting_before(node):
                y = graph.graph.call_module(target_name(weight).rpartition(".")[0], (x,))
                y = graph.graph.call_function(nn.functional.max_pool2d, (y, *pool))
                if activation == "relu":
                    y = graph.graph.call_function(nn.functional.relu, (y,), {"inplace": True})
            node.replace_all_uses_with(y)
            graph.graph.erase_node(node)
            for part in (weight, *bias):
                if not part.users:
                    graph.graph.erase_node(part)
        graph.recompile()
    return model


def _insert_after(node: fx.Node, function: Callable[..., Tensor], *arguments: Argument) -> fx.Node:
    with node.graph.inserting_after(node):
        call = node.graph.call_function(function, (node, *arguments))
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    return call


def to_change(model: nn.Module, inplace: bool) -> nn.Module:
    """The model that a function of `inplace=` changes: itself, or a copy.

    Raises:
        TypeError: for something other than a module and a bool.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    return model if check.flag("inplace", inplace) else clone(model)


def densify(model: nn.Module, *, inplace: bool = True) -> nn.Module:
    """Undoes `compress`: every factored layer becomes one dense Conv2d or Linear again.

    The dense layers hold the products of the factors, so the outputs stay those of the student.

    Args:
        model: with factored layers.
        inplace: change the model itself (default), else a copy of it.

    Raises:
        TypeError: for something other than a module and a bool.
    """
    model = to_change(model, inplace)
    spell_out_addends(model)
    return replace_all(model, is_factored, _dense)


@torch.no_grad()
def _dense(layer: FactoredLayer) -> nn.Module:
    if isinstance(layer, TuckerConv2d):
        conv = layer.to_conv()
        return nn.Sequential(conv, nn.ReLU()) if layer.activation == "relu" else conv
    weight = layer.weight
    if isinstance(layer, TuckerLinear):
        dense: Dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    else:
        dense = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
        )
    dense.to(weight.device, weight.dtype)
    dense.weight.copy_(weight)
    if (bias := layer.bias) is not None and dense.bias is not None:
        dense.bias.copy_(bias)
    return dense.requires_grad_(layer.core.weight.requires_grad).train(layer.training)


@torch.no_grad()
def unfused(layer: TuckerConv2d) -> nn.Module:
    """The plain convolutions of a fused layer, on the same parameters."""
    parts = FactorChain(OrderedDict(first=layer.first, core=layer.core, last=layer.last))
    return nn.Sequential(parts, nn.ReLU()) if layer.activation == "relu" else parts
