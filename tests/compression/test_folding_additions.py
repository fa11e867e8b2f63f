"""A residual network's additions go into the layers before them, and leave the outputs as they were."""

import copy
import operator

import pytest
import torch
from folding import X, additions, norms, relus
from odd import randomise_norms
from torch import nn

from kegfast import compress, densify, fuse, load, save
from kegfast.compression import unfuse
from kegfast.models import ResNet14
from kegfast.nn import TuckerConv2d


class Residual(nn.Module):
    """relu(norm(b(relu(norm(a(x))))) + shortcut), added and rectified as given."""

    def __init__(self, add, relu=torch.relu, shortcut=None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(3)
        self.shortcut = shortcut or nn.Identity()
        self.add, self.relu = add, relu

    def forward(self, x):
        y = self.norm_b(self.b(torch.relu(self.norm_a(self.a(x)))))
        return self.relu(self.add(y, self.shortcut(x)))


def residual(*arguments, **options):
    """A compressed one, with statistics of its own."""
    torch.manual_seed(0)
    model = Residual(*arguments, **options)
    randomise_norms(model)
    return compress(model.eval(), {"a": (2, 3), "b": (3, 2)})[0]


def iadd(y, z):
    y += z
    return y


ADDITIONS = {
    "+": operator.add,
    "+ turned": lambda y, z: z + y,
    "torch.add": torch.add,
    "torch.add turned": lambda y, z: torch.add(z, y),
    "+=": iadd,
    "add_": lambda y, z: y.add_(z),
    "add": lambda y, z: z.add(y),
}
RELUS = {
    "torch.relu": torch.relu,
    "functional": nn.functional.relu,
    "module": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "method": lambda y: y.relu(),
    "none": lambda y: y,
}


@pytest.mark.parametrize("add", ADDITIONS)
@pytest.mark.parametrize("relu", RELUS)
def test_additions_go_into_the_layer(add, relu):
    student = residual(ADDITIONS[add], RELUS[relu])
    folded, x = fuse(student), X.clone()
    assert additions(folded) == 1
    assert relus(folded) == norms(folded) == 0
    assert not any(node.op != "call_module" for node in list(folded.graph.nodes)[1:-1])
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(folded(x), student(X), rtol=1e-4, atol=1e-5)
    assert torch.equal(x, X)
    torch.testing.assert_close(folded(x), student(X), rtol=1e-4, atol=1e-5)
    again = fuse(folded)
    torch.testing.assert_close(again(x), student(X), rtol=1e-4, atol=1e-5)


def test_a_shortcut_computed_after_the_layer():
    shortcut = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    student = residual(iadd, nn.ReLU(inplace=True), shortcut)
    folded = fuse(student)
    assert additions(folded) == 1
    torch.testing.assert_close(folded(X), student(X), rtol=1e-4, atol=1e-5)


def test_two_layers_added():
    torch.manual_seed(0)
    shortcut = nn.Conv2d(3, 3, 3, padding=1)
    student = residual(operator.add, torch.relu, shortcut)
    student, _ = compress(student, {"shortcut": (2, 2)})
    folded = fuse(student)
    assert additions(folded) == 1
    torch.testing.assert_close(folded(X), student(X), rtol=1e-4, atol=1e-5)


def overwrite_between(y, z):
    return y + torch.relu_(z)


def other_factor(y, z):
    return torch.add(y, z, alpha=2)


def with_itself(y, z):
    return y + y


def a_number(y, z):
    return y + 1


def overwritten(y, z):
    z = z + 0
    w = z.mul(2)
    return z.add_(y) + w


NOT_ADDED = [overwrite_between, other_factor, with_itself, a_number, overwritten]


@pytest.mark.parametrize("add", NOT_ADDED)
def test_other_additions_stay(add):
    student = residual(add)
    folded = fuse(student)
    assert additions(folded) == 0
    torch.testing.assert_close(folded(X.clone()), student(X.clone()), rtol=1e-4, atol=1e-5)


class Overwriting(nn.Module):
    """What the layer read is overwritten before the addition, through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        x = x + 1
        y = self.conv(x)
        z = nn.functional.relu(x.view(x.shape), inplace=True)
        return y + z


def test_a_layer_is_not_moved_behind_a_write():
    torch.manual_seed(0)
    student, _ = compress(Overwriting().eval(), {"conv": (2, 2)})
    folded = fuse(student)
    torch.testing.assert_close(folded(X), student(X), rtol=1e-4, atol=1e-5)


def test_a_shortcut_that_broadcasts():
    shortcut = nn.AdaptiveAvgPool2d(1)
    student = residual(operator.add, torch.relu, shortcut)
    folded = fuse(student)
    assert additions(folded) == 1
    with torch.no_grad():
        torch.testing.assert_close(folded(X), student(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relu", ["torch.relu", "none"])
@pytest.mark.parametrize("undo", [densify, unfuse])
def test_plain_layers_again(undo, relu):
    student = residual(operator.add, RELUS[relu])
    plain = undo(copy.deepcopy(fuse(student)))
    assert additions(plain) == 0
    assert not any(isinstance(module, TuckerConv2d) for module in plain.modules())
    torch.testing.assert_close(plain(X), student(X), rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_with_and_without_code(tmp_path):
    student = residual(operator.add)
    folded = fuse(student)
    save(folded, tmp_path / "folded.safetensors")
    for model in (None, Residual(operator.add)):
        loaded = load(tmp_path / "folded.safetensors", model)
        torch.testing.assert_close(loaded(X), student(X), rtol=1e-4, atol=1e-5)


def test_a_folded_residual_network_compiles_whole():
    torch.manual_seed(0)
    student, _ = compress(ResNet14().eval(), 0.3, include="layers2.*")
    folded, x = fuse(student), torch.randn(2, 1, 32, 32)
    assert additions(folded) == 2
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), folded(x))
        torch.testing.assert_close(folded(x), student(x), rtol=1e-4, atol=1e-4)
