"""Builds the native part by CMake and ninja. Sources and flags stand in CMakeLists.txt alone.

KEGFAST_NATIVE=1 insists on it, =0 leaves it out. Otherwise it is tried, and where no compiler or CMake
works the pure package is installed: the last line of the build, `kegfast info` and a warning say so.
"""

import atexit
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("KEGFAST_NATIVE", "")
if NATIVE not in ("", "0", "1"):
    sys.exit(f"KEGFAST_NATIVE must be 0, 1 or empty, got {NATIVE!r}")
INSISTS = NATIVE == "1" or os.environ.get("FORCE_CUDA") == "1"
# The environment's own cmake and ninja before the system's, active or not.
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def torch_folder() -> Path | None:
    """The torch package, unimported: on the path, or in the environment that pip isolates us from."""
    found = importlib.util.find_spec("torch")
    if found is not None and found.origin:
        return Path(found.origin).parent
    beside = Path(sysconfig.get_path("platlib"), "torch")
    return beside if (beside / "include").is_dir() else None


class BuildFailure(Exception):
    """What went wrong in a few words, and all that was printed."""

    def __init__(self, log: str):
        block = re.search(r"^CMake Error[^\n]*\n((?:(?: [^\n]*)?\n)+)", log, re.MULTILINE)
        line = re.search(r"^.*\berror: .*$", log, re.MULTILINE)
        text = block[1] if block else line[0] if line else log[-200:]
        super().__init__(" ".join(text.split()).split(". ")[0].rstrip("."))
        self.log = log


def run(*command: str | Path) -> None:
    """Runs a command and passes its output on; raises BuildFailure with it."""
    log = []
    try:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        raise BuildFailure(f"error: {command[0]} cannot be run: {error.strerror}") from error
    with process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            log.append(line)
    if process.returncode:
        raise BuildFailure("".join(log))


class CMakeBuild(build_ext):
    """Configures and builds every native target straight into the package folder."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "kegfast" if in_place else Path(self.build_lib).resolve() / "kegfast"
        package.mkdir(parents=True, exist_ok=True)
        absent = package / "_absent.txt"  # read by kegfast/ops/_native.py
        absent.unlink(missing_ok=True)
        # One tree per target folder: the libraries' paths are part of what CMake remembers.
        name = "editable" if in_place else f"wheel-{sys.implementation.cache_tag}"
        tree = ROOT / "build" / f"cmake-{name}"
        configured = False
        try:
            cmake = self.configure(tree, package)
            configured = True
            jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
            run(cmake, "--build", tree, *jobs)
        except BuildFailure as failure:
            # Who builds in place works on the sources: that they do not compile is no reason to go on.
            message, log = str(failure), kept(failure.log)
            if INSISTS or (in_place and configured):
                raise CompileError(f"kegfast's compiled kernels: {message}. Log: {log}") from None
            absent.write_text(f"not compiled when it was installed: {message}")
            self.distribution.ext_modules = []
            if wheel := self.distribution.get_command_obj("bdist_wheel", create=False):
                wheel.root_is_pure = True
            atexit.register(
                print,
                f"kegfast is installed WITHOUT its compiled kernels: {message}. Log: {log}. "
                "KEGFAST_NATIVE=1 makes this an error, KEGFAST_NATIVE=0 skips the attempt.",
                file=sys.stderr,
            )

    def configure(self, tree: Path, package: Path) -> str:
        """Lets CMake write the tree; returns the cmake that did."""
        cache = tree / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT.as_posix()}\n" not in cache.read_text():
            shutil.rmtree(tree)  # the sources were moved, or the last configuration was interrupted
        options = {
            # Named each time: the tree may remember a ninja of an isolated build that is gone.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja", path=PATH) or "ninja",
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": package,
            "Python_EXECUTABLE": sys.executable,
            "KEGFAST_TORCH_DIR": torch_folder() or "",
            "FORCE_CUDA": os.environ.get("FORCE_CUDA", ""),
            "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
        }
        cmake = shutil.which("cmake", path=PATH) or "cmake"
        run(cmake, "-S", ROOT, "-B", tree, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items()))
        return cmake


def kept(log: str) -> str:
    """The path of a file with the log, where no build folder is removed."""
    with tempfile.NamedTemporaryFile("w", prefix="kegfast-build-", suffix=".log", delete=False) as file:
        file.write(log)
    return file.name


class Wheel(bdist_wheel):
    """A wheel of this build alone."""

    def run(self) -> None:
        build = self.get_finalized_command("build")
        shutil.rmtree(build.build_lib, ignore_errors=True)  # else what an earlier build left rides along
        super().run()


setup(
    ext_modules=[Extension("kegfast._C", sources=[])] if NATIVE != "0" else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    setup_requires=["torch>=2.11"] if NATIVE != "0" and torch_folder() is None else [],
)
