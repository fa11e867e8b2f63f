"""Repeated calls of nn.TuckerConv2d skip the dispatcher; nothing may tell, and nothing may be stale."""

import copy
import itertools
import pickle
import threading

import pytest
import torch
from needs import needs_native
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tucker2_cases import settled

import kegfast
from kegfast import functional
from kegfast.dispatch import tucker2
from kegfast.nn import TuckerConv2d, tucker
from kegfast.ops import _native
from kegfast.ops._native import cpu_isa

pytestmark = needs_native


def agrees(layer: TuckerConv2d, x: torch.Tensor) -> None:
    """Several calls in a row, so that prepared ones are among them, against float64."""
    with torch.no_grad():
        want = copy.deepcopy(layer).double().to_sequential()(x.double()).float()
        for _ in range(4):
            torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)


def runs_prepared(layer: TuckerConv2d, x: torch.Tensor) -> bool:
    """Whether this call passes by the dispatcher: a mode would change that, so count the other calls."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tucker, "call_of", lambda *args: calls.append(1) or tucker2.call_of(*args))
        with torch.no_grad():
            layer(x)
    return not calls


def by_function(layer: TuckerConv2d, x: torch.Tensor) -> torch.Tensor:
    """The layer's output by `functional.tucker_conv2d`, which keeps nothing."""
    weights = layer.first.weight, layer.core.weight, layer.last.weight, layer.last.bias
    geometry = layer.core.stride, layer.core.padding, layer.core.dilation
    return functional.tucker_conv2d(x, *weights, *geometry, layer.activation)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_prepared_calls_are_exact(layout, activation, bias: bool) -> None:
    layer, _ = settled(activation=activation, bias=bias)
    x = torch.randn(3, 6, 11, 5).contiguous(memory_format=layout)
    agrees(layer, x)
    assert runs_prepared(layer, x)
    with torch.no_grad():
        y = layer(x)
        assert y.is_contiguous(memory_format=layout)
        assert not y.requires_grad
        assert torch.equal(y, by_function(layer, x))
    with torch.inference_mode():
        assert layer(x).is_inference()


