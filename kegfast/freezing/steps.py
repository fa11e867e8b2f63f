"""What the native part understands: nodes of a traced graph as steps of a network."""

import torch
from torch import fx, nn

from kegfast._util.graph import called, target_name
from kegfast.freezing.calls import FUNCTIONS, METHODS
from kegfast.freezing.layers import MODULES
from kegfast.freezing.network import MOST_OPTION, Step
from kegfast.freezing.values import Shapes, Unknown, Values


class Reader:
    """Reads nodes of one graph as steps."""

    def __init__(self, graph: fx.GraphModule, shapes: Shapes):
        self.values = Values(graph, shapes)

    def steps(self, node: fx.Node) -> list[Step] | None:
        """The steps that a node stands for, the last of which makes its value.

        None where torch has to run it; an empty list where its value is its first operand.
        """
        shape = self.values.shapes.get(node)
        if shape is None or shape[:1] != (self.values.batch,):
            return None
        try:
            module = called(node, self.values.modules)
            steps = self._call(node) if module is None else self._module(node, module)
        except Unknown:
            return None
        if any(option > MOST_OPTION for step in steps for option in step.options):
            return None
        previous: object = None
        for i, step in enumerate(steps):
            if i > 0:
                step.operands[0] = previous
            step.value = node if i == len(steps) - 1 else (node, i)
            step.name = str(node.target) if node.op == "call_module" else node.name
            previous = step.value
        return steps

    def _module(self, node: fx.Node, module: nn.Module) -> list[Step]:
        read = MODULES.get(type(module))
        if read is None or node.kwargs or module._forward_hooks or module._forward_pre_hooks:
            raise Unknown
        if any(p.dtype is not torch.float32 for p in module.parameters()):
            raise Unknown
        return read(self.values, list(node.args), module)

    def _call(self, node: fx.Node) -> list[Step]:
        is_function = node.op == "call_function"
        read = FUNCTIONS.get(node.target) if is_function else METHODS.get(target_name(node))
        if read is None:
            raise Unknown
        return read(self.values, list(node.args), dict(node.kwargs), node)
