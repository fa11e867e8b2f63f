"""nn.TuckerConv2d and nn.TuckerLinear: drop-in behavior, prepacked weights, round trips."""

import copy
import pickle
import threading

import pytest
import torch
from needs import needs_native
from torch import nn

import kegfast
from kegfast.nn import TuckerConv2d, TuckerLinear


def layer_and_input(**kwargs) -> tuple[TuckerConv2d, torch.Tensor]:
    torch.manual_seed(0)
    return TuckerConv2d(6, 20, 3, (4, 17), padding=1, **kwargs).eval(), torch.randn(2, 6, 9, 8)


def plain(layer: TuckerConv2d, x: torch.Tensor) -> torch.Tensor:
    return layer.to_sequential()(x)


def test_state_dict_is_that_of_three_convolutions() -> None:
    layer, _ = layer_and_input()
    shapes = {name: tuple(t.shape) for name, t in layer.state_dict().items()}
    assert shapes == {
        "first.weight": (4, 6, 1, 1),
        "core.weight": (17, 4, 3, 3),
        "last.weight": (20, 17, 1, 1),
        "last.bias": (20,),
    }
    other, x = TuckerConv2d(6, 20, 3, (4, 17), padding=1), layer_and_input()[1]
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_equals_its_sequential_and_its_convolution(activation: str | None, bias: bool) -> None:
    layer, x = layer_and_input(activation=activation, bias=bias)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            y = layer(x)
            torch.testing.assert_close(y, plain(layer, x), atol=1e-5, rtol=1e-5)
            dense = layer.to_conv()(x)
            torch.testing.assert_close(y, dense.relu() if activation else dense, atol=1e-5, rtol=1e-5)


def all_layouts(layer: TuckerConv2d, x: torch.Tensor) -> None:
    """Inference in both layouts equals the plain convolutions, with whatever is cached by now."""
    with torch.no_grad():
        want = plain(layer, x)
        tolerance = 2e-2 if x.dtype == torch.bfloat16 else 1e-5
        for y in (layer(x), layer(x.contiguous(memory_format=torch.channels_last))):
            torch.testing.assert_close(y, want, atol=tolerance, rtol=tolerance)


def change_in_place(layer: TuckerConv2d) -> None:
    with torch.no_grad():
        layer.core.weight.mul_(-2)


def change_one_factor_by_an_optimizer(layer: TuckerConv2d) -> None:
    layer(torch.randn(1, 6, 5, 5)).sum().backward()
    torch.optim.SGD(layer.last.parameters(), 0.1).step()


def change_behind_torch(layer: TuckerConv2d) -> None:
    layer.first.weight.data.mul_(3)  # counts as no new version


def change_storage(layer: TuckerConv2d) -> None:
    layer.core.weight.data = layer.core.weight.data * 0.5


def change_parameter(layer: TuckerConv2d) -> None:
    layer.last.weight = nn.Parameter(layer.last.weight.detach() + 1)


def change_by_loading(layer: TuckerConv2d) -> None:
    state = {name: t * 2 for name, t in layer.state_dict().items()}
    layer.load_state_dict(state)


def change_by_assigning(layer: TuckerConv2d) -> None:
    for factor in (3.0, 0.25):  # twice: the first tensors' memory may come back for the second
        state = {name: t * factor for name, t in layer.state_dict().items()}
        layer.load_state_dict(state, assign=True)


def change_transposed(layer: TuckerConv2d) -> None:
    layer.core.weight.data = layer.core.weight.data.flip(2)


