"""Frozen networks answer what their models answer, whatever they are made of and called with."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from needs import needs_native
from torch import Tensor, nn

import kegfast
from kegfast.models import LeNet5, ResNet14
from kegfast.nn import TuckerConv2d

pytestmark = needs_native


class Branches(nn.Module):
    """Sums, products, concatenations and in-place operators among layers of many kinds."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 20, 3, 2, 1, bias=False), nn.BatchNorm2d(20), nn.SiLU())
        self.deep = nn.Conv2d(20, 20, (3, 5), 1, (1, 2), groups=20)
        self.grouped = nn.Conv2d(20, 40, 3, 1, 2, 2, groups=4)
        self.wide = TuckerConv2d(40, 32, 3, (8, 16), padding=1)
        self.side = nn.Conv2d(20, 32, 1)
        self.gate = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.hardswish(self.deep(x) + x)
        y = self.wide(F.relu(self.grouped(y), inplace=True))
        z = self.side(x)
        z += y
        gate = torch.sigmoid(self.gate(F.adaptive_avg_pool2d(z, 1)))
        z = torch.cat([z * gate, torch.tanh(y)], 1)
        z = F.avg_pool2d(F.max_pool2d(z, 3, 2, 1), 2, ceil_mode=True)
        return F.softmax(self.head(z.mean((2, 3))), dim=1)


class Unknown(nn.Module):
    """Torch's own operators between convolutions, with a value that crosses them."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.before(x))
        z = torch.cumsum(y, 2) / 10
        return F.relu(self.after(z) + y), y.amax((2, 3))


class Untraceable(nn.Module):
    """Control flow that depends on values."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


def assert_same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5 * max(1.0, want.abs().max().item()))


def assert_frozen(model: nn.Module, *inputs: Tensor) -> kegfast.Frozen:
    frozen = kegfast.freeze(model, inputs if len(inputs) > 1 else inputs[0])
    with torch.no_grad():
        want = model.eval()(*inputs)
    got = frozen(*inputs)
    for ours, theirs in zip(*([v] if isinstance(v, Tensor) else v for v in (got, want)), strict=True):
        assert_same(ours, theirs)
    return frozen


def native_parts(frozen: kegfast.Frozen) -> int:
    return sum(type(m).__name__ == "Part" for m in frozen.modules())


