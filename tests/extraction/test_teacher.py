"""Teachers of every kind: what knowledge is extracted from, and what is refused by its name."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import kegfast
from kegfast.distillation import GaussianNoise
from kegfast.extraction import FrozenTeacher
from kegfast.extraction.familiar import Familiar


def classifier(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    ).eval()


def short(teacher: nn.Module, **options) -> kegfast.Generators:
    defaults = {"num_classes": 3, "sample_shape": (1, 4, 4), "generators": 1, "steps": 3, "batch_size": 8}
    return kegfast.extract(teacher, **(defaults | options))


def weights(generators: kegfast.Generators) -> list[torch.Tensor]:
    return list(generators.network.state_dict().values())


WAYS = {
    "no_grad": lambda model, x: torch.no_grad()(model)(x),
    "detach": lambda model, x: model(x).detach(),
    "numpy": lambda model, x: torch.from_numpy(model(x.detach()).detach().numpy()),
    "bare numpy": lambda model, x: model(torch.from_numpy(x.numpy())),
    "rounded": lambda model, x: model(x.round()),
    "softmax": lambda model, x: model(x).softmax(1),
    "divided": lambda model, x: model(x / x.abs().amax((1, 2, 3), keepdim=True)),
    "dict": lambda model, x: {"logits": model(x)},
    "nan": lambda model, x: model(x) / 0.0,
}


class Wrapped(nn.Module):
    """A classifier and something around it."""

    def __init__(self, way: str):
        super().__init__()
        self.model, self.way = classifier(), way

    def forward(self, x):
        return WAYS[self.way](self.model, x)


@pytest.mark.parametrize("way", ["no_grad", "detach", "numpy", "bare numpy"])
def test_a_teacher_that_passes_no_gradient_is_refused(way):
    with pytest.raises(ValueError, match=r"^teacher must be a model that passes gradients to its inputs"):
        short(Wrapped(way))
    with pytest.raises(ValueError, match=r"^teacher must be a model that passes gradients to its inputs"):
        Familiar(GaussianNoise((1, 4, 4)), Wrapped(way), 3)


def test_a_teacher_whose_gradient_is_zero_is_refused():
    with pytest.raises(ValueError, match=r"^teacher must be a model whose logits change with its samples"):
        short(Wrapped("rounded"))


def test_a_teacher_that_ends_in_softmax_is_taken_by_its_logarithm(caplog):
    with caplog.at_level(logging.WARNING):
        (found,) = short(Wrapped("softmax"), steps=1).history
    assert "teacher answers with probabilities" in caplog.text
    (plain,) = short(classifier(), steps=1).history
    assert found["classification"] == pytest.approx(plain["classification"], rel=1e-5)


def test_a_teacher_that_divides_by_its_samples_is_taken():
    short(Wrapped("divided"))


@pytest.mark.parametrize("bounds", [(0.1, 1.0), ([0.1], [1.0])])
def test_the_teacher_is_tried_with_samples_in_the_range(bounds):
    class Logarithm(Wrapped):
        def forward(self, x):
            return self.model(x.log())

    short(Logarithm("softmax"), input_range=bounds)
    with pytest.raises(
        ValueError, match=r"^teacher must be a classifier with finite logits for samples from N\(0, 1\)"
    ):
        short(Logarithm("softmax"))


@pytest.mark.parametrize(("way", "message"), [("dict", "got a dict of 'logits'"), ("nan", "finite logits")])
def test_other_answers_are_refused(way, message):
    with pytest.raises(ValueError, match=rf"^teacher must be a classifier .*{message}"):
        short(Wrapped(way))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_copy_of_a_teacher_is_float32(dtype):
    teacher = classifier().to(dtype)
    found = weights(short(teacher))
    assert {p.dtype for p in teacher.parameters()} == {dtype}
    for ours, theirs in zip(found, weights(short(copy.deepcopy(teacher).float())), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("way", ["script", "trace"])
def test_a_teacher_in_torchscript(way, caplog):
    plain = classifier()
    teacher = torch.jit.script(plain) if way == "script" else torch.jit.trace(plain, torch.randn(2, 1, 4, 4))
    with caplog.at_level(logging.WARNING):
        found = weights(short(teacher))
    assert "BatchNorm statistics of a TorchScript teacher are not looked at" in caplog.text
    assert all(p.requires_grad for p in teacher.parameters())
    recipe = kegfast.extraction.RECIPES["kegfast"].but(batch_norm=0.0)
    for ours, theirs in zip(found, weights(short(plain, recipe=recipe)), strict=True):
        assert torch.equal(ours, theirs)


def test_a_pruned_teacher_is_copied():
    teacher = classifier()
    prune.l1_unstructured(teacher[4], "weight", 0.5)
    copied = FrozenTeacher(teacher, watch=True)
    x = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(copied(x)[0], teacher(x))