CHANGES = [
    change_in_place,
    change_one_factor_by_an_optimizer,
    change_behind_torch,
    change_storage,
    change_parameter,
    change_by_loading,
    change_by_assigning,
    change_transposed,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_packed_weights_are_never_stale(change) -> None:
    layer, x = layer_and_input()
    all_layouts(layer, x)
    before = plain(layer, x)
    change(layer)
    assert not torch.allclose(plain(layer, x), before)
    all_layouts(layer, x)


def test_packed_weights_follow_the_dtype() -> None:
    layer, x = layer_and_input()
    all_layouts(layer, x)
    all_layouts(layer.bfloat16(), x.bfloat16())
    all_layouts(layer.float(), x)
    all_layouts(layer.double(), x.double())


@needs_native
def test_packed_weights_follow_the_instruction_set() -> None:
    layer, x = layer_and_input()
    for isa in ("auto", "baseline", "auto"):
        with kegfast.cpu_isa(isa):
            all_layouts(layer, x)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_their_own(make) -> None:
    layer, x = layer_and_input(activation="relu")
    all_layouts(layer, x)
    want = layer(x)
    other = make(layer)
    change_in_place(layer)
    with torch.no_grad():
        assert torch.equal(other(x), want)
    all_layouts(layer, x)
    all_layouts(other, x)


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer, x = layer_and_input()
        all_layouts(layer, x)
        layer.core.weight.mul_(2)
        all_layouts(layer, x)


def test_parametrized_weights() -> None:
    layer, x = layer_and_input()
    all_layouts(layer, x)
    torch.nn.utils.parametrizations.weight_norm(layer.core)
    all_layouts(layer, x)
    with torch.no_grad():
        layer.core.parametrizations.weight.original0.mul_(3)
    all_layouts(layer, x)


def test_many_threads_share_a_layer() -> None:
    layer, x = layer_and_input()
    inputs = [x, x.contiguous(memory_format=torch.channels_last)]
    want = plain(layer, x).detach()
    wrong = []

    def work(own: torch.Tensor) -> None:
        with torch.no_grad():
            for _ in range(50):
                if not torch.allclose(layer(own), want, atol=1e-5):
                    wrong.append(own.stride())

    threads = [threading.Thread(target=work, args=(inputs[i % 2],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("grad", [False, True])
def test_wrong_input_is_named_in_every_mode(grad: bool) -> None:
    layer, x = layer_and_input()
    with torch.set_grad_enabled(grad):
        with pytest.raises(ValueError, match="first must be"):
            layer(x[:, :5])
        with pytest.raises(ValueError, match="x must be 4-dimensional"):
            layer(x[0, 0])
        with pytest.raises(
            TypeError, match=r"x must be of the weights' dtype, torch\.float32, got a float64"
        ):
            layer(x.double())
        with pytest.raises(TypeError, match="x must be a"):
            layer([1, 2])
        with pytest.raises(ValueError, match="x must be at least"):
            layer(x[:, :, :0])


@pytest.mark.parametrize("rank", [3, (3,), (0, 2), (2, -1), (2, 1.5)])
def test_wrong_ranks(rank) -> None:
    with pytest.raises(ValueError, match="rank must be"):
        TuckerConv2d(6, 20, 3, rank)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"in_channels": 0}, "in_channels"),
        ({"out_channels": "8"}, "out_channels"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size"),
        ({"stride": 0}, "stride"),
        ({"stride": 1.5}, "stride"),
        ({"padding": -1}, "padding"),
        ({"padding": "same"}, "padding"),
        ({"dilation": 0}, "dilation"),
    ],
)
def test_wrong_geometry(change, argument) -> None:
    arguments = {"in_channels": 6, "out_channels": 20, "kernel_size": 3, "rank": (2, 2)} | change
    with pytest.raises((ValueError, TypeError), match=f"^{argument} must be"):
        TuckerConv2d(**arguments)


@pytest.mark.parametrize("rank", [(0, 2), (-1, 2), (None, None), 4, (2, 2, 2), (1.5, 2)])
def test_wrong_ranks_of_a_linear(rank) -> None:
    with pytest.raises((ValueError, TypeError), match=r"rank must be"):
        TuckerLinear(5, 7, rank)


def test_wrong_activation() -> None:
    with pytest.raises(ValueError, match="activation must be"):
        TuckerConv2d(6, 20, 3, (2, 2), activation="gelu")


@pytest.mark.parametrize("padding", [(1, 0), "same", "valid"])
@pytest.mark.parametrize("rank", [(4, 7), 0.5, 1.0])
def test_from_conv(rank, padding) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, (3, 5), padding=padding, dilation=1).eval()
    layer = TuckerConv2d.from_conv(conv, rank)
    x = torch.randn(2, 6, 9, 8)
    assert layer(x).shape == conv(x).shape
    assert torch.equal(layer.last.bias, conv.bias)
    if rank == 1.0:
        torch.testing.assert_close(layer(x), conv(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.to_conv()(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 6, 3, groups=2),
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(6, 6, 2, padding="same"),
        nn.Linear(6, 6),
        nn.LazyConv2d(6, 3),
        nn.Conv2d(6, 6, 3, device="meta"),
    ],
    ids=["groups", "reflect", "uneven", "linear", "lazy", "meta"],
)
def test_from_conv_refuses_what_it_cannot_hold(conv) -> None:
    with pytest.raises(ValueError, match="conv must be"):
        TuckerConv2d.from_conv(conv, (2, 2))


@pytest.mark.parametrize("rank", [(3, 4), (None, 4), (3, None)])
def test_linear(rank) -> None:
    torch.manual_seed(0)
    layer = TuckerLinear(5, 7, rank)
    x = torch.randn(2, 3, 5)
    want = x
    for factor in (layer.first, layer.core, layer.last):
        if factor is not None:
            want = want @ factor.weight.T
            if factor.bias is not None:
                want = want + factor.bias
    torch.testing.assert_close(layer(x), want)
    biases = [name for name, _ in layer.named_parameters() if name.endswith("bias")]
    assert biases == ["core.bias" if rank[1] is None else "last.bias"]


@pytest.mark.parametrize("addend", [None, 0.5, (9, 7, 7), (2, 9, 7, 7), (7,)])
@pytest.mark.parametrize("grad", [False, True])
def test_one_image_without_a_batch_is_taken_as_torchs_convolutions_take_it(addend, grad):
    torch.manual_seed(0)
    layer = TuckerConv2d(6, 9, 3, (4, 5), activation="relu")
    x = torch.randn(6, 9, 9, requires_grad=grad)
    addend = torch.randn(addend) if isinstance(addend, tuple) else addend
    with torch.set_grad_enabled(grad):
        wanted = layer.last(layer.core(layer.first(x)))
        wanted = (wanted if addend is None else wanted + addend).relu()
        for _ in range(3):
            y = layer(x, addend)
            assert y.shape == wanted.shape
            torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
    if grad:
        got, want = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for out in (y, wanted))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
