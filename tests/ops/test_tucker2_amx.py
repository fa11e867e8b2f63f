"""The AMX path of the bfloat16 kernels against float64, its tile registers emulated."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tucker2_cases import exact, make, relative_error

import kegfast

ROOT = Path(__file__).parents[2]
FLAGS = [
    f"-m{name}"
    for name in ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16")
]

pytestmark = pytest.mark.skipif(
    kegfast.build_info().get("isa_detected") not in ("avx512_bf16", "amx") or shutil.which("g++") is None,
    reason="needs g++ and a CPU with AVX-512-bf16",
)

#  N, C, H, W, R1, R2, K, kernel, stride, padding, dilation: registers whole and in part, along every axis
GEOMETRIES = {
    "whole registers": (2, 32, 32, 32, 32, 32, 32, (3, 3), 1, 1, 1),
    "one register": (1, 32, 4, 16, 16, 16, 16, (1, 1), 1, 0, 1),
    "three registers of pixels": (1, 64, 5, 50, 32, 48, 48, (3, 3), 1, 1, 1),
    "pixels left over": (2, 48, 9, 39, 32, 64, 40, (3, 3), 1, 1, 1),
    "words left over": (1, 24, 6, 33, 20, 28, 34, (3, 3), 1, 1, 1),
    "odd everything": (2, 33, 7, 35, 17, 19, 35, (3, 3), 1, 1, 1),
    "strided": (1, 32, 37, 37, 32, 32, 64, (3, 3), 2, 1, 1),
    "dilated": (1, 20, 20, 40, 18, 24, 32, (3, 3), 1, 2, 2),
    "five by five": (1, 16, 20, 36, 24, 17, 33, (5, 5), 1, 0, 1),
    "fewer pixels than a register": (3, 32, 7, 7, 32, 32, 32, (3, 3), 1, 1, 1),
    "low rank": (1, 32, 20, 34, 4, 8, 32, (3, 3), 1, 1, 1),
}
NAMES = "images channels height width rank_in rank_out features kernel_h kernel_w"
NAMES += " stride padding dilation channels_last relu"


class Call(ctypes.Structure):
    """tests/amx/harness.cpp's Call."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "first", "core", "last", "bias", "addend", "y")]
    _fields_ += [(name, ctypes.c_int64) for name in NAMES.split()]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("amx") / "amx.so"
    source = ROOT / "tests/amx/harness.cpp"
    command = ["g++", "-std=gnu++20", "-O1", "-shared", "-fPIC", "-w", "-fno-strict-aliasing", *FLAGS]
    subprocess.check_call([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)])
    return ctypes.CDLL(str(target))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_emulated_registers(emulator: ctypes.CDLL, name: str, channels_last: bool, relu: bool) -> None:
    tensors, rest = make(GEOMETRIES[name], torch.bfloat16)
    want = exact(tensors, rest, "relu" if relu else None)
    x, first, core, last, bias = tensors
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, bias = x.contiguous(memory_format=layout), bias.float()
    y = torch.full(want.shape, float("nan"), dtype=torch.bfloat16).contiguous(memory_format=layout)
    sizes = [*x.shape, core.shape[1], core.shape[0], last.shape[0], *core.shape[2:]]

    def run(addend: torch.Tensor | None) -> None:
        pointers = [t if t is None else t.data_ptr() for t in (x, first, core, last, bias, addend, y)]
        emulator.amx_forward(ctypes.byref(Call(*pointers, *sizes, *rest, channels_last, relu)))

    run(None)
    assert relative_error(y, want) < 8e-3
    plain = kegfast.functional.tucker_conv2d(*tensors, *rest, "relu" if relu else None)
    assert relative_error(y, plain.double()) < 8e-3
    assert (y.double() - want).abs().max() < 5e-2 * want.abs().max()
    addend = torch.randn(want.shape).bfloat16().contiguous(memory_format=layout)
    run(addend)
    want = exact(tensors, rest) + addend
    assert relative_error(y, want.relu() if relu else want) < 8e-3
