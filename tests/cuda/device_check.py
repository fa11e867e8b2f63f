"""All that a CUDA device is needed for, in one command: `make device-check OUT=folder`, under nine minutes.

For a bare machine without network that has torch 2.11 or later for CUDA, nvcc, cmake, ninja, numpy, pytest,
pytest-xdist and pytest-timeout, and nothing else. A step that fails or runs out of time costs itself alone;
after each one the folder holds log.txt and steps.json, in the end also cuda-cells/*.json, cuda-<device>.json
and cuda_table.json.

    step        expected   at most
    build        100 s      200 s   both libraries, on 16 cores, for the device's architecture alone
    kernels        5 s       30 s   that torch sees the device, and kegfast its kernels
    tests         60 s      150 s   tests/cuda/test_cuda.py by 6 workers
    memcheck      30 s       45 s   compute-sanitizer on one call of each of our kernels, and no other's
    synccheck     30 s       45 s
    racecheck     45 s       45 s
    benchmarks   170 s      170 s   in the order of their worth, or as long as is left of the whole
    whole        440 s      530 s

`--dry-run` does the same where there is no device: in the tree that is already built, or in a new one without
CUDA, which one core takes its time for, and on the emulator.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parents[2]
WHOLE = 530  # seconds
BUILD, DRY_BUILD = 200, 1500
KERNELS = """
import torch, kegfast
info = kegfast.build_info()
print(torch.cuda.get_device_name(), torch.version.cuda, torch.__version__, info)
assert info["cuda_kernels"], info
assert not torch.ops.kegfast.cuda_why_not(0), torch.ops.kegfast.cuda_why_not(0)
"""
KERNELS_BUILT = """
import kegfast
info = kegfast.build_info()
print(info)
assert info["native"], info
"""


class Step(NamedTuple):
    name: str
    seconds: float  # at most
    commands: list[list[str]]


def pytest_command(workers: int, *arguments: str) -> list[str]:
    """pytest without the plugins and options that a bare machine has not."""
    plugins = ["-p", "xdist", "-p", "timeout", "-n", str(workers)]
    options = ["-o", "addopts=", "--import-mode=importlib", "-q", "-x" if workers == 0 else "-ra"]
    return [sys.executable, "-m", "pytest", *plugins, *options, *arguments]


def architecture() -> str:
    """The device's own, as TORCH_CUDA_ARCH_LIST names it; an H200's where there is none."""
    ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which(ask[0]):
        done = subprocess.run(ask, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    return "9.0"


def build(tree: Path, dry: bool) -> list[list[str]]:
    options = {"CMAKE_LIBRARY_OUTPUT_DIRECTORY": ROOT / "kegfast", "Python_EXECUTABLE": sys.executable}
    if not dry:
        options |= {"FORCE_CUDA": 1, "TORCH_CUDA_ARCH_LIST": architecture(), "CMAKE_BUILD_TYPE": "Release"}
    elif not (tree / "CMakeCache.txt").exists():
        options |= {"FORCE_CUDA": 0}  # where nvcc is, it would compile for every architecture
    defines = [f"-D{name}={value}" for name, value in options.items()]
    return [
        ["cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", *defines],
        ["cmake", "--build", str(tree)],
    ]


def steps(out: Path, dry: bool) -> list[Step]:
    """All but the benchmarks, whose time is what the others leave."""
    tree = ROOT / "build" / ("cmake-editable" if dry else "cmake-device")
    found = [
        Step("build", DRY_BUILD if dry else BUILD, build(tree, dry)),
        Step("kernels", 30, [[sys.executable, "-c", KERNELS_BUILT if dry else KERNELS]]),
    ]
    if dry:
        emulated = "tests/cuda/test_cuda_emulated_soft_target.py", "-k", "test_cuda or not_finite or strided"
        return [*found, Step("tests", 150, [pytest_command(2, "tests/cuda/test_cuda.py", *emulated)])]
    found.append(Step("tests", 150, [pytest_command(6, "tests/cuda/test_cuda.py")]))
    sanitizer = ["compute-sanitizer", "--kernel-name", "kns=kegfast", "--error-exitcode", "1"]
    sanitized = pytest_command(0, "tests/cuda/test_cuda.py", "-k", "sanitized")
    for tool in ("memcheck", "synccheck", "racecheck"):
        found.append(Step(tool, 45, [[*sanitizer, "--tool", tool, *sanitized]]))
    return found


def benchmarks(out: Path, dry: bool, seconds: float) -> Step:
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_cuda",
        "--seconds",
        f"{seconds:.0f}",
        "--out",
        str(out),
    ]
    return Step("benchmarks", seconds + 15, [command + ["--emulated"] * dry])


def environment() -> dict[str, str]:
    found = dict(os.environ, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    # The environment's own cmake and ninja, as setup.py: another cmake would build the whole tree anew.
    found["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), found.get("PATH", "")])
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [found.get("PYTHONPATH"), str(ROOT)]))
    for folder in (Path(sys.executable).parent, Path("/usr/local/cuda/bin")):  # cmake and ninja; nvcc
        if folder.is_dir():
            found["PATH"] = os.pathsep.join([found.get("PATH", ""), str(folder)])
    return found


def run(step: Step, log: TextIO, seconds: float) -> dict[str, object]:
    """A step's commands one after another, killed with all that they started when their time is over."""
    begin, state = time.monotonic(), "passed"
    variables = environment()
    if step.name.endswith("check"):
        variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that every tensor has its own bounds
    for command in step.commands:
        left = begin + min(step.seconds, seconds) - time.monotonic()
        if shutil.which(command[0], path=variables["PATH"]) is None:
            state = f"failed: {command[0]} is not there"
            break
        print(f"$ {' '.join(command)}", file=log, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(max(left, 1))
        except subprocess.TimeoutExpired:
            end(process)
            state = "out of time"
            break
        if code != 0:
            state = f"failed: exit status {code}"
            break
    return {"step": step.name, "state": state, "seconds": round(time.monotonic() - begin, 1)}


def end(process: subprocess.Popen) -> None:
    """Ends all that a command started: ninja has compilers in groups of their own, and ends them if asked."""
    for how, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is found")
    parser.add_argument("--dry-run", action="store_true", help="without a device, on the emulator")
    arguments = parser.parse_args()
    out, dry = arguments.out.resolve(), arguments.dry_run
    out.mkdir(parents=True, exist_ok=True)
    last = time.monotonic() + WHOLE + dry * (DRY_BUILD - BUILD)
    results: list[dict[str, object]] = []

    def record(step: Step, log: TextIO) -> None:
        results.append(run(step, log, last - time.monotonic()))
        (out / "steps.json").write_text(json.dumps(results, indent=2) + "\n")
        line = "{seconds:6.1f} s  {step:12}{state}".format(**results[-1])
        print(line, flush=True)
        print(line, file=log, flush=True)

    with (out / "log.txt").open("w") as log:
        for step in steps(out, dry):
            record(step, log)
            if results[-1]["state"] != "passed" and step.name in ("build", "kernels"):
                break  # nothing below could run
        else:
            record(benchmarks(out, dry, max(10, min(170, last - time.monotonic() - 15))), log)
    return int(any(result["state"] != "passed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
