"""The CUDA operators' host code (checks, allocation, strides, gradients) on CPU tensors and the emulator.

The sources are compiled by g++ with another launch.h; registered for the CPU in a process of their own, they
stand where `torch.ops.kegfast`'s CUDA kernels would. Needs g++, no GPU.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = Path(importlib.util.find_spec("torch").origin).parent
SOURCES = ("diversity", "soft_target", "tucker2")

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++"),
    pytest.mark.timeout(1200),  # half a minute on a free core
]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    include = [
        folder,
        ROOT / "tests/emulator/host",
        ROOT / "csrc/cuda",
        ROOT / "csrc",
        ROOT / "tests/emulator",
    ]
    flags = ["-std=c++20", "-O1", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
    flags += [f"-I{path}" for path in include] + ["-isystem", str(TORCH / "include")]
    sources = [ROOT / "csrc/ops.cpp", ROOT / "tests/emulator/fibers.cpp"]
    for name in SOURCES:  # a copy, beside which no other launch.h lies
        text = (ROOT / f"csrc/cuda/{name}.cu").read_text()
        text = text.replace("is_cuda()", "is_cpu()").replace("(kegfast, CUDA, m)", "(kegfast, CPU, m)")
        sources.append(folder / f"{name}.cpp")
        sources[-1].write_text(text)
    objects = []
    for source in sources:
        target = folder / f"{source.stem}.o"
        command = ["g++", *flags, "-c", str(source), "-o", str(target)]
        objects.append((target, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for target, process in objects:
        _, errors = process.communicate()
        assert process.returncode == 0, f"{target.name}:\n{errors}"
    library = folder / "host.so"
    torch_library = str(TORCH / "lib/libtorch_cpu.so")
    command = ["g++", "-shared", *(str(target) for target, _ in objects), torch_library, "-o", str(library)]
    subprocess.check_call(command)
    return library


def test_host_code(library):
    program = ROOT / "tests/emulator/host/check.py"
    command = [sys.executable, str(program), str(library), str(ROOT / "kegfast/ops/reference.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all right" in done.stdout
