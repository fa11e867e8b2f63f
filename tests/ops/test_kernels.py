"""The CPU kernels without torch, for processors that only an emulator has (tests/kernels).

Tucker-2 forward and backward with Winograd, diversity, soft targets and halves, against loops in double.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ("diversity", "soft_target", "tucker2")
FLAGS = ["-std=gnu++20", "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror"]
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

needs_cross = pytest.mark.skipif(
    shutil.which(CROSS) is None or shutil.which(EMULATOR) is None, reason=f"needs {CROSS} and {EMULATOR}"
)


def kernel(folder: Path, name: str) -> Path:
    source = folder / f"{name}.neon.cpp"
    source.write_text(f'#define KEGFAST_ISA neon\n#include "{ROOT}/csrc/cpu/{name}_kernel.inl"\n')
    return source


@needs_cross
def test_neon_kernels_compute_what_loops_in_double_do(tmp_path):
    sources = [kernel(tmp_path, name) for name in KERNELS]
    sources += [ROOT / "csrc/cpu/isa.cpp", *sorted((ROOT / "tests/kernels").glob("*.cpp"))]
    program = tmp_path / "kernels"
    command = [CROSS, *FLAGS, "-O1", "-static", f"-I{ROOT}/tests/kernels", f"-I{ROOT}/csrc"]
    subprocess.check_call([*command, *map(str, sources), "-o", str(program)])
    env = {name: value for name, value in os.environ.items() if name != "KEGFAST_CPU_ISA"}  # of this machine
    done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^neon: \d{4} passed, 0 failed$", done.stdout, re.MULTILINE)


def innermost_loops(assembly: str) -> dict[str, list[list[str]]]:
    """The instructions of every loop that holds no other, by function."""
    loops: dict[str, list[list[str]]] = {}
    body: list[str] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, assembly.splitlines()):
        if function := re.match(r"(_Z\w+):", line):
            body, labels = loops.setdefault(function[1], []), {}
            lines: list[str] = []
        elif label := re.match(r"(\.L\w+):", line):
            labels = {label[1]: len(lines)} if loops else {}  # an earlier one would hold this one
        elif loops and re.match(r"[a-z]", line):
            lines.append(line)
            target = re.match(r"(?:b\.?[a-z]+|cbn?z\s+\w+,|tbn?z\s+\w+, #?\d+,)\s*(\.L\w+)$", line)
            if target and target[1] in labels:
                body.append(lines[labels[target[1]] :])
    return loops


@needs_cross
def test_no_tile_leaves_the_registers_in_its_inner_loop(tmp_path):
    """Neither accumulators nor pointers, in any of the tiles that NEON's 32 registers are counted to hold."""
    flags = re.search(r"set\(kegfast_flags_neon (-\S+)\)", (ROOT / "cmake/Isa.cmake").read_text())
    assembly = tmp_path / "tucker2.s"
    command = [CROSS, *FLAGS, "-O3", "-fPIC", flags[1], "-S", f"-I{ROOT}/csrc"]
    subprocess.check_call([*command, str(kernel(tmp_path, "tucker2")), "-o", str(assembly)])
    tiles = 0
    for function, loops in innermost_loops(assembly.read_text()).items():
        if not re.search("run_tile|run_taps|run_outer", function):
            continue
        for loop in loops:
            if any(line.startswith("fmla") for line in loop):
                tiles += 1
                assert not [line for line in loop if "[sp" in line], function
    assert tiles > 200
