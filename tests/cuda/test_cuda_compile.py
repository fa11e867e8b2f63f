"""What nvcc makes of each CUDA kernel: registers, spills, shared memory, instructions. Needs no GPU."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import kegfast
from benchmarks import cuda_counts
from benchmarks.common import RESULTS

ROOT = Path(__file__).parents[2]
TORCH = Path(importlib.util.find_spec("torch").origin).parent
SOURCES = ("device", "diversity", "soft_target", "tucker2")
ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
# What a kernel may take for as many blocks a multiprocessor (65536 registers) as its design counts on:
# 4 x 256 threads -> 64, 3 x 256 -> 80, 2 x 256 or 4 x 128 -> 128, 3 x 128 -> 168, 2 x 128 -> 255.
REGISTERS = {
    "DiversityMoments": 80,
    "DiversitySort": 128,
    "Distances": 128,
    "SumSorted": 128,
    "SoftTarget.* 16, 24>": 128,
    "SoftTarget.* 8, 16>": 84,
    "Tucker2Persistent.* 16>": 168,
    "Tucker2Persistent": 255,
    r"Tucker2(Fused|Stage)<Math<float, true>, 4>": 168,
    r"Tucker2(Fused|Stage).* 4>": 128,
    "Tucker2(Fused|Stage)": 255,
    "": 64,
}
FROM_CUDA_TORCH = {"aoti_torch_get_current_cuda_stream", "aoti_torch_cuda_convolution_backward"}

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH"),
    pytest.mark.timeout(1200),  # one core and a half minute; a loaded machine takes longer
]


class Kernel(NamedTuple):
    name: str
    architecture: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int
    static_shared: int


class Compiled(NamedTuple):
    kernels: list[Kernel]
    ptx: dict[str, str]  # kernel -> text, for compute_90
    object: Path
    cubin: Path  # of sm_90, with line numbers


REPORT = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<architecture>\w+)'\n"
    r".*Function properties.*\n"
    r"\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?P<rest>.*)"
)


def demangle(symbols):
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return {s: plain_name(line) for s, line in zip(symbols, text.stdout.splitlines(), strict=True)}


def plain_name(name):
    """`void kegfast::cuda::enter<kegfast::cuda::K<...>>(K<...>::Params)` -> `K<...>`."""
    inner = name.split("enter<", 1)[1].rsplit(">(", 1)[0]
    return re.sub(r"kegfast::|cuda::|simt::", "", inner).strip()


def parse_report(text):
    found = list(REPORT.finditer(text))
    names = demangle([m["symbol"] for m in found])
    for m in found:
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        numbers = (int(m[key]) for key in ("stack", "stores", "loads", "registers"))
        yield Kernel(names[m["symbol"]], m["architecture"], *numbers, int(shared[1]) if shared else 0)


def parse_ptx(text):
    bodies = re.split(r"^\.visible \.entry |^\.weak \.entry |^\.entry ", text, flags=re.MULTILINE)[1:]
    symbols = [re.match(r"\w+", body)[0] for body in bodies]
    names = demangle(symbols)
    return {names[symbol]: body for symbol, body in zip(symbols, bodies, strict=True)}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Each source once: machine code for three architectures, one of them as PTX too."""
    results = {}
    for source in SOURCES:
        folder = tmp_path_factory.mktemp(source)
        command = [
            "nvcc",
            "-std=c++20",
            "-O3",
            "-c",
            f"-I{ROOT / 'csrc'}",
            "-isystem",
            str(TORCH / "include"),
        ]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", "-Xcompiler", "-fPIC"]
        for number in (80, 120):
            command += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        command += ["-gencode", "arch=compute_90,code=[sm_90,compute_90]"]
        command += ["-lineinfo", "-Xptxas", "-v", "--keep", "--keep-dir", str(folder)]
        command += [str(ROOT / f"csrc/cuda/{source}.cu"), "-o", str(folder / "out.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (ptx,) = folder.glob("*compute_90.ptx")
        kernels = list(parse_report(done.stdout + done.stderr))
        (cubin,) = folder.glob("*_90.cubin")
        results[source] = Compiled(kernels, parse_ptx(ptx.read_text()), folder / "out.o", cubin)
    return results


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills_and_registers_are_as_counted_on(compiled, source, architecture):
    kernels = [k for k in compiled[source].kernels if k.architecture == architecture]
    assert {k.name for k in kernels} == set(compiled[source].ptx)
    assert kernels
    for kernel in kernels:
        assert (kernel.stack, kernel.spill_stores, kernel.spill_loads) == (0, 0, 0), kernel
        limit = next(n for pattern, n in REGISTERS.items() if re.match(pattern, kernel.name))
        assert kernel.registers <= limit, kernel
        assert kernel.static_shared <= 1024, kernel  # all of it is dynamic; sm_90 keeps 1 KB for itself


def bodies(compiled, source, prefix):
    found = {name: body for name, body in compiled[source].ptx.items() if name.startswith(prefix)}
    assert found
    return found.items()


def test_tucker2_runs_on_the_tensor_cores(compiled):
    shapes = {
        "bf16": "m16n8k16.row.col.f32.bf16",
        "fp16": "m16n8k16.row.col.f32.f16",
        "float": "m16n8k8.row.col.f32.tf32",
    }
    for kernel in ("Tucker2Fused", "Tucker2Stage"):
        for name, body in bodies(compiled, "tucker2", kernel):
            shape = next(shape for dtype, shape in shapes.items() if f"Math<{dtype}" in name)
            assert f"mma.sync.aligned.{shape}" in body, name
            assert "ldmatrix.sync.aligned.m8n8.x4" in body, name
            assert "cp.async.cg.shared.global" in body, name
            assert re.search(r"st\.global\.v4", body), name


def test_tucker2_persistent_copies_boxes(compiled):
    for name, body in bodies(compiled, "tucker2", "Tucker2Persistent"):
        assert "cp.async.bulk.tensor.4d.shared::cluster.global" in body, name
        assert "cp.async.bulk.tensor.4d.global.shared::cta" in body, name
        assert "mbarrier.try_wait.parity" in body, name
        assert "mma.sync.aligned.m16n8k16" in body, name
        assert "ld.local" not in body, name


def test_threefold_tf32_multiplies_three_times(compiled):
    fused = dict(bodies(compiled, "tucker2", "Tucker2Fused<Math<float"))
    count = {name: body.count("mma.sync") for name, body in fused.items()}
    for tiles in (4, 8):
        assert (
            count[f"Tucker2Fused<Math<float, true>, {tiles}>"]
            == 3 * count[f"Tucker2Fused<Math<float, false>, {tiles}>"]
        )


def test_diversity_loads_16_bytes_and_sorts_in_registers(compiled):
    for name, body in bodies(compiled, "diversity", "DiversitySort"):
        assert re.search(r"ld\.global(\.nc)?\.v4", body), name
        assert "shfl.sync.bfly" in body, name
        assert "ld.local" not in body, name
    for name, body in bodies(compiled, "diversity", "DiversityMoments"):
        assert re.search(r"ld\.global(\.nc)?\.v4", body), name
        assert "cp.async.cg.shared.global" in body, name


def test_soft_target_moves_16_bytes_and_reduces_by_shuffles(compiled):
    for name, body in bodies(compiled, "soft_target", "SoftTarget"):
        assert re.search(r"ld\.global(\.nc)?\.v4", body), name
        assert re.search(r"st\.global\.v4", body), name
        assert "shfl.sync.bfly" in body, name
        assert "ex2.approx" in body, name
        assert "ld.local" not in body, name


def test_nothing_is_atomic(compiled):
    for source in SOURCES:
        for name, body in compiled[source].ptx.items():
            assert not re.search(r"\b(atom|red)\.", body), name


def test_every_function_of_torch_that_is_called_exists(compiled):
    exported = subprocess.check_output(
        ["nm", "-D", "--defined-only", str(TORCH / "lib/libtorch_cpu.so")], text=True
    )
    exported = {line.split()[-1].split("@")[0] for line in exported.splitlines()}
    headers = (TORCH / "include/torch/csrc/inductor/aoti_torch").rglob("*.h")
    declared = "\n".join(path.read_text() for path in headers)
    for source in SOURCES:
        undefined = subprocess.check_output(
            ["nm", "--undefined-only", str(compiled[source].object)], text=True
        )
        names = {line.split()[-1] for line in undefined.splitlines()}
        torch_names = {name for name in names if name.startswith(("aoti_torch", "torch_"))}
        assert torch_names - FROM_CUDA_TORCH <= exported
        assert all(f"{name}(" in declared for name in torch_names & FROM_CUDA_TORCH)


@pytest.mark.skipif(cuda_counts.nvdisasm() is None, reason="needs nvdisasm")
def test_the_counts_of_the_tables_are_of_the_code_as_it_is(compiled, device):
    noted = json.loads((RESULTS / "cuda_counts.json").read_text())
    if noted["compiler"] != cuda_counts.compiler():
        pytest.skip(f"counted in what {noted['compiler']} makes")
    texts = (cuda_counts.disassembled(compiled[source].cubin) for source in cuda_counts.SOURCES)
    found = cuda_counts.count(cuda_counts.Kernels(*texts), device)
    assert found == noted


LOAD = """
import sys, torch, kegfast
torch.ops.load_library(sys.argv[1])
operators = "diversity_forward soft_target_forward tucker2 tucker2_forward tucker2_backward tucker2_as"
for name in operators.split():
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kegfast::{name}", "CUDA"), name
torch.ops.kegfast.cuda_allow_tf32(False)
if not torch.cuda.is_available():
    assert "CUDA" in torch.ops.kegfast.cuda_why_not(-1)  # that there is no device, or no driver
"""


@pytest.mark.skipif(not kegfast.build_info()["native"], reason="the schemas are in kegfast's compiled part")
@pytest.mark.skipif(torch.version.cuda is not None, reason="kegfast has loaded its own")
def test_the_library_loads_and_registers_every_operator(compiled, tmp_path):
    source = tmp_path / "torch_cuda.cpp"
    source.write_text("".join(f'extern "C" void {name}() {{}}\n' for name in FROM_CUDA_TORCH))
    stand_in, library = tmp_path / "libtorch_cuda.so", tmp_path / "_cuda.so"
    subprocess.check_call(["g++", "-shared", "-fPIC", str(source), "-o", str(stand_in)])
    objects = [str(compiled[name].object) for name in SOURCES]
    command = [
        "nvcc",
        "-shared",
        *objects,
        str(TORCH / "lib/libtorch_cpu.so"),
        str(stand_in),
        "-o",
        str(library),
    ]
    subprocess.check_call(command)
    subprocess.run([sys.executable, "-c", LOAD, str(library)], check=True)
