"""Generators spread over two processes are those that one process trains."""

import pytest
import torch
import two_processes
from small_models import SHAPE, image_teacher

from kegfast.extraction import Generators, extract
from kegfast.extraction.generators import one_hot
from kegfast.extraction.parallel import share

ARGUMENTS = {"num_classes": 4, "sample_shape": SHAPE, "batch_size": 16, "seed": 3}


def run(copies: int, **options) -> Generators:
    return extract(image_teacher(), generators=copies, **({"steps": 6} | ARGUMENTS | options))


def worker(rank, folder):
    for copies in (3, 1):
        made = run(copies, checkpoint=folder / f"{copies}.pt")
        torch.save((made.network.state_dict(), made.history), folder / f"{copies}-{rank}.result")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    two_processes.run(worker, folder, folder)
    return folder


def outputs(generators: Generators) -> torch.Tensor:
    """In train mode, where biases before a normalization cancel: their gradients are rounding alone."""
    torch.manual_seed(0)
    labels = one_hot(torch.randint(4, (generators.copies, 32)), 4)
    with torch.no_grad():
        return generators.network.train()(labels, torch.randn(generators.copies, 32, 10))


@pytest.mark.parametrize("copies", [3, 1])  # with one generator the second process has none
def test_two_processes_equal_one(folder, copies):
    alone = run(copies)
    for rank in range(2):
        state, history = torch.load(folder / f"{copies}-{rank}.result")
        loaded = Generators(copies, 4, SHAPE)
        loaded.network.load_state_dict(state)
        torch.testing.assert_close(outputs(loaded), outputs(alone), rtol=1e-3, atol=1e-3)
        assert [entry["step"] for entry in history] == [entry["step"] for entry in alone.history]
        for name, want in alone.history[-1].items():
            assert history[-1][name] == pytest.approx(want, rel=1e-3)


def test_each_process_has_its_own_checkpoint(folder):
    assert {path.name for path in folder.glob("*.pt.*")} == {"3.pt.0", "3.pt.1", "1.pt.1"}


@pytest.mark.parametrize(("copies", "world"), [(5, 2), (2, 3), (8, 4)])
def test_shares_are_disjoint_and_complete(copies, world):
    parts = [range(copies)[share(copies, rank, world)] for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(copies))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
