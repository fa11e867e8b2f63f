"""Students that other code wrote, in its names, load into kegfast's layers."""

import pytest
import torch
from odd import randomise_norms
from torch import nn

from kegfast._util.files import read_state_dict
from kegfast.cli import options
from kegfast.compression import compress, from_state_dict
from kegfast.compression.interop import LAYOUTS
from kegfast.models import LeNet5, ResNet14
from kegfast.nn import TuckerConv2d

X = torch.linspace(-1, 1, 2 * 32 * 32).reshape(2, 1, 32, 32)


def renamed(state, names):
    ours = "first", "core", "last"
    for our, their in zip(ours, names.values(), strict=True):
        state = {key.replace(f".{our}.", f".{their}."): value for key, value in state.items()}
    return state


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    torch.manual_seed(0)
    student, report = compress(LeNet5().eval(), {"conv2": (3, 4), "conv3": (7, 11)})
    loaded = from_state_dict(LeNet5(), renamed(student.state_dict(), LAYOUTS[layout][0])).eval()
    assert isinstance(loaded.conv3, TuckerConv2d)
    assert loaded.conv3.core.weight.shape[:2] == tuple(reversed(report["conv3"].rank))
    torch.testing.assert_close(loaded(X), student(X), rtol=0, atol=0)


class TheirConv(nn.Module):
    """A decomposed convolution as the KegNet authors' modules name its parts."""

    def __init__(self, conv: nn.Conv2d, in_rank: int, out_rank: int) -> None:
        super().__init__()
        self.in_channel_layer = nn.Conv2d(conv.in_channels, in_rank, 1, bias=False)
        self.core_layer = nn.Conv2d(
            in_rank, out_rank, conv.kernel_size, conv.stride, conv.padding, bias=False
        )
        self.out_channel_layer = nn.Conv2d(out_rank, conv.out_channels, 1, bias=conv.bias is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_channel_layer(self.core_layer(self.in_channel_layer(x)))


def as_sequential(conv: nn.Conv2d, in_rank: int, out_rank: int) -> nn.Sequential:
    """The same as jacobgil's pytorch-tensor-decompositions leave it in a network."""
    return nn.Sequential(*TheirConv(conv, in_rank, out_rank).children())


@pytest.mark.parametrize("theirs", [TheirConv, as_sequential])
@pytest.mark.parametrize("wrapper", ["model_state", "state_dict", None])
def test_students_that_other_code_trained_and_saved(tmp_path, theirs, wrapper):
    """Built and saved by modules of other names: the file alone and the plain network give their outputs."""
    torch.manual_seed(0)
    student = ResNet14()
    for block, ranks in ((student.layers3[0], (8, 11)), (student.layers3[1], (15, 15))):
        block.conv1 = theirs(block.conv1, *ranks)
    student.conv1 = theirs(student.conv1, 1, 7)
    randomise_norms(student)
    state = {f"module.{name}": tensor for name, tensor in student.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "student.pth.tar")
    loaded = from_state_dict(ResNet14(), read_state_dict(tmp_path / "student.pth.tar")).eval()
    torch.testing.assert_close(loaded(X), student.eval()(X))
    assert loaded.layers3[0].conv1.core.weight.shape[:2] == (11, 8)
    assert isinstance(loaded.conv1, TuckerConv2d)
    command = options.load_model("resnet14", tmp_path / "student.pth.tar", None)
    torch.testing.assert_close(command(X), loaded(X), rtol=0, atol=0)


def test_a_network_of_sequentials_in_sequentials():
    torch.manual_seed(0)
    features = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, bias=False)]
    network = nn.Sequential(*features)
    student = nn.Sequential(features[0], features[1], as_sequential(features[2], 3, 5))
    loaded = from_state_dict(network, student.state_dict())
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(loaded(x), student(x))
    assert type(loaded[0]) is nn.Conv2d


def test_linear_factors_in_the_paper_form():
    torch.manual_seed(0)
    student, _ = compress(LeNet5().eval(), {"fc1": (20, 10)})
    state = renamed(student.state_dict(), LAYOUTS["KegNet"][0])
    torch.testing.assert_close(from_state_dict(LeNet5(), state).eval()(X), student(X), rtol=0, atol=0)


def test_the_state_dict_is_that_of_three_convolutions():
    student, _ = compress(LeNet5(), {"conv3": (7, 11)})
    layer = student.conv3
    plain = nn.Sequential()
    plain.first = nn.Conv2d(16, 7, 1, bias=False)
    plain.core = nn.Conv2d(7, 11, 5, bias=False)
    plain.last = nn.Conv2d(11, 120, 1)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(plain(x), layer(x))
    torch.testing.assert_close(layer.to_sequential()(x), layer(x))
    torch.testing.assert_close(layer.to_conv()(x), layer(x))


def test_plain_weights_and_misfits():
    model = LeNet5().eval()
    loaded = from_state_dict(LeNet5(), model.state_dict()).eval()
    torch.testing.assert_close(loaded(X), model(X))
    student, _ = compress(model, {"conv3": (7, 11)})
    state = student.state_dict()
    with pytest.raises(ValueError, match="state must fit"):
        from_state_dict(LeNet5(), {k: v for k, v in state.items() if k != "fc1.bias"})
    with pytest.raises(ValueError, match=r"finite weights, got NaN or infinity in fc1\.bias"):
        from_state_dict(LeNet5(), {**state, "fc1.bias": torch.full((84,), torch.nan)})
    with pytest.raises(TypeError, match="model must be a torch"):
        from_state_dict(LeNet5, state)
    state["conv3.core.weight"] = torch.zeros(5, 5, 5, 5)
    with pytest.raises(ValueError, match=r"factors of 'conv3'"):
        from_state_dict(LeNet5(), state)


@pytest.mark.parametrize("part", ["first", "core", "last"])
@pytest.mark.parametrize(
    "change", [lambda w: w[0, 0, 0], lambda w: w[:0], lambda w: w[None], lambda w: w.sum()]
)
def test_factors_of_another_number_of_dimensions_are_refused_in_words(part, change):
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    state = compress(model, {"0": (2, 3)})[0].state_dict()
    state[f"0.{part}.weight"] = change(state[f"0.{part}.weight"])
    with pytest.raises(ValueError, match=r"^state must be factors of '0' with weight \(8, 4, 3, 3\), got"):
        from_state_dict(model, state)