@pytest.mark.skipif(
    kegfast.build_info().get("isa_active") not in ("avx512_bf16", "amx"),
    reason="this CPU multiplies no bfloat16, or is held to less",
)
@pytest.mark.parametrize("rank", [(4, 18), (3, 17)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_prepared_calls_in_bfloat16(layout, bias: bool, rank: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = TuckerConv2d(6, 20, 3, rank, padding=1, bias=bias).bfloat16().eval()
    x = torch.randn(3, 6, 11, 5).bfloat16().contiguous(memory_format=layout)
    with torch.no_grad():
        want = layer(x)
        assert torch.equal(want, by_function(layer, x))
        layer(x)
        assert runs_prepared(layer, x)
        assert torch.equal(layer(x), want)
        for tensor in (layer.core.weight, layer.last.weight, layer.last.bias):
            if tensor is not None:
                tensor.data.mul_(2)
                assert torch.equal(layer(x), by_function(layer, x))
                assert not torch.equal(layer(x), want)
                layer(x)
                want = layer(x)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("threads", [1, 2])
def test_prepared_calls_follow_instruction_set_and_threads(isa: str, threads: int) -> None:
    if isa not in kegfast.build_info()["isa_compiled"]:
        pytest.skip(f"{isa} is not compiled here")
    before = torch.get_num_threads()
    layer, x = settled()
    try:
        torch.set_num_threads(threads)
        agrees(layer, x)
        with cpu_isa(isa):
            agrees(layer, x)
            layer, x = settled()
            agrees(layer, x)
            assert runs_prepared(layer, x)
            assert kegfast.last_kernel() == f"direct {isa}"
        agrees(layer, x)
    except ValueError:
        pytest.skip(f"{isa} does not run here")
    finally:
        torch.set_num_threads(before)


def write_in_place(layer: TuckerConv2d) -> None:
    with torch.no_grad():
        layer.core.weight.mul_(-2)


def write_uncounted(layer: TuckerConv2d) -> None:
    layer.first.weight.data.mul_(3)


def new_parameter(layer: TuckerConv2d) -> None:
    layer.last.weight = nn.Parameter(torch.randn_like(layer.last.weight))


def new_data(layer: TuckerConv2d) -> None:
    layer.core.weight.data = torch.randn_like(layer.core.weight)


def view_of_fewer_outputs(layer: TuckerConv2d) -> None:
    """The same address and version, but less of it."""
    layer.last.weight.data = layer.last.weight.data[:7]
    layer.last.bias.data = layer.last.bias.data[:7]


def view_with_other_strides(layer: TuckerConv2d) -> None:
    """The same address, version and shape: taps change places."""
    layer.core.weight.data = layer.core.weight.data.mT


def view_that_repeats_a_bias(layer: TuckerConv2d) -> None:
    layer.last.bias.data = layer.last.bias.data[:1].expand(20)


def swapped_parameters(layer: TuckerConv2d) -> None:
    """The same objects around other tensors, as `Module.to` may do it."""
    torch.utils.swap_tensors(layer.core.weight, nn.Parameter(torch.randn_like(layer.core.weight)))


def new_bias(layer: TuckerConv2d) -> None:
    layer.last.bias = nn.Parameter(torch.randn_like(layer.last.bias))


def write_bias(layer: TuckerConv2d) -> None:
    layer.last.bias.data.add_(1)


def no_bias(layer: TuckerConv2d) -> None:
    layer.last.bias = None


def activate(layer: TuckerConv2d) -> None:
    layer.activation = "relu"


def stride(layer: TuckerConv2d) -> None:
    layer.core.stride = (2, 1)


def pad(layer: TuckerConv2d) -> None:
    layer.core.padding = (0, 2)


def dilate(layer: TuckerConv2d) -> None:
    layer.core.dilation = (1, 2)


CHANGES = [
    write_in_place, write_uncounted, new_parameter, new_data, view_of_fewer_outputs, view_with_other_strides,
    view_that_repeats_a_bias, swapped_parameters, new_bias, write_bias, no_bias, activate, stride,
    pad, dilate,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_prepared_calls_are_never_stale(change) -> None:
    layer, x = settled()
    change(layer)
    with torch.no_grad():
        want = layer.to_sequential()(x)
    torch.testing.assert_close(layer(x).detach(), want, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 6, 9, 8).double(),
        torch.randn(2, 6, 9, 8).bfloat16(),
        torch.randn(2, 6, 9, 16)[..., ::2],
        torch.randn(2, 6, 8, 9).mT,
        torch.randn(1, 6, 9, 8).expand(2, 6, 9, 8),
        torch._neg_view(torch.randn(2, 6, 9, 8)),
        torch.randn(2, 6, 9, 8, dtype=torch.complex64).conj().imag,
        torch.randn(0, 6, 9, 8),
    ],
    ids=["double", "bfloat16", "sliced", "transposed", "expanded", "negated", "imaginary", "empty"],
)
def test_other_inputs_of_the_same_shape(x: torch.Tensor) -> None:
    layer, _ = settled()
    layer = layer.to(x.dtype)
    with torch.no_grad():
        want = layer.to_sequential()(x)
        tolerance = 3e-2 if x.dtype == torch.bfloat16 else 1e-5
        for _ in range(3):
            torch.testing.assert_close(layer(x), want, atol=tolerance, rtol=tolerance)


def test_profilers_counters_and_tracers_see_the_operator() -> None:
    layer, x = settled()
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() > 0
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            layer(x)
        assert any("kegfast::tucker2" in event.key for event in profile.key_averages())
        traced = torch.jit.trace(layer, x)
        other = torch.randn_like(x)
        torch.testing.assert_close(traced(other), layer(other))


def test_reference_backend_and_autocast_are_obeyed() -> None:
    layer, x = settled()
    with torch.no_grad(), kegfast.backend("reference"):
        layer(x)
        assert kegfast.last_kernel() == "unfused"
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_gradients_flow_after_prepared_calls() -> None:
    layer, x = settled()
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.core.weight.grad is not None


@pytest.mark.parametrize("make", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_prepare_anew(make) -> None:
    layer, x = settled()
    other = make(layer)
    assert other._memory.settled.call is None
    with torch.no_grad():
        layer.core.weight.zero_()
    agrees(other, x)
    agrees(layer, x)


def test_threads_share_a_prepared_layer() -> None:
    layer, x = settled()
    with torch.no_grad():
        want = layer(x)
    wrong = []

    def work() -> None:
        with torch.no_grad():
            for i in range(200):
                z = x if i % 3 else x[:1]
                if not torch.allclose(layer(z), want[: len(z)], atol=1e-5):
                    wrong.append(i)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_calls_that_cannot_be_repeated_are_not_prepared(monkeypatch) -> None:
    layer = TuckerConv2d(6, 20, 3, (4, 17), padding=1).half().eval()
    x = torch.randn(2, 6, 9, 8).half()
    prepared = []
    monkeypatch.setattr(_native._C, "settle_tucker2", lambda **call: prepared.append(call))
    with torch.no_grad():
        for _ in range(4):
            layer(x)
        assert not prepared
        for _ in range(2):
            layer.float()(x.float())
    assert prepared


@pytest.mark.parametrize("size", [9, 96])
def test_outputs_belong_to_their_caller_alone(size: int) -> None:
    """Of malloc's memory and of kept memory: both come back when the caller lets go."""
    layer, _ = settled()
    x = torch.randn(2, 6, size, size)
    agrees(layer, x)
    assert runs_prepared(layer, x)
    with torch.no_grad():
        assert layer(x)._use_count() == 1
        assert len({layer(x).data_ptr() for _ in range(20)}) <= 2


def test_packed_factors_share_pages_but_no_bytes() -> None:
    """Layers come and go; those that live keep factors of their own, side by side in pages of 2 MB."""
    torch.manual_seed(0)
    x = torch.randn(1, 128, 7, 7)
    layers, want = [], []

    def add(count: int) -> None:
        for _ in range(count):
            layers.append(TuckerConv2d(128, 128, 3, (48, 64), padding=1).eval())
            want.append(layers[-1](x))

    with torch.no_grad():
        add(12)
        for _ in range(3):
            del layers[1::2], want[1::2]
            add(6)
            assert all(torch.equal(layer(x), y) for layer, y in zip(layers, want, strict=True))
            packed = sorted(
                (p.data_ptr(), p.nbytes)
                for layer in layers
                for _, p, _ in filter(None, layer._memory.packed._entries)
            )
            assert len(packed) == len(layers)
            assert all(at + size <= after for (at, size), (after, _) in itertools.pairwise(packed))
            assert all(at % 64 == 0 for at, _ in packed)
    assert len({at >> 21 for at, _ in packed}) < len(packed)


def test_outputs_that_live_do_not_share_memory() -> None:
    """Large outputs come from memory that is kept between calls, but only when it is free."""
    torch.manual_seed(0)
    layer = TuckerConv2d(8, 64, 3, (4, 8), padding=1).eval()
    inputs = [torch.randn(2, 8, 64, 64) for _ in range(4)]
    with torch.no_grad():
        for _ in range(3):
            outputs = [layer(x) for x in inputs]
            for x, y in zip(inputs, outputs, strict=True):
                torch.testing.assert_close(y, layer.to_sequential()(x), atol=1e-5, rtol=1e-5)
            views = [y[:, 3] for y in outputs]
            want = [view.clone() for view in views]
            del outputs
            layer(inputs[0])
            assert all(torch.equal(view, w) for view, w in zip(views, want, strict=True))
