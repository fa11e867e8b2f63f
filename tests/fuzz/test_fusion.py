"""Random networks: what fuse makes of them answers as they do, whatever stands in its way."""

import random

import torch
from fuzz.networks import CHANNELS, SIDE, network
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kegfast import fuse
from kegfast._util.modules import clone


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def test_a_fused_network_answers_as_the_network(seeds):
    folded = 0
    for seed in seeds(60):
        model = network(seed)
        draws = torch.Generator().manual_seed(seed)
        x, other = torch.randn(2, 3, CHANNELS, SIDE, SIDE, generator=draws, dtype=torch.float64)
        before = clone(model).state_dict()
        example = random.Random(seed).choice((None, x))
        with torch.no_grad():
            wanted, fused = model(other.clone()), fuse(model, example)
            found = fused(other.clone())
            again = model(other.clone())
        scale = max(float(wanted.abs().max()), 1e-6)
        message = f"network({seed}), example {'given' if example is not None else 'not given'}"
        off = float((found - wanted).abs().max()) / scale
        assert off < 1e-9, f"{message}: off by {off:.3g}"
        assert torch.equal(again, wanted), f"{message}: the model itself was changed"
        after = model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in after), message
        folded += norms(fused) < norms(model)
    assert folded  # else nothing was compared
