"""FLOP formulas for torch's counter, handed over when that is first imported.

Its module imports Triton where there is one, which would be a fifth of `import kegfast`.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def register_flop_formula(target: Any, formula: Callable[..., int]) -> None:
    """Teaches FlopCounterMode an operator.

    Args:
        target: the operator, as `torch.ops.kegfast.tucker2`.
        formula: from the shapes of its arguments and `out_shape`.
    """
    _waiting.append((target, formula))
    if _COUNTER in sys.modules:
        _hand_over(sys.modules[_COUNTER])


def _hand_over(counter: ModuleType) -> None:
    for target, formula in _waiting:
        counter.register_flop_formula(target)(formula)
    _waiting.clear()


class _Awaited(MetaPathFinder):
    """Finds the counter as every other finder does, and follows its loading."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _hand_over(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one import
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Awaited())