@pytest.mark.parametrize("isa", kegfast.build_info()["isa_compiled"])
@pytest.mark.parametrize("batch", [1, 3])
def test_known_networks_are_one_native_part(seeded, isa, batch):
    try:
        chosen = kegfast.cpu_isa(isa)
        chosen.__enter__()
    except ValueError:
        pytest.skip(f"no {isa} here")
    try:
        for model in (LeNet5(), ResNet14(), Branches()):
            channels = 3 if isinstance(model, Branches) else 1
            frozen = assert_frozen(model, torch.randn(batch, channels, 32, 32))
            assert native_parts(frozen) == 1
            assert all(step.native for step in frozen.report(torch.randn(batch, channels, 32, 32)))
    finally:
        chosen.__exit__(None, None, None)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_threads_share_images_or_bands(seeded, threads, batch):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), TuckerConv2d(32, 48, 3, (32, 32), 2, 1), nn.ReLU(),
            nn.Conv2d(48, 64, 3, padding=1), nn.Conv2d(64, 64, 1), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(64 * 14 * 14, 10),
        )  # fmt: skip
        assert_frozen(model, torch.randn(batch, 3, 56, 56))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_few_images_at_a_time_through_the_first_steps(seeded, threads):
    """Images outweigh weights, then weights images; a sum crosses the border between them."""

    class Narrowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.side = nn.Conv2d(3, 48, 3, padding=1), nn.Conv2d(48, 64, 1, 8)
            self.wide = TuckerConv2d(48, 48, 3, (16, 16), padding=1)
            self.down = nn.Conv2d(48, 64, 3, 8, 1)
            self.deep = nn.Conv2d(64, 64, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = F.relu(self.stem(x))
            y = torch.relu(self.wide(x) + x)
            return self.deep(F.relu(self.down(y))) + self.side(x), y.mean((2, 3))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = Narrowing().eval()
        frozen = assert_frozen(model, torch.randn(9, 3, 72, 72))
        x = torch.randn(16, 3, 72, 72).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            want = model(x)
        for ours, theirs in zip(frozen(x), want, strict=True):
            assert_same(ours, theirs)
    finally:
        torch.set_num_threads(before)


def test_images_of_one_channel_and_few_features(seeded):
    for features, width in ((6, 28), (8, 30), (3, 29), (9, 28)):
        model = nn.Sequential(nn.Conv2d(1, features, 5, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        assert_frozen(model, torch.randn(3, 1, 21, width))
        assert_frozen(
            nn.Sequential(nn.Conv2d(1, features, 5, 2), nn.MaxPool2d(2)), torch.randn(3, 1, 25, width + 3)
        )


def test_other_sizes_and_layouts_are_planned_anew(seeded):
    model = Branches().eval()
    frozen = kegfast.freeze(model, torch.randn(1, 3, 32, 32))
    for size in ((1, 3, 32, 32), (4, 3, 32, 32), (2, 3, 33, 47), (1, 3, 16, 90), (4, 3, 32, 32)):
        x = torch.randn(size)
        with torch.no_grad():
            want = model(x)
        assert_same(frozen(x), want)
        assert_same(frozen(x.contiguous(memory_format=torch.channels_last)), want)
        assert_same(frozen(torch.randn(*size[:3], size[3] + 3)[..., 1:-2].copy_(x)), want)
    assert frozen(torch.randn(0, 3, 32, 32)).shape == (0, 5)


def test_what_is_unknown_runs_in_torch_between_native_parts(seeded):
    x = torch.randn(2, 3, 12, 11)
    frozen = assert_frozen(Unknown(), x)
    assert native_parts(frozen) == 2
    costs = frozen.report(x)
    assert [c.native for c in costs].count(False) >= 2
    assert any("cumsum" in c.kind for c in costs)
    assert sum(c.share for c in costs) == pytest.approx(1)


def test_a_model_that_cannot_be_traced_runs_in_torch(seeded):
    x = torch.randn(2, 3, 12, 11)
    assert native_parts(assert_frozen(Untraceable(), x)) == 0


def test_what_an_in_place_operator_changes_is_changed_for_all_that_read_it(seeded):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = torch.tanh(y)
            F.relu(y, inplace=True)
            y += z
            return z * y

    assert_frozen(InPlace(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("viewed", ["slice", "flatten", "torch's"])
def test_writes_over_memory_that_a_view_reads(seeded, viewed):
    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            views = {"slice": y[:, :, ::2], "flatten": torch.flatten(y, 1), "torch's": y.movedim(1, 2)}
            view = views[viewed]
            z = F.relu(y, inplace=True)
            return torch.tanh(view), z

    model, x = Viewed(), torch.randn(2, 3, 8, 8)
    frozen = kegfast.freeze(model, x)
    again = torch.randn(3, 3, 8, 8)
    for ours, theirs in zip(frozen(again), model(again), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_several_inputs(seeded):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(6, 4), nn.Conv2d(2, 4, (3, 5))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.left(x) + self.right(y).flatten(1)

    assert_frozen(Two(), torch.randn(3, 6), torch.randn(3, 2, 3, 5))


def test_a_frozen_copy_owns_its_weights(seeded):
    model, x = LeNet5(), torch.randn(2, 1, 32, 32)
    frozen = kegfast.freeze(model, x)
    before = frozen(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(frozen(x), before)
    assert torch.equal(copy.deepcopy(frozen)(x), before)
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), before)
    assert not before.requires_grad


def test_nan_and_infinity_come_through(seeded):
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1))
    frozen = kegfast.freeze(model, torch.randn(1, 2, 8, 8))
    x = torch.randn(1, 2, 8, 8)
    x[0, 0, 3, 3] = float("nan")
    with torch.no_grad():
        assert torch.equal(frozen(x).isnan(), model(x).isnan())


def test_wrong_arguments_are_named(seeded):
    model, x = LeNet5(), torch.randn(1, 1, 32, 32)
    with pytest.raises(TypeError, match="model must be"):
        kegfast.freeze(lambda x: x, x)
    with pytest.raises(TypeError, match="example_input must be"):
        kegfast.freeze(model, None)
    with pytest.raises(ValueError, match="example_input must be float32"):
        kegfast.freeze(model.double(), x.double())
    frozen = kegfast.freeze(model.float(), x)
    with pytest.raises(TypeError, match="float32"):
        frozen(x.double())
    with pytest.raises(ValueError, match="channels must be"):
        frozen(torch.randn(1, 2, 32, 32))
    with pytest.raises(ValueError, match="size of the weight's window"):
        frozen(torch.randn(1, 1, 40, 40))
