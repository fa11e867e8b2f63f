"""setup.py as a user meets it: without a compiler, insisting, after an earlier build, in a moved tree."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("cmake", "csrc", "kegfast", "CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py")
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the package without its sources")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the sources under a path with a space and an umlaut."""
    copy = tmp_path / "eine Köpie"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "_absent.txt")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def build(sources: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A wheel, by a compiler that fails."""
    plain = {
        name: value for name, value in os.environ.items() if name not in ("KEGFAST_NATIVE", "FORCE_CUDA")
    }
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=sources,
        env=plain | {"CXX": "/bin/false", "FORCE_CUDA": "0"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wheel(sources: Path) -> zipfile.ZipFile:
    (found,) = (sources / "dist").glob("*.whl")
    assert found.name.endswith("-py3-none-any.whl")
    return zipfile.ZipFile(found)


def test_without_compiler_the_pure_package_is_installed_and_says_so_last(sources):
    done = build(sources)
    assert done.returncode == 0, done.stdout
    last = done.stdout.splitlines()[-1]
    assert "WITHOUT its compiled kernels" in last
    assert 'compiler "/bin/false" is not able' in last
    assert "KEGFAST_NATIVE=1" in last
    log = Path(last.split("Log: ")[1].split(". KEGFAST")[0])
    assert "/bin/false" in log.read_text()
    log.unlink()
    assert b'compiler "/bin/false"' in wheel(sources).read("kegfast/_absent.txt")


def test_insisting_makes_it_an_error(sources):
    done = build(sources, KEGFAST_NATIVE="1")
    assert done.returncode != 0
    last = done.stdout.splitlines()[-1]
    assert last.startswith("error: ")
    assert 'compiler "/bin/false" is not able' in last
    Path(last.split("Log: ")[1]).unlink()


def test_native_0_tries_nothing(sources):
    done = build(sources, KEGFAST_NATIVE="0")
    assert done.returncode == 0, done.stdout
    assert "compiler" not in done.stdout
    assert "kegfast/_absent.txt" not in wheel(sources).namelist()


def test_native_must_be_a_choice(sources):
    done = build(sources, KEGFAST_NATIVE="yes")
    assert done.returncode != 0
    assert done.stdout == "KEGFAST_NATIVE must be 0, 1 or empty, got 'yes'\n"


def test_nothing_of_an_earlier_build_rides_along_and_a_moved_tree_is_configured_anew(sources):
    library = sources / "build" / "lib"
    for left in (library, library.with_name(f"lib.linux-x86_64-{sys.implementation.cache_tag}")):
        (left / "kegfast").mkdir(parents=True)
        (left / "kegfast" / "_cuda.so").touch()
    tree = sources / "build" / f"cmake-wheel-{sys.implementation.cache_tag}"
    tree.mkdir()
    (tree / "CMakeCache.txt").write_text("CMAKE_HOME_DIRECTORY:INTERNAL=/elsewhere\n")
    done = build(sources)
    assert done.returncode == 0, done.stdout
    last = done.stdout.splitlines()[-1]
    assert 'compiler "/bin/false"' in last, "and not CMake's word on another source folder"
    Path(last.split("Log: ")[1].split(". KEGFAST")[0]).unlink()
    assert not [name for name in wheel(sources).namelist() if name.endswith(".so")]
