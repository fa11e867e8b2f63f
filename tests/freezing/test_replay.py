"""Networks on a GPU as CUDA graphs: what is recorded when, and that answers last; by a stand-in."""

import copy

import pytest
import torch
from fake_cuda import FakeCuda
from torch import nn

import kegfast
from kegfast._util.cuda_graph import WARM_UP
from kegfast.freezing import replay
from kegfast.freezing.replay import Replayed


class Noted(nn.Module):
    """Notes the sizes that it is called with; answers a tuple and counts in place, as a replay would."""

    def __init__(self):
        super().__init__()
        self.sizes = []
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, y):
        self.sizes.append(len(x))
        return x + y, {"product": x * y * self.weight}


@pytest.fixture
def fake(monkeypatch):
    stand_in = FakeCuda()
    monkeypatch.setattr(torch, "cuda", stand_in)
    return stand_in


@torch.no_grad()
def test_each_size_is_recorded_once(fake):
    network = Noted()
    replayed = Replayed(network)
    for n in (2, 3, 2, 3, 2, 3, 2, 3, 2):
        replayed(torch.ones(n), torch.ones(n))
    assert fake.log.count("graph") == 2
    assert network.sizes == [2, 3] * WARM_UP + [2, 3]  # the last of each is the recording


@torch.no_grad()
def test_an_answer_is_not_overwritten_by_the_next_call(fake):
    replayed = Replayed(Noted())
    x = torch.ones(2)
    for _ in range(WARM_UP + 1):
        first, named = replayed(x, x)
    again, _ = replayed(x, x)
    assert first.data_ptr() != again.data_ptr()
    assert torch.equal(first, torch.full((2,), 2.0))
    assert torch.equal(named["product"], x)


@torch.no_grad()
def test_no_more_graphs_are_kept_than_some(fake, monkeypatch):
    monkeypatch.setattr(replay, "MOST_GRAPHS", 2)
    replayed = Replayed(Noted())
    for n in (1, 2, 3, 4):
        replayed(torch.ones(n), torch.ones(n))
    assert len(replayed._graphs) == 2
    assert not copy.deepcopy(replayed)._graphs


def test_inputs_that_are_elsewhere_are_refused():
    with pytest.raises(
        ValueError, match=r"example_input must be float32 tensors on the CPU, or all on one GPU"
    ):
        kegfast.freeze(nn.Linear(3, 2), torch.ones(1, 3, dtype=torch.float64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_network_on_a_gpu_answers_as_the_model(dtype):
    model = kegfast.models.LeNet5().eval().cuda().to(dtype)
    x = torch.randn(4, 1, 32, 32, device="cuda", dtype=dtype)
    frozen = kegfast.freeze(model, x)
    for _ in range(WARM_UP + 3):
        x = torch.randn_like(x)
        torch.testing.assert_close(frozen(x), model(x), rtol=3e-2, atol=3e-2)
