"""Winograd's two forms of the Tucker-2 core: where each runs, what it computes, the error it costs."""

import copy

import pytest
import torch
from needs import needs_native
from torch import Tensor
from tucker2_cases import check_gradients, exact, make

import kegfast
from kegfast.functional import tucker_conv2d
from kegfast.nn import TuckerConv2d

INFO = kegfast.build_info()
ISAS = [
    isa
    for isa in ("baseline", "avx2", "avx512")
    if INFO["native"] and INFO["isa_compiled"].index(isa) <= INFO["isa_compiled"].index(INFO["isa_detected"])
]

#  N, C, H, W, R1, R2, K, kernel, stride, padding, dilation
GEOMETRIES = {
    "odd sizes": (3, 20, 9, 11, 32, 48, 24, (3, 3), 1, 1, 1),
    "rank 16": (2, 16, 12, 13, 16, 16, 9, (3, 3), 1, 1, 1),
    "small images": (9, 16, 7, 7, 32, 32, 17, (3, 3), 1, 1, 1),
    "several bands": (1, 8, 45, 50, 48, 32, 20, (3, 3), 1, (0, 2), 1),
    "bands of one image": (2, 8, 67, 41, 64, 16, 12, (3, 3), 1, (2, 0), 1),
    "one pixel left": (40, 4, 3, 3, 16, 32, 5, (3, 3), 1, 0, 1),
    "one row": (2, 4, 1, 60, 32, 16, 5, (3, 3), 1, 1, 1),
    "wide": (2, 64, 14, 14, 128, 128, 64, (3, 3), 1, 1, 1),
    "outputs in two shares": (3, 8, 9, 10, 64, 80, 12, (3, 3), 1, 1, 1),
}


def relative_error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


def amplification(points: list[float], edge: int) -> float:
    """By how much F(edge x edge, 3x3) grows its products' rounding errors; rows of white data and filters.

    The transforms by Lagrange through `points` and infinity: A_oi = p_i^o; G_i = (1, p_i, p_i^2) / f_i;
    B_i: the coefficients of prod (x - p_j), j != i. One axis grows variances by the mean over o of
    sum_i A_oi^2 |B_i|^2 |G_i|^2 / 3, two axes deviations by as much.
    """
    p = torch.tensor(points, dtype=torch.float64)
    others = [torch.cat([p[:i], p[i + 1 :]]) for i in range(len(p))]

    def coefficients(roots: Tensor) -> Tensor:
        poly = torch.ones(1, dtype=torch.float64)
        for root in roots:
            poly = torch.cat([-root * poly, poly.new_zeros(1)]) + torch.cat([poly.new_zeros(1), poly])
        return poly

    powers = torch.arange(edge).double()[:, None]
    a = torch.cat([p**powers, (powers == edge - 1).double()], 1)  # (edge, edge + 2)
    b = torch.stack([coefficients(o).square().sum() for o in others] + [coefficients(p).square().sum()])
    g = torch.stack(
        [(1 + x**2 + x**4) / (x - o).prod() ** 2 for x, o in zip(p, others, strict=True)]
        + [torch.ones(()).double()]
    )
    return (a.square() @ (b * g) / 3).mean().item()


ROOT = 2**0.5
F2_GROWTH = amplification([0, 1, -1], 2)
F4_GROWTH = amplification([0, ROOT / 2, -ROOT / 2, ROOT, -ROOT], 4)


