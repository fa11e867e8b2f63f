"""One safetensors file for a compressed model: weights, structure, ranks and versions; no pickle."""

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kegfast._util.check import expected
from kegfast._util.files import parse_json, read_tensors, save_tensors
from kegfast._util.imports import module_and_name
from kegfast.compression.structure import (
    container,
    graph_from,
    graph_of,
    module_from,
    module_spec,
    module_specs,
)
from kegfast.compression.surgery import Site, factored_layers, replace, unwrap
from kegfast.nn import TuckerConv2d
from kegfast.version import __version__

FORMAT = "kegfast-model-1"

Factory = str | Callable[[], nn.Module]


def save(model: nn.Module, path: str | Path, *, factory: str | None = None) -> None:
    """Writes a model, compressed or not, as one safetensors file, atomically.

    The metadata holds the arguments of every layer, the ranks, the versions of kegfast and torch, and,
    where the forward pass can be traced by torch.fx, that too: `load` then needs no other code.

    Args:
        model: any module. Wrappers (DataParallel, DistributedDataParallel, AveragedModel, torch.compile) are
            left out.
        path: the file, usually `*.safetensors`.
        factory: import path of what makes the uncompressed architecture ("package.module:function"),
            kept as a hint for models that cannot be traced.

    Raises:
        TypeError, ValueError: no module, or a factory that is no import path.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    model = unwrap(model)
    if factory is not None:
        module_and_name("factory", factory)
    modules, aliases = module_specs(model)
    structure = {
        "modules": modules,
        "aliases": aliases,
        "graph": graph_of(model),
        "loose": _loose(model, modules),
    }
    ranks = {name: layer.rank for name, layer in factored_layers(model)}
    metadata = {
        "format": FORMAT,
        "kegfast": __version__,
        "torch": str(torch.__version__),
        "factory": factory or "",
        "ranks": json.dumps(ranks),
        "structure": json.dumps(structure),
    }
    save_tensors(path, model.state_dict(), metadata)


def _loose(model: nn.Module, modules: Mapping[str, Any]) -> dict[str, str]:
    """Parameters and buffers that hang in modules without a spec, and which of both they are."""
    kinds = {name: "parameter" for name, _ in model.named_parameters(remove_duplicate=False)}
    kinds |= {name: "buffer" for name, _ in model.named_buffers(remove_duplicate=False)}
    inside = tuple(f"{name}." if name else "" for name in modules)
    saved = model.state_dict()
    return {
        name: kind
        for name, kind in kinds.items()
        if name in saved and not (inside and name.startswith(inside))
    }


def load(path: str | Path, model: nn.Module | None = None, *, factory: Factory | None = None) -> nn.Module:
    """Reads what `save` wrote, without executing anything that is in the file.

    Args:
        path: the file.
        model: the uncompressed architecture (any weights); its layers are replaced in place. None
            rebuilds the model from the file alone.
        factory: makes that architecture; a callable or its import path.

    Returns:
        The model in eval mode on the CPU. Without `model` and `factory` it is a torch.fx GraphModule
        with the same state dict.

    Raises:
        OSError: the file cannot be opened.
        TypeError: `model` is no module.
        ValueError: it is no such file, does not fit the model, holds NaN or infinity, or needs a
            factory.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module, or None (see factory)", model))
    model = None if model is None else unwrap(model)
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a file of kegfast.save, got format {metadata.get('format')!r}")
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise ValueError(f"{path}: expected finite weights, got NaN or infinity in {', '.join(bad[:3])}")
    try:
        structure = parse_json(metadata["structure"], path)
        base = _base(model, factory, structure, tensors, metadata.get("factory"))
        alone = model is None and factory is None and "" not in structure["modules"]
        found = graph_from(structure["graph"], base) if alone and structure["graph"] is not None else base
        found.load_state_dict(_with_shared(found, tensors), assign=True)
        if any(tensor.is_meta for tensor in [*found.parameters(), *found.buffers()]):
            raise ValueError(f"{path}: expected all tensors of the model, got some of them")
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(f"{path}: expected a model that fits, got {' '.join(reason)[:300]}") from error
    return found.eval()


def _base(
    model: nn.Module | None,
    factory: Factory | None,
    structure: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    hint: str | None,
) -> nn.Module:
    if model is None and factory is not None:
        model = resolve(factory)()
    if model is None and "" in structure["modules"]:  # a layer by itself
        return _empty(structure["modules"][""])
    if model is None and structure["graph"] is None:
        if not hint or not hint.startswith("kegfast.models:"):  # never call what a file asks for
            wanted = f"factory={hint!r}" if hint else "the architecture"
            raise ValueError(f"model or factory must be given, this file cannot be traced; pass {wanted}")
        model = resolve(hint)()
    if model is not None and not isinstance(model, nn.Module):
        raise ValueError(expected("factory", "one that makes a torch.nn.Module", model))
    if model is not None:
        return _adapt(model, structure)
    root = nn.Module()
    for name, spec in structure["modules"].items():
        _hang(root, name, _empty(spec))
    for alias, name in structure["aliases"].items():
        _hang(root, alias, root.get_submodule(name))
    for name, kind in structure["loose"].items():
        owner, _, last = name.rpartition(".")
        holder = container(root, owner)
        if kind == "parameter":
            floating = tensors[name].is_floating_point()
            holder.register_parameter(last, nn.Parameter(tensors[name], requires_grad=floating))
        else:
            holder.register_buffer(last, tensors[name])
    return root


def _with_shared(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those of shared modules under each of their names in the model."""
    own = model.state_dict(keep_vars=True)
    by_identity = {id(own[name]): tensors[name] for name in own if name in tensors}
    shared = {name: by_identity[id(own[name])] for name in own if id(own[name]) in by_identity}
    return {**shared, **tensors}


def _adapt(model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
    """The model with every layer that the structure describes differently replaced."""
    calls = [node for node in structure["graph"] or [] if node["op"] == "call_module" and "args" in node]
    targets = [node["target"] for node in calls if len(node["args"]["tuple"]) > 1]
    adding = {structure["aliases"].get(name, name) for name in targets}
    for name, spec in structure["modules"].items():
        old = model.get_submodule(name)
        if module_spec(old) != spec:
            shared = [n for n, m in model.named_modules(remove_duplicate=False) if m is old]
            new = _empty(spec)
            if isinstance(new, TuckerConv2d) and name in adding:
                new.activation = None  # the model's own code adds, and rectifies then
            model = replace(model, Site(name, new, shared), new)
    return model


def _empty(spec: Mapping[str, Any]) -> nn.Module:
    """The module of a spec, whose values the file has: sizes that are not the file's take no memory."""
    with torch.device("meta"):
        return module_from(spec)


def _hang(root: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    container(root, owner).add_module(last or "model", module)


def resolve(factory: Factory) -> Callable[[], nn.Module]:
    """The callable of an import path.

    Raises:
        ValueError: there is none.
    """
    if callable(factory):
        return factory
    module, name = module_and_name("factory", factory)
    try:
        found: Callable[[], nn.Module] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"factory must be importable, got {factory!r}: {error}") from error
    if not callable(found):
        raise ValueError(expected("factory", "a callable", found))
    return found
