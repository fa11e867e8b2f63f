"""Saved networks run without torch, from Python and from C, and damaged files are refused."""

import contextlib
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from needs import needs_native
from torch import Tensor, nn

import kegfast
from kegfast import runtime
from kegfast.models import LeNet5
from kegfast.nn import TuckerConv2d

pytestmark = needs_native

ROOT = Path(__file__).parents[2]


class Pair(nn.Module):
    """Two inputs, two outputs, images among them."""

    def __init__(self):
        super().__init__()
        self.conv, self.tucker = nn.Conv2d(2, 16, 3, padding=1), TuckerConv2d(16, 20, 3, (8, 8), 2, 1)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(y), torch.relu(self.tucker(torch.relu(self.conv(x))))


@pytest.fixture
def saved(seeded, tmp_path) -> tuple[Path, nn.Module]:
    model = LeNet5().eval()
    path = tmp_path / "lenet.kegplan"
    kegfast.freeze(model, torch.zeros(1, 1, 32, 32)).save(path)
    return path, model


def test_a_saved_network_answers_like_its_model(saved):
    path, model = saved
    network = runtime.load(path)
    for batch in (1, 5, 1):
        x = torch.randn(batch, 1, 32, 32)
        with torch.no_grad():
            np.testing.assert_allclose(network(x.numpy()), model(x), rtol=1e-4, atol=1e-5)
    network.threads = 2
    x = torch.randn(8, 1, 32, 32)
    with torch.no_grad():
        np.testing.assert_allclose(network(x.numpy()), model(x), rtol=1e-4, atol=1e-5)


def test_several_inputs_and_outputs_and_images_among_them(seeded, tmp_path):
    model, x, y = Pair().eval(), torch.randn(3, 2, 11, 14), torch.randn(3, 6)
    kegfast.freeze(model, (x, y)).save(tmp_path / "pair.kegplan")
    network = runtime.load(tmp_path / "pair.kegplan")
    network.threads = 2
    with torch.no_grad():
        want = model(x, y)
    for ours, theirs in zip(network(x.numpy(), y.numpy()), want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_wrong_calls_are_named(saved):
    network = runtime.load(saved[0])
    with pytest.raises(ValueError, match="channels must be"):
        network(np.zeros((1, 3, 32, 32), np.float32))
    with pytest.raises(ValueError, match=r"must be of shape \(N, C, H, W\)"):
        network(np.zeros(5, np.float32))
    with pytest.raises(ValueError, match="inputs must be 1"):
        network()
    with pytest.raises(ValueError, match="threads must be"):
        network.threads = 0
    assert network(np.zeros((0, 1, 32, 32), np.float32)).shape == (0, 10)


def test_damaged_files_are_refused(saved, tmp_path):
    path, _ = saved
    data, damaged = path.read_bytes(), tmp_path / "damaged.kegplan"

    def refused(content: bytes, why: str) -> None:
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match=why):
            runtime.load(damaged)

    refused(b"", "as long as it says")
    refused(b"PK\3\4" + data[4:], "must be a frozen network")
    refused(data[:8] + struct.pack("<I", 9) + data[12:], "version must be 1")
    for end in (11, 23, 100, len(data) // 2, len(data) - 1):
        refused(data[:end], "as long as it says|within the file")
    refused(data + b"12345678", "as long as it says")
    with pytest.raises(FileNotFoundError):
        runtime.load(tmp_path / "absent.kegplan")
    rng = np.random.default_rng(0)
    for _ in range(300):  # whatever the head says, nothing crashes
        content = bytearray(data)
        for at in rng.integers(8, 400, 3):
            content[at] = rng.integers(256)
        damaged.write_bytes(content)
        with contextlib.suppress(ValueError):
            network = runtime.load(damaged)
            network._output_shapes(network._sizes([np.zeros((1, 1, 32, 32), np.float32)] * network._inputs))


def test_networks_that_torch_runs_in_part_are_not_saved(seeded, tmp_path):
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x).cumsum(2)

    frozen = kegfast.freeze(Sums(), torch.randn(1, 2, 3, 4))
    with pytest.raises(ValueError, match="one native part"):
        frozen.save(tmp_path / "sums.kegplan")


def test_the_runtime_imports_no_torch(saved):
    code = (
        "import sys; from kegfast.runtime import load; import numpy as np;"
        f"print(load({str(saved[0])!r})(np.zeros((1, 1, 32, 32), 'f4')).shape, 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.split("\n")[0] == "(1, 10) False"


def test_a_c_program_runs_it(saved, tmp_path):
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    path, model = saved
    library = Path(runtime._LIBRARY)
    program = tmp_path / "example"
    command = [compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", "-Wno-misleading-indentation"]
    command += ["-I", str(ROOT / "csrc"), str(Path(__file__).with_name("example.c")), str(library)]
    subprocess.run([*command, f"-Wl,-rpath,{library.parent}", "-o", str(program)], check=True)
    x = torch.randn(1, 1, 32, 32)
    numbers = "\n".join(str(v) for v in x.flatten().tolist())
    said = subprocess.run([program, path], input=numbers, capture_output=True, text=True, check=True).stdout
    with torch.no_grad():
        np.testing.assert_allclose([float(v) for v in said.split()], model(x)[0], rtol=1e-4, atol=1e-5)
    missing = subprocess.run([program, tmp_path / "none"], input=numbers, capture_output=True, text=True)
    assert missing.returncode == 1
    assert "cannot read" in missing.stdout
