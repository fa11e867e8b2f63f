"""What a Tucker-2 convolution adds before its activation, against float64."""

import pytest
import torch
from needs import needs_native
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tucker2_cases import GEOMETRIES, TOLERANCE, assert_close, exact, make

import kegfast
from kegfast.functional import tucker_conv2d
from kegfast.nn import TuckerConv2d

LAYOUTS = [torch.contiguous_format, torch.channels_last]
NAMES = [
    "3x3", "lenet", "odd ranks", "rank 1", "rank 2", "dilated", "many small images", "several bands",
    "one pixel", "one column", "winograd, odd sizes", "tails of 1, 7 and 2", "wide features",
]  # fmt: skip
SHAPES = {name: GEOMETRIES[name] for name in NAMES} | {
    "a sum in pieces": (2, 8, 6, 5, 8, 320, 40, (3, 3), 1, 1, 1),
    "past the caches": (1, 8, 190, 190, 16, 16, 64, (3, 3), 1, 1, 1),
}


def case(name: str, dtype: torch.dtype, layout: torch.memory_format) -> tuple[list[Tensor], tuple, Tensor]:
    """As `make`, in that layout, and an addend."""
    tensors, rest = make(SHAPES[name], dtype)
    tensors[0] = tensors[0].contiguous(memory_format=layout)
    want = exact(tensors, rest)
    addend = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return tensors, rest, addend.to(dtype).contiguous(memory_format=layout)


def added(tensors: list[Tensor], rest: tuple, addend: Tensor, activation: str | None) -> Tensor:
    total = exact(tensors, rest) + addend
    return total.relu() if activation else total


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_forward(name: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    tensors, rest, addend = case(name, dtype, layout)
    before = addend.clone()
    for activation in (None, "relu"):
        y = tucker_conv2d(*tensors, *rest, activation, addend=addend)
        assert y.dtype == dtype
        assert_close(y, added(tensors, rest, addend, activation), TOLERANCE[dtype])
        unbiased = tucker_conv2d(*tensors[:4], None, *rest, activation, addend=addend)
        zero = torch.zeros_like(tensors[4])
        assert_close(unbiased, added([*tensors[:4], zero], rest, addend, activation), TOLERANCE[dtype])
    assert torch.equal(addend, before)


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_instruction_set(name: str, layout, dtype: torch.dtype, isa: str) -> None:
    compiled = kegfast.build_info()["isa_compiled"]
    if isa not in compiled or compiled.index(isa) > compiled.index(kegfast.build_info()["isa_detected"]):
        pytest.skip(f"this machine cannot run {isa}")
    tensors, rest, addend = case(name, dtype, layout)
    with kegfast.cpu_isa(isa):
        y = tucker_conv2d(*tensors, *rest, "relu", addend=addend)
    assert_close(y, added(tensors, rest, addend, "relu"), TOLERANCE[dtype])


def other_layout(addend: Tensor) -> Tensor:
    return addend.contiguous(memory_format=torch.channels_last)


def every_second(addend: Tensor) -> Tensor:
    return torch.cat([addend, addend], 3)[..., ::2]


def one_column(addend: Tensor) -> Tensor:
    return addend[:, :, :, :1]


def one_number(addend: Tensor) -> float:
    return 0.5


def double(addend: Tensor) -> Tensor:
    return addend.double()


def larger_batch(addend: Tensor) -> Tensor:
    return torch.cat([addend[:1]] * 3)


@pytest.mark.parametrize("change", [other_layout, every_second, one_column, one_number, double, larger_batch])
@pytest.mark.parametrize("module", [False, True])
def test_whatever_torch_adds(change, module: bool) -> None:
    torch.manual_seed(0)
    layer = TuckerConv2d(6, 20, 3, (4, 17), padding=1, activation="relu").eval()
    x, addend = torch.randn(1, 6, 9, 8), change(torch.randn(1, 20, 9, 8))
    weights = layer.first.weight, layer.core.weight, layer.last.weight, layer.last.bias
    with torch.no_grad():
        want = (layer.to_sequential()[:3](x) + addend).relu()
        for _ in range(3):
            y = layer(x, addend) if module else tucker_conv2d(x, *weights, 1, 1, 1, "relu", addend=addend)
            assert y.dtype == want.dtype
            torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)


