"""The networks of the paper, with the state-dict keys of its published checkpoints."""

from kegfast.models.lenet import LeNet5
from kegfast.models.mlp import MLP
from kegfast.models.resnet import CifarResNet, ResNet14

__all__ = ["MLP", "CifarResNet", "LeNet5", "ResNet14"]
