"""Builds the native part by CMake and ninja. Sources and flags stand in CMakeLists.txt alone."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("KEGFAST_NATIVE", "1") != "0"
# The environment's own cmake and ninja before the system's, active or not.
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def torch_folder() -> Path | None:
    """The torch package, unimported: on the path, or in the environment that pip isolates us from."""
    found = importlib.util.find_spec("torch")
    if found is not None and found.origin:
        return Path(found.origin).parent
    beside = Path(sysconfig.get_path("platlib"), "torch")
    return beside if (beside / "include").is_dir() else None


class CMakeBuild(build_ext):
    """Configures and builds every native target straight into the package folder."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "kegfast" if in_place else Path(self.build_lib).resolve() / "kegfast"
        package.mkdir(parents=True, exist_ok=True)
        # One tree per target folder: the libraries' paths are part of what CMake remembers.
        tree = ROOT / "build" / ("cmake-editable" if in_place else "cmake-wheel")
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
        defines = [f"-D{name}={value}" for name, value in options.items()]
        cmake = shutil.which("cmake", path=PATH) or "cmake"
        subprocess.check_call([cmake, "-S", ROOT, "-B", tree, "-G", "Ninja", *defines])
        subprocess.check_call([cmake, "--build", tree])


setup(
    ext_modules=[Extension("kegfast._C", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=["torch>=2.11"] if NATIVE and torch_folder() is None else [],
)
