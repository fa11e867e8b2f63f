"""fuse on models that cannot be traced: nothing is folded, as no example shows every way through them."""

import logging

import pytest
import torch
from folding import X, norms
from torch import nn
from unfoldable import Skipping, Standardized, Untraceable, block, hooked, masked

from kegfast import fuse


class TwoSequentials(nn.Module):
    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(3, 8, 3)
        self.a, self.b = block(conv), block(conv)

    def forward(self, x):
        return (self.a if float(x.sum()) > 0 else self.b)(x)


class Part(Untraceable):
    def __init__(self):
        super().__init__(*block())

    def forward(self, x):
        return self.body(x) if float(x.sum()) > 1e9 else self.body[0](x)


class AnotherWay(Part):
    """The example takes the whole body; other inputs do not."""

    def forward(self, x):
        return self.body(x) if float(x.sum()) == float(X.sum()) else self.body[0](x)


class Both(Part):
    def forward(self, x):
        return self.body(x) + (1 if float(x.sum()) > 0 else 2) * self.body[0](x)


class ReadsToo(Part):
    def forward(self, x):
        return self.body(x) * (
            self.body[0].weight.sum() if float(x.sum()) > 1e9 else self.body[0].weight.mean()
        )


UNTRACEABLE = {
    "two Sequentials": TwoSequentials,
    "in part": Part,
    "in part for other inputs": AnotherWay,
    "plain": lambda: Untraceable(*block()),
    "in part and whole": Both,
    "weight read": ReadsToo,
    "standardized": lambda: Untraceable(*block(Standardized(3, 8, 3))),
    "pruned": lambda: Untraceable(*masked()),
    "hook": lambda: Untraceable(*hooked("0.0")()[0]),
    "skipping norm": lambda: Untraceable(*block(norm=Skipping(8))),
}


@torch.no_grad()
@pytest.mark.parametrize("example", [None, X, -X - 1])
@pytest.mark.parametrize("case", UNTRACEABLE)
def test_what_cannot_be_traced_stays_right(case, example, caplog):
    torch.manual_seed(0)
    model = UNTRACEABLE[case]().eval()
    caplog.set_level(logging.INFO, "kegfast")
    folded = fuse(model, example)
    for x in (X, -X - 1, X + 1):
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert norms(folded) == norms(model)
    assert "cannot be traced: nothing is folded" in caplog.text


@torch.no_grad()
def test_what_answers_otherwise_when_folded_is_left_with_a_warning(caplog):
    class Sly(nn.Module):
        """torch.fx sees another network than the one that runs."""

        def __init__(self):
            super().__init__()
            self.body = block()

        def forward(self, x):
            return self.body(x) if isinstance(x, torch.Tensor) else self.body[1](self.body[0](x)) * 2

    model = Sly().eval()
    folded = fuse(model, X)
    assert torch.equal(folded(X), model(X))
    assert norms(folded) == 1
    assert "answered otherwise (output  by" in caplog.text
    assert isinstance(folded, Sly)


@torch.no_grad()
def test_wrappers_are_taken_off_and_examples_may_be_given_by_keyword():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = block()

        def forward(self, *, pixels, scale):
            return {"scaled": self.body(pixels) * scale}

    model = Keywords().eval()
    inputs = {"pixels": X, "scale": torch.ones(2, 8, 1, 1)}
    folded = fuse(nn.DataParallel(model), inputs)
    assert norms(folded) == 0
    torch.testing.assert_close(folded(**inputs), model(**inputs), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="example_input must be what the model takes"):
        fuse(model, (X,))
    with pytest.raises(TypeError, match="example_input must be a tensor"):
        fuse(model, 5)