def test_the_input_itself() -> None:
    torch.manual_seed(0)
    layer = TuckerConv2d(6, 6, 3, (4, 5), padding=1, activation="relu").eval()
    x = torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        want = (layer.to_sequential()[:3](x) + x).relu()
        torch.testing.assert_close(layer(x, x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wanted", [(5,), (0,), (1, 2, 3, 4), (0, 1, 2, 3, 4, 5)])
def test_gradients(wanted: tuple[int, ...]) -> None:
    tensors, rest, addend = case("3x3", torch.float32, torch.contiguous_format)
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate([*tensors, addend])]
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    tucker_conv2d(*leaves[:5], *rest, "relu", addend=addend).square().sum().backward()
    added(doubles[:5], rest, doubles[5], "relu").square().sum().backward()
    assert [t.grad is not None for t in leaves] == [i in wanted for i in range(6)]
    for i in wanted:
        got, want = leaves[i].grad, doubles[i].grad
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads(threads: int, layout: torch.memory_format) -> None:
    tensors, rest = make((2, 64, 37, 35, 48, 32, 64, (3, 3), 1, 1, 1), torch.float32)
    tensors[0] = tensors[0].contiguous(memory_format=layout)
    addend = torch.randn(2, 64, 37, 35).contiguous(memory_format=layout)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = tucker_conv2d(*tensors, *rest, "relu", addend=addend)
    finally:
        torch.set_num_threads(before)
    assert_close(y, added(tensors, rest, addend, "relu"), 5e-6)


BAD = {
    "a list": ([1.0], TypeError, "addend must be a dense tensor or a number"),
    "sparse": (torch.ones(1, 20, 9, 8).to_sparse(), TypeError, "addend must be a dense"),
    "more channels": (torch.ones(1, 21, 9, 8), ValueError, "addend must be on cpu and of a shape that adds"),
    "elsewhere": (torch.ones(1, 20, 9, 8, device="meta"), ValueError, "addend must be on cpu"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_addends(name: str, grad: bool) -> None:
    addend, error, message = BAD[name]
    layer, x = TuckerConv2d(6, 20, 3, (4, 17), padding=1), torch.randn(1, 6, 9, 8)
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        layer(x, addend)


@needs_native
def test_prepared_calls_know_their_addend() -> None:
    torch.manual_seed(0)
    layer = TuckerConv2d(6, 20, 3, (4, 17), padding=1, activation="relu").eval()
    plain = layer.to_sequential()[:3]
    x, addends = torch.randn(2, 6, 9, 8), torch.randn(3, 2, 20, 9, 8)
    given = [*addends, None, addends[1].mT.contiguous().mT, torch._neg_view(addends[1])]
    with torch.no_grad():
        for addend in given:
            for _ in range(3):
                layer(x, addends[0])
            assert layer._memory.settled.call is not None
            want = plain(x) if addend is None else plain(x) + addend
            for _ in range(3):
                torch.testing.assert_close(layer(x, addend), want.relu(), atol=1e-5, rtol=1e-5)


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_native
def test_one_operator_does_it_all() -> None:
    layer = TuckerConv2d(6, 20, 3, (4, 17), padding=1, activation="relu").eval()
    x, addend = torch.randn(2, 6, 9, 8), torch.randn(2, 20, 9, 8)
    with torch.no_grad(), Operators() as seen:
        layer(x, addend)
    assert seen.names == ["kegfast.tucker2_add.default"]
    weights = layer.first.weight, layer.core.weight, layer.last.weight, layer.last.bias
    totals = []
    for given in (addend, None):
        with FlopCounterMode(display=False) as counter:
            tucker_conv2d(x, *(w.detach() for w in weights), 1, 1, 1, "relu", addend=given)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(layout: torch.memory_format, dtype: torch.dtype) -> None:
    tensors, rest, addend = case("3x3", dtype, layout)
    ints = [n for size in rest for n in (size, size)]
    for given in (addend, other_layout(addend)):
        torch.library.opcheck(torch.ops.kegfast.tucker2_add.default, (*tensors, given, None, *ints, True))


@needs_native
@pytest.mark.parametrize("grad", [False, True])
def test_compiles_without_a_graph_break(grad: bool) -> None:
    torch.manual_seed(0)
    layer = TuckerConv2d(4, 6, 3, (3, 5), padding=1, activation="relu")
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        for batch in (2, 5):
            x, addend = torch.randn(batch, 4, 7, 6), torch.randn(batch, 6, 7, 6)
            torch.testing.assert_close(compiled(x, addend), layer(x, addend))


def test_autocast() -> None:
    torch.manual_seed(0)
    layer = TuckerConv2d(4, 6, 3, (3, 5), padding=1, activation="relu")
    x, addend = torch.randn(2, 4, 7, 6), torch.randn(2, 6, 7, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for given in (addend, addend.bfloat16()):
            want = (layer.to_sequential()[:3](x) + given).relu()
            y = layer(x, given)
            assert y.dtype == want.dtype
            torch.testing.assert_close(y, want, atol=3e-2, rtol=3e-2)
