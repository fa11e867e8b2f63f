"""What is left in a folded model, and the images that the tests of it are run on."""

import torch
from torch import nn

from kegfast.ops.conv_max_pool import conv_max_pool2d

X = torch.linspace(-2, 2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


def norms(model):
    return sum(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in model.modules())


def relus(graph):
    return sum(node.target is nn.functional.relu for node in graph.graph.nodes)


def additions(graph):
    """Calls of layers that add."""
    return sum(node.op == "call_module" and len(node.args) == 2 for node in graph.graph.nodes)


def pooled(graph):
    """Convolutions and their max pooling as one."""
    return [node for node in graph.graph.nodes if node.target is conv_max_pool2d]
