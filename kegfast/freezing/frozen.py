"""What `freeze` returns: a module of native parts, and torch's between them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from kegfast._util.check import expected
from kegfast._util.files import atomic_write
from kegfast._util.graph import target_name
from kegfast.ops import _native

if TYPE_CHECKING:
    from kegfast._C import FrozenNetwork, FrozenPlan

MOST_PLANS = 8
"""Input sizes for which a part keeps a plan."""


@dataclass(frozen=True)
class StepCost:
    """What one step of a frozen network costs."""

    name: str
    kind: str
    native: bool
    seconds: float
    share: float  # of all steps


@dataclass
class _Plan:
    key: tuple[Any, ...]
    native: "FrozenPlan"
    address: int
    sizes: list[tuple[int, ...]]
    layouts: list[torch.memory_format]

    def outputs(self) -> list[Tensor]:
        """Memory for what a run makes."""
        return [
            torch.empty(size, memory_format=layout)
            for size, layout in zip(self.sizes, self.layouts, strict=True)
        ]


class Part(nn.Module):
    """A network that the native part runs, planned for each size of its inputs.

    Args:
        data: the network, as `network_bytes` wrote it.
        steps: kind and name of each step.
        outputs: how many tensors it returns: one alone, or else a tuple.
    """

    def __init__(self, data: bytes, steps: list[tuple[str, str]], outputs: int):
        super().__init__()
        self.data, self.steps, self.outputs = data, steps, outputs
        self._forget()

    def _forget(self) -> None:
        self._network: FrozenNetwork | None = None
        self._plans: dict[tuple[Any, ...], _Plan] = {}
        self._last: _Plan | None = None

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The network's outputs, by the plan of the last call where sizes and threads are the same."""
        plan = self._last
        if plan is None or plan.key != _key(inputs):
            plan = self._plan(inputs)
        outputs = plan.outputs()
        addresses = [x.data_ptr() for x in inputs] + [y.data_ptr() for y in outputs]
        if not _native._C.run_frozen(plan.address, *addresses):
            self._forget_plans()
            return self.forward(*inputs)
        return outputs[0] if self.outputs == 1 else tuple(outputs)

    def call_one(self, x: Tensor) -> Tensor | None:
        """`forward` of one input and output by the last plan; None where that is not for this call."""
        plan = self._last
        if (
            plan is None
            or type(x) is not Tensor
            or plan.key != (torch.get_num_threads(), x.dtype, x.shape, x.stride())
        ):
            return None
        y = torch.empty(plan.sizes[0], memory_format=plan.layouts[0])
        return y if _native._C.run_frozen(plan.address, x.data_ptr(), y.data_ptr()) else None

    def seconds(self, inputs: Sequence[Tensor]) -> list[float]:
        """Seconds of each step, in a run of its own."""
        self.forward(*inputs)
        plan = self._plan(tuple(inputs))
        outputs = plan.outputs()
        return plan.native.seconds([t.data_ptr() for t in (*inputs, *outputs)])

    def _forget_plans(self) -> None:
        self._plans, self._last = {}, None

    def _plan(self, inputs: tuple[Tensor, ...]) -> _Plan:
        for x in inputs:
            if not isinstance(x, Tensor) or x.dtype is not torch.float32 or not x.is_cpu:
                raise TypeError(expected("input", "a float32 tensor on the CPU", x))
        key = _key(inputs)
        if key not in self._plans:
            if self._network is None:
                self._network = _native._C.read_frozen(self.data)
            sizes, strides = [list(x.shape) for x in inputs], [list(x.stride()) for x in inputs]
            native = _native._C.plan_frozen(self._network, sizes, strides, torch.get_num_threads())
            made = [tuple(size) for size in native.output_sizes]
            while len(self._plans) >= MOST_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = _Plan(key, native, native.address, made, list(map(_layout, made)))
        plan = self._last = self._plans[key]
        return plan

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_network": None, "_plans": {}, "_last": None}

    def extra_repr(self) -> str:
        return f"{len(self.steps)} steps"


