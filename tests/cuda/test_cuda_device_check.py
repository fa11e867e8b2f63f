"""`make device-check` where there is no device: a dry run on a machine as bare as the one that has one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cuda_emulator import available

import kegfast

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "tests/cuda/device_check.py"
BARE = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    names = {names!r}.split()
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
# What kegfast or its tests use beside torch, numpy and pytest.
ABSENT = (
    "hypothesis matplotlib onnx onnxruntime openvino PIL psutil pybind11 pytest_benchmark rich safetensors "
    "scipy sklearn tensorly torchvision"
)


@pytest.mark.skipif(not kegfast.build_info()["native"], reason="needs the tree that kegfast was built in")
@pytest.mark.skipif(
    not (ROOT / "build/cmake-editable").is_dir(), reason="needs the tree of an editable build"
)
@pytest.mark.skipif(not available(), reason="the emulator needs g++")
def test_dry_run_without_network_on_a_bare_machine(device, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/sitecustomize.py").write_text(BARE.format(names=ABSENT))
    out = tmp_path / "out"
    cut = ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*cut, "true"], capture_output=True).returncode != 0:
        cut = []
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path / "bare"),
        "KEGFAST_EMULATOR": str(device.path.resolve()),
        "KEGFAST_CACHE": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9"),
    }
    command = [*cut, sys.executable, str(CHECK), "--dry-run", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    found = json.loads((out / "steps.json").read_text())
    assert [(step["step"], step["state"]) for step in found] == [
        (name, "passed") for name in ("build", "kernels", "tests", "benchmarks")
    ]
    assert " passed" in log
    cells = {path.name: json.loads(path.read_text()) for path in (out / "cuda-cells").iterdir()}
    assert len(cells) == 2
    assert sum("times" in row for row in cells.values()) == sum("error" in row for row in cells.values()) == 1
    assert len(json.loads((out / "cuda-emulated.json").read_text())["rows"]) == 2
    assert json.loads((out / "cuda_table.json").read_text())["forms"] == {}


@pytest.fixture
def check(monkeypatch):
    """The script as a module, with steps of our own."""
    monkeypatch.syspath_prepend(str(CHECK.parent))
    import device_check

    def steps(*commands, seconds=20):
        def found(out, dry):
            return [device_check.Step(f"step {i}", seconds, [c]) for i, c in enumerate(commands)]

        monkeypatch.setattr(device_check, "steps", found)
        last = device_check.Step("benchmarks", 20, [["true"]])
        monkeypatch.setattr(device_check, "benchmarks", lambda *_: last)

    return device_check, steps


def states(out):
    return [step["state"] for step in json.loads((out / "steps.json").read_text())]


def test_a_step_that_fails_or_hangs_costs_itself_alone(check, monkeypatch, tmp_path):
    script, steps = check
    hang = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '1000'])"]
    steps(["false"], hang, ["no-such-command"], ["echo", "hello"], seconds=1)
    monkeypatch.setattr(sys, "argv", ["device_check", "--out", str(tmp_path)])
    begin = time.monotonic()
    assert script.main() == 1
    assert time.monotonic() - begin < 10
    assert states(tmp_path) == [
        "failed: exit status 1", "out of time", "failed: no-such-command is not there", "passed", "passed",
    ]  # fmt: skip
    assert "hello" in (tmp_path / "log.txt").read_text()


def test_a_step_out_of_time_is_asked_to_end_what_it_started(check, monkeypatch, tmp_path):
    script, steps = check
    ask = "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit("
    ask += f"pathlib.Path({str(tmp_path / 'asked')!r}).touch())); time.sleep(1000)"
    steps([sys.executable, "-c", ask], seconds=2)
    monkeypatch.setattr(sys, "argv", ["device_check", "--out", str(tmp_path)])
    script.main()
    assert states(tmp_path)[0] == "out of time"
    assert (tmp_path / "asked").exists()


def test_the_whole_has_an_end(check, monkeypatch, tmp_path):
    script, steps = check
    steps(*[["sleep", "1000"]] * 3, seconds=1000)
    monkeypatch.setattr(script, "WHOLE", 1)
    monkeypatch.setattr(sys, "argv", ["device_check", "--out", str(tmp_path)])
    begin = time.monotonic()
    script.main()
    assert time.monotonic() - begin < 10
    assert states(tmp_path)[:3] == ["out of time"] * 3


def test_the_device_is_asked_for_what_it_is_worth(check, monkeypatch, tmp_path):
    """What the steps on a device are, and that they end in time."""
    import device_check

    monkeypatch.undo()
    found = device_check.steps(tmp_path, dry=False)
    assert [step.name for step in found] == [
        "build",
        "kernels",
        "tests",
        "memcheck",
        "synccheck",
        "racecheck",
    ]
    configure = found[0].commands[0]
    assert "-DFORCE_CUDA=1" in configure
    assert f"-DTORCH_CUDA_ARCH_LIST={device_check.architecture()}" in configure
    assert all("kns=kegfast" in step.commands[0] for step in found[3:])
    assert device_check.WHOLE < 9 * 60


def test_a_dry_run_of_a_new_tree_compiles_no_cuda(check, tmp_path):
    script, _ = check
    tree = tmp_path / "tree"
    assert "-DFORCE_CUDA=0" in script.build(tree, dry=True)[0]
    tree.mkdir()
    (tree / "CMakeCache.txt").touch()
    assert not any(
        "FORCE_CUDA" in option for option in script.build(tree, dry=True)[0]
    )  # what is there stays
    assert "-DFORCE_CUDA=1" in script.build(tree, dry=False)[0]
