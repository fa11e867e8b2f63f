"""Builds the CUDA kernels with g++ against the fiber emulator and calls them through ctypes."""

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
METRICS = ("l1", "sqeuclidean", "euclidean", "cosine")
NOISE_METRICS = ("sqeuclidean", "euclidean")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ORDERS = ("ascending", "descending")
H200_SHARED = 227 * 1024
A100_SHARED = 163 * 1024


def compile_emulator(folder: Path, *flags: str) -> Path:
    """One shared library of every harness; an object per file, compiled side by side."""
    objects = []
    for source in sorted((ROOT / "tests/emulator").glob("*.cpp")):
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
    library = folder / "emulator.so"
    subprocess.check_call(
        ["g++", "-shared", *flags, *(str(target) for target, _ in objects), "-o", str(library)]
    )
    return library


def available() -> bool:
    return shutil.which("g++") is not None


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Emulator:
    """The library's entry points on tensors."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        for name in ("diversity_error", "broken_error"):
            getattr(self.library, name).restype = ctypes.c_char_p

    def call(self, name: str, errors: str, *arguments: object) -> None:
        if getattr(self.library, name)(*arguments) != 0:
            raise RuntimeError(getattr(self.library, errors)().decode())

    def diversity(
        self,
        noises,
        samples,
        metric,
        noise_metric,
        order,
        noise_grad=True,
        sample_grad=True,
        shared=H200_SHARED,
    ):
        """Exponent, noise gradient, sample gradient; the outputs start as NaN."""
        exponent = torch.full((), float("nan"), dtype=torch.float64)
        noise_gradient = torch.full(noises.shape, float("nan")) if noise_grad else None
        sample_gradient = torch.full(samples.shape, float("nan")) if sample_grad else None
        self.call(
            "emulate_diversity",
            "diversity_error",
            pointer(noises),
            pointer(samples),
            pointer(exponent),
            pointer(noise_gradient),
            pointer(sample_gradient),
            *noises.shape,
            samples.shape[1],
            METRICS.index(metric),
            NOISE_METRICS.index(noise_metric),
            DTYPES.index(samples.dtype),
            ctypes.c_int64(shared),
            ORDERS.index(order),
        )
        return exponent, noise_gradient, sample_gradient


@functools.cache
def emulator(folder: Path) -> Emulator:
    return Emulator(compile_emulator(folder))
