"""fuse folds only what stays right: weights of the layer's own, read once, behind a BatchNorm that is one."""

import logging

import pytest
import torch
import torch.nn.functional as F
from folding import X, norms
from odd import randomise_norms
from torch import nn
from torch.nn.utils import parametrizations, prune
from unfoldable import (
    Doubled,
    Inside,
    ReadsNorm,
    ReadsWeight,
    Scaled,
    Skipping,
    Standardized,
    Stubborn,
    block,
    factored,
    hooked,
    masked,
    normed,
    patched,
    pruned,
    tied,
)

from kegfast import compress, fuse

STAYS = {
    "shared parameter": tied,
    "global pruning": pruned,
    "pruned": masked,
    "factored, weight_norm": factored(nn.utils.weight_norm),
    "factored, parametrized": factored(parametrizations.weight_norm),
    "factored, pruned": factored(lambda conv: prune.random_unstructured(conv, "weight", amount=0.5)),
    "weight_norm": normed(nn.utils.weight_norm),
    "parametrized": normed(parametrizations.weight_norm),
    "spectral_norm": normed(nn.utils.spectral_norm),
    "orthogonal": normed(parametrizations.orthogonal),
    "hook of the convolution": hooked("0.0"),
    "pre-hook of the convolution": hooked("0.0", pre=True),
    "hook of the norm": hooked("0.1"),
    "pre-hook of the norm": hooked("0.1", pre=True),
    "hook of the block": hooked("0"),
    "forward of a subclass": lambda: block(Doubled(3, 8, 3)),
    "standardized weights": lambda: block(Standardized(3, 8, 3)),
    "forward of its own": patched,
    "scaled norm": lambda: block(norm=Scaled(8)),
    "norm and skip": lambda: block(norm=Skipping(8)),
    "no statistics": lambda: block(norm=nn.BatchNorm2d(8, track_running_stats=False)),
    "weight read": ReadsWeight,
    "norm read": ReadsNorm,
    "inside a hooked module": Inside,
}


@torch.no_grad()
@pytest.mark.parametrize("example", [None, X])
@pytest.mark.parametrize("case", STAYS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_folding_would_change_stays(case, example, caplog):
    torch.manual_seed(0)
    model = STAYS[case]().eval()
    wanted = model(X)
    caplog.set_level(logging.INFO, "kegfast")
    folded = fuse(model, example)
    torch.testing.assert_close(folded(X), wanted, rtol=1e-4, atol=1e-5)
    assert norms(folded) == norms(model)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    if "subclass" not in case and "standardized" not in case and "block" not in case:  # no layer to torch.fx
        assert len([r for r in caplog.records if " stays: " in r.getMessage()]) == norms(model)


@torch.no_grad()
def test_a_norm_that_keeps_the_batchs_statistics_stays():
    model = block(norm=Stubborn(8)).eval()
    assert norms(fuse(model)) == 1


@torch.no_grad()
def test_the_hook_of_the_model_itself_runs():
    model = hooked("")().eval()
    torch.testing.assert_close(fuse(model)(X), model(X), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_metadata_of_a_weight_may_be_read():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = block()

        def forward(self, x):
            return self.body(x.to(self.body[0].weight.dtype))

    model = Reads().eval()
    folded = fuse(model)
    assert norms(folded) == 0
    torch.testing.assert_close(folded(X), model(X), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_that_would_overflow_stay():
    model = block().half().eval()
    model[0].weight.mul_(1e4)
    model[1].running_var.fill_(1e-5)
    assert norms(fuse(model)) == 1


def middle(width=6):
    """BatchNorm1d over the positions of a sequence, which are as many as its features."""
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU())
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("example", [None, torch.randn(2, 6, 4)])
def test_a_norm_of_positions_stays(example):
    torch.manual_seed(0)
    model, x = middle(), torch.randn(2, 6, 4)
    torch.testing.assert_close(fuse(model, example)(x), model(x))


@torch.no_grad()
def test_a_norm_of_features_is_folded_where_it_is_known_to_be_one():
    torch.manual_seed(0)
    model, x = middle(), torch.randn(5, 4)
    assert norms(fuse(model)) == 1
    flat = nn.Sequential(nn.Flatten(), nn.Dropout(), *model).eval()
    for folded in (fuse(model, x), fuse(flat), fuse(nn.Sequential(nn.Flatten(1), flat))):
        assert norms(folded) == 0
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


class Act(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: checks, torch's own code, a dropout and an activation."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        training = self.training or (self.running_mean is None and self.running_var is None)
        statistics = (self.running_mean, self.running_var) if not self.training else (None, None)
        x = F.batch_norm(x, *statistics, self.weight, self.bias, training, momentum, self.eps)
        return self.act(self.drop(x))


class Leaky(nn.BatchNorm2d):
    """As InPlaceABN."""

    def __init__(self, channels):
        super().__init__(channels)
        self.slope = nn.Parameter(torch.full((channels,), 0.3))

    def forward(self, x):
        return F.prelu(super().forward(x), self.slope)


class Named(nn.BatchNorm2d):
    """Only a name."""


class Again(nn.BatchNorm2d):
    """Nothing but BatchNorm, in its own words."""

    def forward(self, input):
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


SUBCLASSES = {
    "relu": lambda: Act(8, nn.ReLU(inplace=True)),
    "silu": lambda: Act(8, nn.SiLU(inplace=True)),
    "identity": lambda: Act(8, nn.Identity()),
    "prelu": lambda: Leaky(8),
    "named": lambda: Named(8),
    "own words": lambda: Again(8),
    "synchronized": lambda: nn.SyncBatchNorm(8),
}


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, (2, 4)])
@pytest.mark.parametrize("norm", SUBCLASSES)
def test_subclasses_that_are_batchnorm_with_something_behind_are_folded(norm, rank):
    torch.manual_seed(0)
    norm = SUBCLASSES[norm]()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 3)).eval()
    randomise_norms(model)
    norm.running_mean.normal_()
    student = compress(model, {"0": rank})[0] if rank else model
    folded = fuse(student, X)
    assert norms(folded) == 0
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in folded.modules())
    torch.testing.assert_close(folded(X), student(X), rtol=1e-4, atol=1e-5)
    if rank:
        activation = "relu" if isinstance(getattr(norm, "act", None), nn.ReLU) else None
        assert folded.get_submodule("0").activation == activation
