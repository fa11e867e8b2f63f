"""Outputs of inner modules, taken by path with forward hooks: no model is edited."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from kegfast._util.check import expected


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside (Distributed)DataParallel and what `torch.compile` made of it."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _compiled(model: nn.Module) -> bool:
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())


class Features:
    """What the named modules of a model put out in its latest forward pass.

    Use as a context manager; `features["layers2.0"]` is that module's output.

    Code compiled without the hooks would not run them, and with them would go on to: where the model is
    compiled, entering and leaving empty the compiler's caches.

    Args:
        model: Any module, wrapped for parallel training, compiled, or neither.
        paths: Paths as `named_modules` spells them, `""` for the model itself.

    Raises:
        TypeError: No module, or one path in place of several.
        ValueError: A path is not a module of the model.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]):
        if not isinstance(model, nn.Module):
            raise TypeError(expected("model", "a torch.nn.Module", model))
        if isinstance(paths, str) or not isinstance(paths, Iterable):
            raise TypeError(expected("paths", "a list of modules' paths", paths))
        modules = dict(unwrap(model).named_modules())
        self._modules = {path: _find(modules, path) for path in paths}
        self._outputs: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._recompile = bool(self._modules) and _compiled(model)

    def __enter__(self) -> Self:
        if self._recompile:
            torch.compiler.reset()
        for path, module in self._modules.items():
            self._hooks.append(module.register_forward_hook(self._keep(path)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._recompile:
            torch.compiler.reset()
        self._hooks.clear()
        self._outputs.clear()

    def __getitem__(self, path: str) -> Tensor:
        if path not in self._outputs:
            raise RuntimeError(f"the module {path!r} did not run in the model's latest forward pass")
        return self._outputs[path]

    def taken(self) -> dict[str, Tensor]:
        """All outputs since the last call, by path."""
        found = {path: self[path] for path in self._modules}
        self._outputs.clear()
        return found

    def _keep(self, path: str) -> Callable[[nn.Module, tuple, object], None]:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if not isinstance(output, Tensor):
                raise TypeError(expected(f"the output of {path!r}", "a tensor", type(output)))
            self._outputs[path] = output

        return hook


def _find(modules: dict[str, nn.Module], path: str) -> nn.Module:
    if path not in modules:
        near = get_close_matches(path, modules, n=3, cutoff=0.3)
        what = "the path of a module" + (f" (near: {', '.join(near)})" if near else "")
        raise ValueError(expected("layer", what, path))
    return modules[path]