def _key(inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    key: tuple[Any, ...] = (torch.get_num_threads(),)
    for x in inputs:
        key += x.dtype, x.shape, x.stride()
    return key


def _layout(size: tuple[int, ...]) -> torch.memory_format:
    return torch.channels_last if len(size) == 4 else torch.contiguous_format


class Frozen(nn.Module):
    """A network frozen by `kegfast.freeze`.

    It has no parameters: its weights are packed inside. It can be copied and pickled.
    """

    def __init__(self, graph: nn.Module):
        super().__init__()
        self.graph = graph
        self._find_one()
        self.requires_grad_(False)
        self.eval()

    def _find_one(self) -> None:
        """A network of one part, input and output is called past the graph."""
        graph = self.graph
        parts = [m for m in graph.modules() if isinstance(m, Part)]
        nodes = [n for n in graph.graph.nodes] if isinstance(graph, fx.GraphModule) else []
        alone = [n.op for n in nodes] == ["placeholder", "call_module", "output"] and nodes[-1].args[
            0
        ] is nodes[1]
        self._one: Callable[[Tensor], Tensor | None] | None = parts[0].call_one if alone and parts else None

    def forward(self, *inputs: Tensor) -> Any:
        """What the model answers in eval mode.

        Raises:
            TypeError, ValueError: for inputs that the network does not take.
        """
        if len(inputs) == 1 and self._one is not None:
            y = self._one(inputs[0])
            if y is not None:
                return y
        with torch.no_grad():
            return self.graph(*inputs)

    def report(self, *inputs: Tensor) -> list[StepCost]:
        """What each step costs for these inputs, and whether it is native or torch's.

        Args:
            inputs: as of a call.

        Returns:
            One record per step, in the order in which they run.
        """
        timed = _Timed(self.graph)
        with torch.no_grad():
            self(*inputs)
            if isinstance(self.graph, fx.GraphModule):
                timed.run(*inputs)
        total = sum(seconds for *_, seconds in timed.costs) or 1.0
        return [StepCost(*cost, cost[-1] / total) for cost in timed.costs]

    def save(self, path: str | Path) -> None:
        """Writes the network for `kegfast.runtime.load` and csrc/kegplan.h, atomically.

        The file holds the weights as they are, for any machine, and nothing that is executed.

        Raises:
            ValueError: for a network of which torch runs a part; `report` says which.
        """
        nodes = list(self.graph.graph.nodes) if isinstance(self.graph, fx.GraphModule) else []
        parts = [m for m in self.graph.modules() if isinstance(m, Part)]
        answer = nodes[-1].args[0] if nodes else None
        answers = tuple(answer) if isinstance(answer, tuple | list) else (answer,)
        calls = [n for n in nodes if n.op == "call_module"]
        items = [n for n in nodes if n.op == "call_function"]
        entries = [n for n in nodes if n.op == "placeholder"]
        whole = len(parts) == len(calls) == 1 and calls[0].args == tuple(entries)
        whole = whole and (answers == tuple(calls) or answers == tuple(items)) and all(map(is_item, items))
        if not whole:
            raise ValueError(expected("the network", "one native part (report() says what torch runs)", self))
        with atomic_write(Path(path)) as temporary:
            temporary.write_bytes(parts[0].data)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_one": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._find_one()


def item(values: tuple[Tensor, ...], index: int) -> Tensor:
    """One of the tensors that a part returns."""
    return values[index]


def is_item(node: fx.Node) -> bool:
    """Whether a node of a frozen graph takes one of a part's tensors."""
    return node.target is item


class _Timed(fx.Interpreter):
    """Runs a graph and notes what its steps cost."""

    def __init__(self, graph: nn.Module):
        super().__init__(graph)
        self.costs: list[tuple[str, str, bool, float]] = []

    def run_node(self, n: fx.Node) -> Any:
        part = self.module.get_submodule(target_name(n)) if n.op == "call_module" else None
        if isinstance(part, Part):
            inputs = [self.env[value] for value in n.args if isinstance(value, fx.Node)]
            seconds = part.seconds(inputs)
            self.costs += [(name, kind, True, s) for (kind, name), s in zip(part.steps, seconds, strict=True)]
            return part(*inputs)
        start = time.perf_counter()
        value = super().run_node(n)
        if n.op.startswith("call") and not is_item(n):
            self.costs.append((n.name, str(n.target), False, time.perf_counter() - start))
        return value
