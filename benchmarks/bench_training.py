"""One extraction step per generator: alone with the loss written out in torch, alone, and stacked.

    OMP_NUM_THREADS=1 pytest benchmarks/bench_training.py --benchmark-enable

LeNet5, batch 256, the paper's objective with its diversity term; one step is forward, backward and Adam.
Every variant computes the same loss, which is asserted before anything is timed.
"""

import pytest
import torch
from torch import Tensor

from kegfast.extraction import RECIPES, Decoder, FrozenTeacher, Generators, Objective
from kegfast.extraction import terms as extraction_terms
from kegfast.extraction.generators import one_hot
from kegfast.functional import diversity_loss
from kegfast.models import LeNet5

SHAPE, CLASSES, BATCH, NOISE = (1, 32, 32), 10, 256, 10


def written_out(noise: Tensor, samples: Tensor) -> Tensor:
    """The diversity loss as its formula reads: every pair's distance in memory."""
    x = samples.flatten(1)
    between_samples = (x[:, None] - x[None]).abs().mean(-1)
    between_noises = (noise[:, None] - noise[None]).square().mean(-1)
    return (-(between_samples * between_noises).mean()).exp()


def make_step(copies: int):
    torch.manual_seed(0)
    generators = Generators(copies, CLASSES, SHAPE, NOISE)
    network = generators.network.to(memory_format=torch.channels_last).train()
    decoder = Decoder(copies, SHAPE, NOISE).train()
    teacher = FrozenTeacher(LeNet5(), watch=False)
    objective = Objective(network, decoder, teacher, RECIPES["paper"].terms())
    optimizer = torch.optim.Adam([*network.parameters(), *decoder.parameters()])
    labels = one_hot(torch.randint(CLASSES, (copies, BATCH)), CLASSES)
    noise = torch.randn(copies, BATCH, NOISE)

    def step() -> Tensor:
        loss, _ = objective(labels, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.fixture(scope="module", autouse=True)
def same_loss():
    """Nothing is timed unless all variants agree."""
    noise, samples = torch.randn(BATCH, NOISE), torch.rand(BATCH, *SHAPE)
    torch.testing.assert_close(diversity_loss(noise, samples), written_out(noise, samples))


@pytest.mark.benchmark(group="extraction step, time of all copies")
@pytest.mark.parametrize(
    ("copies", "loss"),
    [(1, written_out), (1, diversity_loss), (5, diversity_loss)],
    ids=["1 written out", "1 kegfast", "5 kegfast"],
)
def test_extraction_step(benchmark, monkeypatch, copies, loss):
    monkeypatch.setattr(extraction_terms, "diversity_loss", loss)
    step = make_step(copies)
    benchmark.extra_info["copies"] = copies
    benchmark.pedantic(step, rounds=5, iterations=1, warmup_rounds=2)
    benchmark.extra_info["ms_per_generator"] = 1e3 * benchmark.stats.stats.median / copies
