"""Builds the CUDA kernels with g++ against the fiber emulator and calls them through ctypes."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
METRICS = ("l1", "sqeuclidean", "euclidean", "cosine")
NOISE_METRICS = ("sqeuclidean", "euclidean")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ORDERS = ("ascending", "descending")
FORMS = ("automatic", "fused", "stages", "persistent")
H200_SHARED = 227 * 1024
A100_SHARED = 163 * 1024
PANEL = 64 << 20  # bytes of each matrix over pairs


def compile_emulator(folder: Path, *flags: str, program: Path | None = None) -> Path:
    """Every harness, an object each, side by side: a shared library, or a program with this main file."""
    objects = []
    sources = sorted((ROOT / "tests/emulator").glob("*.cpp")) + ([program] if program else [])
    for source in sources:
        target = folder / f"{source.stem}.o"
        command = [
            "g++",
            "-std=c++17",
            "-O2",
            "-fPIC",
            "-Wall",
            "-Wextra",
            "-Werror",
            *flags,
            "-c",
            str(source),
        ]
        command += [f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'tests/emulator'}", "-o", str(target)]
        objects.append((target, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for target, process in objects:
        _, errors = process.communicate()
        assert process.returncode == 0, f"{target.name}:\n{errors}"
    output = folder / ("program" if program else "emulator.so")
    kind = [] if program else ["-shared"]
    subprocess.check_call(["g++", *kind, *flags, *(str(target) for target, _ in objects), "-o", str(output)])
    return output


def order_number(order: str | int) -> int:
    """How blocks, warps and lanes take turns: one of ORDERS, or at random by a seed."""
    return len(ORDERS) + order if isinstance(order, int) else ORDERS.index(order)


def available() -> bool:
    return shutil.which("g++") is not None


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative to a float64 result."""
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Tucker2Call(ctypes.Structure):
    """tests/emulator/harness.h's Tucker2Call."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "first", "core", "last", "bias", "y", "t1", "t2")]
        + [(f"{name}_strides", ctypes.c_int64 * 4) for name in ("x", "y", "first", "core", "last")]
        + [(name, ctypes.c_int) for name in ("images", "channels", "height", "width", "rank_in", "rank_out")]
        + [(name, ctypes.c_int) for name in ("features", "out_height", "out_width")]
        + [("window", ctypes.c_int * 8)]
        + [(name, ctypes.c_int) for name in ("relu", "form", "dtype", "split", "multiprocessors", "order")]
        + [("shared_bytes", ctypes.c_int64)]
        + [
            (name, ctypes.c_int)
            for name in ("bulk_copies", "dry", "launches", "persistent", "tile_h", "tile_w")
        ]
        + [(name, ctypes.c_int64) for name in ("blocks", "most_shared", "workspace")]
    )


class DiversityCall(ctypes.Structure):
    """tests/emulator/harness.h's DiversityCall."""

    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("noises", "samples", "exponent", "noise_gradient", "sample_gradient")]
        + [(name, ctypes.c_int) for name in ("batch", "noise_size", "features", "metric", "noise_metric")]
        + [(name, ctypes.c_int) for name in ("dtype", "order")]
        + [(name, ctypes.c_int64) for name in ("shared_bytes", "panel_bytes")]
        + [(name, ctypes.c_int) for name in ("dry", "launches")]
        + [("workspace", ctypes.c_int64)]
    )


