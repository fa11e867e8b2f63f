"""Folding BatchNorm and ReLU leaves the outputs as they were."""

import pytest
import torch
from odd import odd, randomise_norms
from torch import nn

from kegfast import compress, fuse
from kegfast.models import ResNet14
from kegfast.nn import TuckerConv2d

X = torch.linspace(-2, 2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


def norms(model):
    return sum(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in model.modules())


def relus(graph):
    return sum(node.target is nn.functional.relu for node in graph.graph.nodes)


def test_everything_that_can_be_is_folded():
    torch.manual_seed(0)
    model = ResNet14()
    randomise_norms(model)
    student, report = compress(model.eval(), 0.5, include="layers*")
    x = torch.randn(2, 1, 32, 32)
    folded = fuse(student)
    torch.testing.assert_close(folded(x), student(x), rtol=1e-4, atol=1e-4)
    assert norms(folded) == 0
    assert norms(student) == 13
    fused = [m for m in folded.modules() if isinstance(m, TuckerConv2d)]
    assert len(fused) == len(report.ranks) == 12
    assert sum(layer.activation == "relu" for layer in fused) == 6  # conv1 of each block
    assert relus(folded) == 7  # after the stem and after each sum
    assert all(layer.activation is None for layer in student.modules() if isinstance(layer, TuckerConv2d))


def test_a_norm_of_something_else_than_the_layers_features_stays():
    """BatchNorm1d normalises the second dimension, which behind a Linear may be a sequence's."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(5)).eval()
    model[1].running_mean.normal_()
    x = torch.randn(2, 5, 6)
    folded = fuse(compress(model, {"0": (3, None)})[0])
    assert norms(folded) == 1
    assert folded(x).shape == (2, 5, 8)


def test_dense_and_one_sided_layers_too():
    student, _ = compress(odd(), {"stem": (2, 9), "block.0.0": (None, 8)})
    folded = fuse(student)
    assert norms(folded) == 0
    torch.testing.assert_close(folded(X), student(X), rtol=1e-4, atol=1e-5)
    dense = odd()
    torch.testing.assert_close(fuse(dense)(X), dense(X), rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """The value between convolution and norm is read again; the second convolution runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.a(x)
        y = self.norm_a(y) + y
        return torch.relu(self.norm_b(self.b(y))) + self.b(-y)


class Rectified(nn.Module):
    """ReLUs of the input, of a value that is read again, of sums and of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x):
        y = self.a(x)
        z = self.relu(y) + self.relu(x)
        z = z + torch.relu(y + x)
        return self.relu(self.b(torch.relu(z)))


def test_a_relu_overwrites_only_what_it_alone_reads():
    torch.manual_seed(0)
    model = Rectified().eval()
    folded, x = fuse(model), X.clone()
    torch.testing.assert_close(folded(x), model(X))
    assert torch.equal(x, X)
    in_place = [node.args[0].name for node in folded.graph.nodes if node.kwargs.get("inplace")]
    assert in_place == ["add_1", "add_2", "b"]
    folded(x).sum().backward()
    wanted = [p.grad.clone() for p in folded.parameters()]
    model(x).sum().backward()
    for got, want in zip(wanted, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(got, want)


def test_values_that_others_read_are_left_alone():
    torch.manual_seed(0)
    model = Twice()
    randomise_norms(model)
    student, _ = compress(model.eval(), {"a": (2, 3), "b": (3, 3)})
    folded = fuse(student)
    assert norms(folded) == 2
    torch.testing.assert_close(folded(X), student(X), rtol=1e-4, atol=1e-5)


class Branching(nn.Module):
    """torch.fx cannot trace this."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4))

    def forward(self, x):
        x = self.body(x if float(x.sum()) > 0 else -x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("rank", [(2, 5), (2, None)])
def test_sequentials_of_models_that_cannot_be_traced(rank):
    torch.manual_seed(0)
    model = Branching()
    randomise_norms(model)
    student, _ = compress(model.eval(), {"body.0": rank})
    folded = fuse(student)
    assert isinstance(folded, Branching)
    assert norms(folded) == 0
    torch.testing.assert_close(folded(X), student(X), rtol=1e-4, atol=1e-5)
