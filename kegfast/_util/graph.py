"""What nodes of torch.fx graphs name; torch types their targets as functions or names alike."""

from collections.abc import Mapping

from torch import fx, nn


def target_name(node: fx.Node) -> str:
    """The name of the module that a node calls, or of the tensor that it gets."""
    return str(node.target)


def called(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The module that a node calls; None for a node of another kind."""
    return modules[target_name(node)] if node.op == "call_module" else None