class SoftTargetCall(ctypes.Structure):
    """tests/emulator/harness.h's SoftTargetCall."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("student", "teacher", "loss", "gradient")]
        + [(name, ctypes.c_int64) for name in ("student_stride", "teacher_stride")]
        + [("temperature", ctypes.c_double)]
        + [(name, ctypes.c_int) for name in ("batch", "classes", "dtype", "order")]
    )


class View(NamedTuple):
    """A factor as the kernels see it: torch has no negative strides."""

    pointer: ctypes.c_void_p
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, weight: torch.Tensor) -> "View":
        return cls(pointer(weight), tuple(weight.shape), weight.stride())

    @classmethod
    def transposed(cls, weight: torch.Tensor) -> "View":
        """Rows and inputs exchanged, taps backward."""
        (rows, inputs, kh, kw), (a, b, c, d) = weight.shape, weight.stride()
        last_tap = ((kh - 1) * c + (kw - 1) * d) * weight.element_size()
        return cls(ctypes.c_void_p(weight.data_ptr() + last_tap), (inputs, rows, kh, kw), (b, a, -c, -d))


class Emulator:
    """The library's entry points on tensors."""

    def __init__(self, library: Path):
        self.path = library
        self.library = ctypes.CDLL(str(library))
        for name in ("diversity_error", "tucker2_error", "soft_target_error", "broken_error"):
            getattr(self.library, name).restype = ctypes.c_char_p

    def call(self, name: str, errors: str, *arguments: object) -> None:
        if getattr(self.library, name)(*arguments) != 0:
            raise RuntimeError(getattr(self.library, errors)().decode())

    def diversity(
        self, noises, samples, metric, noise_metric, order,
        noise_grad=True, sample_grad=True, shared=H200_SHARED, panel=PANEL,
    ):  # fmt: skip
        """Exponent, noise gradient, sample gradient; the outputs start as NaN."""
        exponent = torch.full((), float("nan"), dtype=torch.float64)
        noise_gradient = torch.full(noises.shape, float("nan")) if noise_grad else None
        sample_gradient = torch.full(samples.shape, float("nan")) if sample_grad else None
        outputs = exponent, noise_gradient, sample_gradient
        call = DiversityCall(
            *(pointer(t) for t in (noises, samples, *outputs)), *noises.shape, samples.shape[1],
            METRICS.index(metric), NOISE_METRICS.index(noise_metric), DTYPES.index(samples.dtype),
            order_number(order), shared, panel,
        )  # fmt: skip
        self.call("emulate_diversity", "diversity_error", ctypes.byref(call))
        return outputs

    def diversity_plan(
        self, batch, features, metric, noise_metric, dtype=torch.float32, noise_grad=True,
        noise_size=10, shared=H200_SHARED,
    ):  # fmt: skip
        """The call that training on these sizes would make: workspace and launches, nothing computed."""
        somewhere = ctypes.c_void_p(256)  # never read
        call = DiversityCall(
            *[somewhere] * 3, somewhere if noise_grad else None, somewhere, batch, noise_size, features,
            METRICS.index(metric), NOISE_METRICS.index(noise_metric), DTYPES.index(dtype), 0,
            shared, PANEL, True,
        )  # fmt: skip
        self.call("emulate_diversity", "diversity_error", ctypes.byref(call))
        return call

    def tucker2(
        self, x, first, core, last, bias, stride, padding, dilation, relu, order,
        form="fused", split=True, keep=False, multiprocessors=132, shared=H200_SHARED, dry=False,
        bulk=True,
    ):  # fmt: skip
        """y, t1, t2 (None where not kept; NaN before the call) and the call; dry: only its plan."""
        first, core, last = (w if isinstance(w, View) else View.of(w) for w in (first, core, last))
        (n, _, h, w), (r2, r1, kh, kw) = x.shape, core.shape
        sizes = zip((h, w), (kh, kw), stride, padding, dilation, strict=True)
        out_h, out_w = ((s + 2 * p - d * (k - 1) - 1) // t + 1 for s, k, t, p, d in sizes)
        y = torch.empty((n, last.shape[0], out_h, out_w), dtype=x.dtype)
        t1 = t2 = None
        if x.stride(1) == 1 and h * w > 1:
            y = y.contiguous(memory_format=torch.channels_last)
        if keep:
            t1 = torch.empty((n, h + 2 * padding[0], w + 2 * padding[1], r1), dtype=x.dtype)
            t2 = torch.empty((n, out_h, out_w, r2), dtype=x.dtype)
        for output in (y, t1, t2):
            if output is not None and not dry:
                output.fill_(float("nan"))
        tensors = (x.stride(), y.stride(), first.strides, core.strides, last.strides)
        call = Tucker2Call(
            pointer(x), first.pointer, core.pointer, last.pointer, *(pointer(t) for t in (bias, y, t1, t2)),
            *((ctypes.c_int64 * 4)(*strides) for strides in tensors),
            *x.shape, r1, r2, last.shape[0], out_h, out_w,
            (ctypes.c_int * 8)(kh, kw, *stride, *padding, *dilation),
            relu, FORMS.index(form), DTYPES.index(x.dtype), split, multiprocessors, order_number(order),
            shared, bulk, dry,
        )  # fmt: skip
        self.call("emulate_tucker2", "tucker2_error", ctypes.byref(call))
        return y, t1, t2, call

    def soft_target(self, student, teacher, temperature, order, want_gradient=True):
        """Loss and gradient (or None); both start as NaN."""
        loss = torch.full((), float("nan"), dtype=student.dtype)
        gradient = None
        if want_gradient:
            gradient = torch.full(student.shape, float("nan"), dtype=student.dtype)
        call = SoftTargetCall(
            *(pointer(t) for t in (student, teacher, loss, gradient)),
            student.stride(0), teacher.stride(0), temperature, *student.shape,
            DTYPES.index(student.dtype), order_number(order),
        )  # fmt: skip
        self.call("emulate_soft_target", "soft_target_error", ctypes.byref(call))
        return loss, gradient
