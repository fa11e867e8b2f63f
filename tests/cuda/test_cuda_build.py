"""How the CUDA part is built: architectures, and what of torch its oldest version has. Needs no nvcc."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def architectures(tmp_path, names):
    """kegfast_cuda_architectures' result and what it said."""
    script = tmp_path / "list.cmake"
    script.write_text(
        f"include({ROOT}/cmake/CudaArchitectures.cmake)\n"
        f'kegfast_cuda_architectures(found "{names}")\nmessage(STATUS "found=${{found}}=")\n'
    )
    done = subprocess.run(["cmake", "-P", str(script)], capture_output=True, text=True)
    found = re.search("found=(.*)=", done.stdout)
    return found and found[1], done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize(
    ("names", "want"),
    [
        ("8.0;9.0+PTX", "80-real;90-real;90-virtual"),
        ("8.6, 12.0", "86-real;120-real"),
        ("9.0a 10.0", "90a-real;100-real"),
        ("5.0 7.5+PTX 8.0", "80-real"),
        ("7.5", ""),
        ("native", "native"),
        ("Ampere", "80-real;86-real;86-virtual"),
        ("8.6 Ampere", "86-real;80-real;86-virtual"),
        ("all", "80-real;86-real;89-real;90-real;100-real;120-real;120-virtual"),
    ],
)
def test_architectures_below_those_of_the_kernels_are_left_out_with_a_line(tmp_path, names, want):
    found, said = architectures(tmp_path, names)
    assert found == want
    for old in re.findall(r"[57]\.\d\S*", names):
        assert f"no CUDA kernels for architecture {old}" in said


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_a_wrong_list_of_architectures_is_refused(tmp_path):
    found, said = architectures(tmp_path, "Fermi")
    assert found is None
    assert "must be a list like" in said


def test_nothing_is_named_that_the_oldest_torch_has_not():
    """torch 2.11's headers know the check of a call by its other name alone; both are the same there."""
    for path in (ROOT / "csrc").rglob("*.*"):
        assert "STABLE_TORCH_ERROR_CODE_CHECK" not in path.read_text(), path