def test_growth_of_rounding_errors() -> None:
    lavin_and_gray = amplification([0, 1, -1, 2, -2], 4)
    growth = F2_GROWTH, F4_GROWTH, lavin_and_gray
    assert growth == pytest.approx((1.667, 5.021, 10.773), abs=1e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_f4_against_float64(name: str, channels_last: bool, isa: str) -> None:
    tensors, rest = make(GEOMETRIES[name], torch.float32, channels_last=channels_last)
    for activation in (None, "relu"):
        with kegfast.cpu_isa(isa), kegfast.tuning(winograd="f4"):
            y = tucker_conv2d(*tensors, *rest, activation)
            assert kegfast.last_kernel() == f"winograd_f4 {isa}"
        want = exact(tensors, rest, activation)
        assert y.shape == want.shape
        assert (y.double() - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())


@needs_native
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("rank", [32, 64, 128])
def test_f4_has_the_error_of_its_theory(rank: int, channels_last: bool) -> None:
    tensors, rest = make(
        (2, 32, 20, 20, rank, rank, 32, (3, 3), 1, 1, 1), torch.float32, channels_last=channels_last
    )
    want = exact(tensors, rest)
    errors = {}
    for form, kernel in ((True, "winograd "), ("f4", "winograd_f4 ")):
        with kegfast.tuning(winograd=form):
            errors[form] = relative_error(tucker_conv2d(*tensors, *rest), want)
            assert kegfast.last_kernel().startswith(kernel)
    assert errors[True] < errors["f4"] < 1.1 * F4_GROWTH / F2_GROWTH * errors[True]


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_f4_on_threads(batch: int, threads: int) -> None:
    tensors, rest = make((batch, 64, 37, 35, 48, 32, 64, (3, 3), 1, 1, 1), torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with kegfast.tuning(winograd="f4"):
            y = tucker_conv2d(*tensors, *rest)
        assert kegfast.last_kernel().startswith("winograd_f4")
    finally:
        torch.set_num_threads(before)
    assert relative_error(y, exact(tensors, rest)) < 1e-6


@needs_native
@pytest.mark.parametrize(
    "change",
    [
        {"kernel": (5, 5)}, {"kernel": (3, 1)}, {"stride": 2}, {"stride": (1, 2)}, {"dilation": 2},
        {"ranks": (16, 8)}, {"ranks": (20, 16)}, {"size": (5, 5)},
    ],
    ids=str,
)  # fmt: skip
def test_f4_falls_back_where_it_does_not_apply(change: dict) -> None:
    shape = {"kernel": (3, 3), "stride": 1, "dilation": 1, "ranks": (16, 16), "size": (12, 12)} | change
    batch = 1 if "size" in change else 2
    geometry = (
        batch,
        8,
        *shape["size"],
        *shape["ranks"],
        8,
        shape["kernel"],
        shape["stride"],
        0,
        shape["dilation"],
    )
    tensors, rest = make(geometry, torch.float32)
    with kegfast.tuning(winograd="f4"):
        y = tucker_conv2d(*tensors, *rest)
        assert kegfast.last_kernel().startswith("direct")
    assert relative_error(y, exact(tensors, rest)) < 1e-6


@needs_native
def test_f4_runs_from_as_many_pixels_as_ranks() -> None:
    tensors, rest = make((1, 8, 9, 9, 128, 96, 8, (3, 3), 1, 0, 1), torch.float32)
    with kegfast.tuning(winograd="f4"):
        tucker_conv2d(*tensors, *rest)
    assert kegfast.last_kernel().startswith("direct")
    tensors, rest = make((1, 8, 7, 7, 32, 32, 8, (3, 3), 1, 1, 1), torch.float32)
    with kegfast.tuning(winograd="f4"):
        tucker_conv2d(*tensors, *rest)
    assert kegfast.last_kernel().startswith("winograd_f4")


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_f4_of_half_types_that_are_computed_in_float32(dtype: torch.dtype) -> None:
    tensors, rest = make(GEOMETRIES["odd sizes"], dtype)
    isa = "avx2" if "avx2" in ISAS else "baseline"
    with kegfast.cpu_isa(isa), kegfast.tuning(winograd="f4"):
        y = tucker_conv2d(*tensors, *rest)
        assert kegfast.last_kernel() == f"winograd_f4 {isa}"
    assert relative_error(y, exact(tensors, rest)) < 2 * torch.finfo(dtype).eps


@needs_native
@pytest.mark.parametrize("name", ["odd sizes", "rank 16", "small images"])
def test_gradients_of_an_f4_forward_pass(name: str) -> None:
    tensors, rest = make(GEOMETRIES[name], torch.float32)
    with kegfast.tuning(winograd="f4"):
        check_gradients(tensors, rest, 2e-5)
        check_gradients(tensors, rest, 2e-5, recompute=True)


@needs_native
def test_a_layer_packs_anew_for_another_tuning() -> None:
    torch.manual_seed(0)
    layer = TuckerConv2d(24, 40, 3, (32, 16), 1, 1).eval().requires_grad_(False)
    x = torch.randn(2, 24, 18, 18)
    ways = {False: "direct ", "f4": "winograd_f4 ", True: "direct "}  # rank 16: no F(2x2)
    for _ in range(2):
        for way, kernel in ways.items():
            with kegfast.tuning(winograd=way):
                for _ in range(4):  # prepared after the second
                    y = layer(x)
                    assert kegfast.last_kernel().startswith(kernel)
                    assert relative_error(y, copy.deepcopy(layer).double()(x.double())) < 1e-6
            layer.core.weight.mul_(1.25)
            layer.first.weight.data.mul_(0.75)  # not counted by torch


STRIDED = {
    "odd sizes": (3, 20, 19, 22, 64, 80, 24, (3, 3), 2, 1, 1),
    "several bands": (1, 8, 67, 60, 64, 64, 20, (3, 3), 2, (0, 2), 1),
    "several images": (3, 16, 28, 28, 64, 128, 17, (3, 3), 2, 1, 1),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", STRIDED)
def test_stride_2_against_float64(name: str, channels_last: bool, isa: str) -> None:
    tensors, rest = make(STRIDED[name], torch.float32, channels_last=channels_last)
    want = exact(tensors, rest)
    errors = {}
    for form, kernel in ((True, "winograd"), ("f4", "winograd"), (False, "direct")):
        with kegfast.cpu_isa(isa), kegfast.tuning(winograd=form):
            errors[form] = relative_error(tucker_conv2d(*tensors, *rest), want)
            assert kegfast.last_kernel() == f"{kernel} {isa}"
    assert errors["f4"] == errors[True] < 1.3 * errors[False]


@needs_native
@pytest.mark.parametrize("change", [{"size": 14}, {"ranks": (48, 64)}, {"ranks": (64, 66)}], ids=str)
def test_stride_2_is_direct_where_winograd_gains_nothing(change: dict) -> None:
    shape = {"size": 16, "ranks": (64, 64)} | change
    geometry = (3, 8, shape["size"], shape["size"], *shape["ranks"], 8, (3, 3), 2, 1, 1)
    tensors, rest = make(geometry, torch.float32)
    y = tucker_conv2d(*tensors, *rest)
    assert kegfast.last_kernel().startswith("direct")
    assert relative_error(y, exact(tensors, rest)) < 1e-6


@needs_native
def test_f2_runs_where_it_should_and_can_be_forbidden() -> None:
    tensors, rest = make(GEOMETRIES["odd sizes"], torch.float32)
    automatic = tucker_conv2d(*tensors, *rest)
    assert kegfast.last_kernel().startswith("winograd ")
    with kegfast.tuning(winograd=False):
        direct = tucker_conv2d(*tensors, *rest)
        assert kegfast.last_kernel().startswith("direct")
    assert not torch.equal(automatic, direct)
    torch.testing.assert_close(automatic, direct, atol=1e-5, rtol=1e-5)
    tucker_conv2d(*tensors, *rest)
    assert kegfast.last_kernel().startswith("winograd ")
    tucker_conv2d(*[t.double() for t in tensors], *rest)
    assert kegfast.last_kernel() == "unfused"


@needs_native
def test_tuning_restores_what_was() -> None:
    tensors, rest = make(GEOMETRIES["odd sizes"], torch.float32)

    def ran() -> str:
        tucker_conv2d(*tensors, *rest)
        return kegfast.last_kernel().split()[0]

    with kegfast.tuning(winograd="f4"):
        with kegfast.tuning(winograd=False):
            assert ran() == "direct"
        assert ran() == "winograd_f4"
        with kegfast.tuning():
            assert ran() == "winograd"
        assert ran() == "winograd_f4"
    assert ran() == "winograd"


@pytest.mark.parametrize("value", [2, 4, 1, 0, "f2", "F4", "", None, ["f4"], 4.0])
def test_wrong_tuning(value: object) -> None:
    with pytest.raises(ValueError, match="winograd must be True, False or 'f4', got"):
        kegfast.tuning(winograd=value)


@needs_native
@pytest.mark.skipif("avx512" not in ISAS, reason="this machine cannot run avx512")
@pytest.mark.skipif(INFO["isa_active"] in ("baseline", "avx2"), reason="held to less than avx512")
def test_last_kernel_names_the_instructions_that_ran() -> None:
    tensors, rest = make(GEOMETRIES["rank 16"], torch.float32)
    for dtype in (torch.float32, torch.float16):
        tucker_conv2d(*[t.to(dtype) for t in tensors], *rest)
        assert kegfast.last_kernel() == "direct avx512"
    tucker_conv2d(*[t.bfloat16() for t in tensors], *rest)
    assert kegfast.last_kernel() == f"direct {INFO['isa_active']}"
