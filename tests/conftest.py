"""Fixtures that several tests use."""

import os
from pathlib import Path

import pytest
import torch
from cuda_summary import pytest_terminal_summary  # noqa: F401  (a hook)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """No measurement of this machine's user decides what runs here, and none of ours is kept."""
    os.environ.setdefault("KEGFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and published weights beside the repository."""
    default = Path(__file__).parents[1] / "../shared"
    folder = Path(os.environ.get("KEGFAST_SHARED", default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set KEGFAST_SHARED to a folder with data/ and pretrained/")
    return folder


@pytest.fixture(scope="session")
def data_root(shared) -> Path:
    """The data sets' root."""
    return shared / "data"


@pytest.fixture
def seeded() -> None:
    """A fixed state of torch's global generator."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device(tmp_path_factory):
    """The CUDA kernels on the fiber emulator, compiled by g++ or found where KEGFAST_EMULATOR says."""
    from cuda_emulator import Emulator, compile_emulator

    built = os.environ.get("KEGFAST_EMULATOR")
    return Emulator(Path(built) if built else compile_emulator(tmp_path_factory.mktemp("emulator")))
