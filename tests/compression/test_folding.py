"""Folding BatchNorm and ReLU leaves the outputs as they were."""

import copy

import pytest
import torch
from folding import X, additions, norms, pooled, relus
from odd import odd, randomise_norms
from torch import nn

import kegfast
from kegfast import compress, fuse, load, save
from kegfast.compression import unfuse
from kegfast.models import ResNet14
from kegfast.nn import TuckerConv2d


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
    assert all(layer.activation == "relu" for layer in fused)
    assert relus(folded) == 1  # after the stem
    assert additions(folded) == 6
    assert all(layer.activation is None for layer in student.modules() if isinstance(layer, TuckerConv2d))


def test_a_norm_of_something_else_than_the_layers_features_stays():
    """BatchNorm1d normalizes the second dimension, which behind a Linear may be a sequence's."""
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


class Pooled(nn.Module):
    """ReLUs before max pooling, by module and by function; the last is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu = nn.Conv2d(3, 3, 3), nn.ReLU(inplace=True)
        self.pool, self.where = nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, return_indices=True)

    def forward(self, x):
        x = self.pool(self.relu(self.a(x)))
        x = nn.functional.max_pool2d(torch.relu(x - 0.1), 2, stride=1)
        y = torch.relu(x - 0.2)
        y = y + self.where(torch.relu(y - 0.1))[1].sum()
        y = y + nn.functional.max_pool2d(torch.relu(y - 0.1), 2, return_indices=True)[1].sum()
        return nn.functional.max_pool2d(y, 2, return_indices=False) + y.sum()


def test_a_relu_moves_behind_a_max_pooling():
    torch.manual_seed(0)
    model = Pooled().eval()
    folded, x = fuse(model), X.clone()
    assert torch.equal(folded(x), model(X))
    assert torch.equal(x, X)
    pool = next(node for node in folded.graph.nodes if node.name == "max_pool2d")
    assert [user.target for user in pool.users] == [nn.functional.relu]
    assert [node.args[-1] for node in pooled(folded)] == ["relu"]
    x[0, 0, 5, 5] = torch.nan
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0, equal_nan=True)


class Stem(nn.Module):
    """Convolution, norm and `between` before a pooling, then one more convolution."""

    def __init__(self, between=nn.ReLU, pool=None, **options) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, **{"stride": 2, "bias": False} | options), nn.BatchNorm2d(6)
        self.between, self.pool = between(), pool or nn.MaxPool2d(3, 2, 1)
        self.head = nn.Conv2d(6, 8, 3, padding=1)

    def forward(self, x):
        return self.head(self.pool(self.between(self.norm(self.conv(x)))))


def stem(*arguments, **options):
    """One with statistics of its own."""
    torch.manual_seed(0)
    model = Stem(*arguments, **options)
    randomise_norms(model)
    return model.eval()


POOLS = {
    "module": nn.MaxPool2d(3, 2, 1),
    "window": nn.MaxPool2d(2),
    "function": lambda x: nn.functional.max_pool2d(x, (2, 3), padding=1),
    "torch's": lambda x: torch.max_pool2d(x, 2, [1, 2]),
}


@torch.no_grad()
@pytest.mark.parametrize("between", [nn.ReLU, nn.Identity])
@pytest.mark.parametrize("pool", POOLS)
def test_a_stem_becomes_one_operator(pool, between):
    model = stem(between, POOLS[pool])
    folded = fuse(model)
    assert len(pooled(folded)) == 1
    assert norms(folded) == relus(folded) == 0
    assert not any(node.target in ("conv", "pool") for node in folded.graph.nodes)
    assert folded.state_dict().keys() - {"conv.bias"} <= model.state_dict().keys()
    for again in (folded, fuse(folded), copy.deepcopy(folded), unfuse(copy.deepcopy(folded))):
        torch.testing.assert_close(again(X), model(X), rtol=1e-4, atol=1e-5)
    assert not pooled(unfuse(fuse(folded)))
    exported = torch.export.export(folded, (X,))
    torch.testing.assert_close(exported.module()(X), model(X), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_folded_stem_is_saved_and_compressed(tmp_path):
    model = stem()
    folded = fuse(model)
    save(folded, tmp_path / "folded.safetensors")
    loaded = load(tmp_path / "folded.safetensors")
    assert len(pooled(loaded)) == 1
    into = load(tmp_path / "folded.safetensors", fuse(stem()))
    student, report = compress(loaded, {"conv": (2, 3), "head": (3, 4)})
    assert len(report.ranks) == 2
    whole, _ = compress(loaded, {"conv": (3, 6), "head": (6, 8)})
    for again in (loaded, into, whole):
        torch.testing.assert_close(again(X), model(X), rtol=1e-4, atol=1e-5)
    assert len(pooled(loaded)) == 1
    torch.testing.assert_close(fuse(student)(X), student(X), rtol=1e-4, atol=1e-5)


class Shared(Stem):
    """The stem's convolution runs twice."""

    def forward(self, x):
        return super().forward(x) + self.conv(x).mean()


class ReadAgain(Stem):
    """What is pooled is read again."""

    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.head(self.pool(y)) + y.mean()


@torch.no_grad()
@pytest.mark.parametrize(
    "model",
    [
        stem(groups=3),
        stem(dilation=2),
        stem(padding=1, padding_mode="reflect"),
        stem(pool=nn.MaxPool2d(2, ceil_mode=True)),
        stem(pool=nn.MaxPool2d(2, dilation=2)),
        stem(pool=nn.AvgPool2d(2)),
        stem(nn.Tanh),
        Shared().eval(),
        ReadAgain().eval(),
    ],
)
def test_other_stems_stay(model):
    folded = fuse(model)
    assert not pooled(folded)
    torch.testing.assert_close(folded(X), model(X), rtol=1e-4, atol=1e-5)


def test_values_that_others_read_are_left_alone():
    torch.manual_seed(0)
    model = Twice()
    randomise_norms(model)
    student, _ = compress(model.eval(), {"a": (2, 3), "b": (3, 3)})
    folded = fuse(student)
    assert norms(folded) == 2
    torch.testing.assert_close(folded(X), student(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("example", [None, X])
def test_two_norms_in_a_row_go_into_one_layer(example):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    randomise_norms(model)
    fused = fuse(model, example)
    torch.testing.assert_close(fused(X), model.eval()(X), rtol=1e-4, atol=1e-4)
    assert not norms(fused)


def test_a_network_that_writes_over_its_input_changes_no_example():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten())
    randomise_norms(model)
    example = X.clone()
    assert not norms(fuse(model, example))
    compress(model, 0.5, example_input=example, calibration=example, measure=False)
    kegfast.distill(copy.deepcopy(model), model, example, steps=2, batch_size=2)
    assert torch.equal(example, X)


def test_final_weights_are_promised_by_name() -> None:
    model = nn.Sequential(TuckerConv2d(3, 8, 3, (2, 3), padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    for final in (False, True):
        layer = fuse(model, final=final).get_submodule("0")
        assert layer._memory.final is final
    assert not model[0]._memory.final
    with pytest.raises(TypeError, match="final must be True or False"):
        fuse(model, final=1)
