"""Students that other code wrote, in its names, load into kegfast's layers."""

import pytest
import torch
from torch import nn

from kegfast.compression import compress, from_state_dict
from kegfast.compression.interop import LAYOUTS
from kegfast.models import LeNet5
from kegfast.nn import TuckerConv2d

X = torch.linspace(-1, 1, 2 * 32 * 32).reshape(2, 1, 32, 32)


def renamed(state, names):
    ours = LAYOUTS["three convolutions"]
    for our, their in zip(ours, names, strict=True):
        state = {key.replace(f".{our}.", f".{their}."): value for key, value in state.items()}
    return state


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    torch.manual_seed(0)
    student, report = compress(LeNet5().eval(), {"conv2": (3, 4), "conv3": (7, 11)})
    loaded = from_state_dict(LeNet5(), renamed(student.state_dict(), LAYOUTS[layout])).eval()
    assert isinstance(loaded.conv3, TuckerConv2d)
    assert loaded.conv3.core.weight.shape[:2] == tuple(reversed(report["conv3"].rank))
    torch.testing.assert_close(loaded(X), student(X), rtol=0, atol=0)


def test_linear_factors_in_the_paper_form():
    torch.manual_seed(0)
    student, _ = compress(LeNet5().eval(), {"fc1": (20, 10)})
    state = renamed(student.state_dict(), LAYOUTS["KegNet"])
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
    state["conv3.core.weight"] = torch.zeros(5, 5, 5, 5)
    with pytest.raises(ValueError, match=r"factors of 'conv3'"):
        from_state_dict(LeNet5(), state)
