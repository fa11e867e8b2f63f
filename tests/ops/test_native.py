"""The compiled part: present, lowered, chosen against, or missing."""

import ast
import itertools
import platform
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from needs import needs_native

import kegfast


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"PATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_the_compiled_part_all_runs_and_says_so_once():
    done = run("""
        import sys
        sys.modules["kegfast._C"] = None
        import torch, kegfast
        info = kegfast.build_info()
        assert info["native"] is False and "_C" in info["why"], info
        assert info["isa_compiled"] == [] and info["isa_active"] is None, info
        layer = kegfast.nn.TuckerConv2d(4, 6, 3, (2, 3), padding=1)
        x = torch.randn(2, 4, 5, 5, requires_grad=True)
        whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.allclose(whole(x), layer(x))
        layer(x).sum().backward()
        kegfast.nn.DiversityLoss()(torch.randn(3, 2), x[:1].expand(3, -1, -1, -1)).backward()
        kegfast.functional.soft_target(torch.randn(4, 3), torch.randn(4, 3))
        try:
            kegfast.backend("native")
        except RuntimeError as error:
            assert "missing" in str(error)
        else:
            raise AssertionError
    """)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("without its compiled kernels") == 1


def test_without_something_private_of_torch_its_own_operators_run():
    done = run("""
        import torch
        x, conv = torch.randn(2, 4, 5, 5), torch.nn.Conv2d(4, 6, 3)
        del torch._C._are_functorch_transforms_active
        import kegfast
        layer = kegfast.nn.TuckerConv2d.from_conv(conv, (4, 4))
        assert torch.allclose(layer(x), layer.to_sequential()(x), atol=1e-5)
        assert kegfast.last_kernel() in ("unfused", "none")
    """)
    assert done.returncode == 0, done.stderr


@needs_native
def test_the_import_refuses_an_unknown_instruction_set_by_name():
    done = run("from kegfast import nn", KEGFAST_CPU_ISA="sse9")
    assert done.returncode == 1
    assert "KEGFAST_CPU_ISA: instruction set must be one of auto, baseline" in done.stderr
    assert "got 'sse9'" in done.stderr
    with pytest.raises(ValueError, match="instruction set must be one of"), kegfast.cpu_isa("sse9"):
        pass


@needs_native
def test_cpu_isa_lowers_and_restores():
    before = kegfast.build_info()["isa_active"]
    with kegfast.cpu_isa("baseline"):
        assert kegfast.build_info()["isa_active"] == "baseline"
    assert kegfast.build_info()["isa_active"] == before


def test_backend_is_a_context_and_a_setter():
    noises, samples = torch.randn(5, 2), torch.randn(5, 3)
    with kegfast.backend("reference"):
        reference = kegfast.functional.diversity_loss(noises, samples)
        kegfast.backend("auto")
        assert torch.allclose(kegfast.functional.diversity_loss(noises, samples), reference)
    with pytest.raises(ValueError, match="backend must be 'auto', 'native' or 'reference', got 'fast'"):
        kegfast.backend("fast")


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="needs Linux on x86-64"
)
@needs_native
def test_what_this_processor_has_is_found():
    flags = set(re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    needs = {
        "baseline": set(),
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
        "avx512_bf16": {"avx512_bf16"},
        "amx": {"amx_tile", "amx_bf16"},
    }
    info = kegfast.build_info()
    runs = list(itertools.takewhile(lambda isa: needs[isa] <= flags, info["isa_compiled"]))
    # a system may have tiles and keep them from this process
    assert info["isa_detected"] in (runs[-1], *(["avx512_bf16"] if runs[-1] == "amx" else []))


def names_of(module: object) -> set[str]:
    return {name for name in dir(module) if not name.startswith("_")}


@needs_native
def test_the_stub_names_what_is_compiled():
    stub = ast.parse((Path(kegfast.__file__).parent / "_C.pyi").read_text())
    declared = [part for part in stub.body if isinstance(part, ast.FunctionDef | ast.ClassDef)]
    assert {part.name for part in declared if not part.name.startswith("_")} == names_of(kegfast._C)
    for part in declared:
        if isinstance(part, ast.ClassDef) and not part.name.startswith("_"):
            members = {member.name for member in part.body if isinstance(member, ast.FunctionDef)}
            members |= {member.targets[0].id for member in part.body if isinstance(member, ast.Assign)}
            own = getattr(kegfast._C, part.name)
            assert members == names_of(own) - ({"name", "value"} if hasattr(own, "__members__") else set())
