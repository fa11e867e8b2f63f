"""Layers and losses in what users wrap models with: transforms, tracers, subclasses, the meta device."""

import io

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, vmap

import kegfast
from kegfast import functional
from kegfast.nn import TuckerConv2d


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        TuckerConv2d(3, 16, 3, (3, 8), padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        TuckerConv2d(16, 8, 3, (8, 6), stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def test_gradients_by_torch_func_are_those_of_autograd(model, x):
    weights = dict(model.named_parameters())
    model(x).square().sum().backward()
    found = grad(lambda w: functional_call(model, w, (x,)).square().sum())(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight.grad)


def test_gradients_of_each_sample(model, x):
    weights = dict(model.named_parameters())

    def loss(w, sample):
        return functional_call(model, w, (sample[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(weights, x)
    alone = grad(loss)(weights, x[2])
    for name in weights:
        torch.testing.assert_close(each[name][2], alone[name])


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: functional.diversity_loss(t, s),
        lambda s, t: functional.diversity_loss(t, s, metric="sqeuclidean"),
        functional.soft_target,
    ],
    ids=["l1", "sqeuclidean", "soft target"],
)
def test_losses_under_transforms_are_the_reference(loss):
    student, teacher = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))

    def transformed():
        stack = torch.stack([student, student + 1])
        return (
            grad(loss)(student, teacher),
            vmap(loss, (0, None))(stack, teacher),
            hessian(loss)(student, teacher),
        )

    ours = transformed()
    with kegfast.backend("reference"):
        wanted = transformed()
    for got, want in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, want)
    alone = student.clone().requires_grad_()
    loss(alone, teacher).backward()
    torch.testing.assert_close(ours[0], alone.grad)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_traced_graphs_compute_the_same_of_other_inputs(model, x, mode):
    with mode():
        for _ in range(3):  # repeated calls pass by the dispatcher
            model(x)
        other = x.flip(0) + 1
        want = model(other)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(other), want)
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(other), want)
        content = io.BytesIO()
        torch.jit.save(traced, content)
        content.seek(0)
        assert "kegfast::" not in str(torch.jit.load(content).inlined_graph)  # runs without kegfast


def test_meta_tensors_go_through(model, x):
    want = model(x).shape
    model.to("meta")
    assert model(x.to("meta")).shape == want
    with torch.no_grad():
        assert model(x.to("meta")).shape == want


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_subclasses_of_tensors_stay_what_they_are(model, x, mode):
    class Tagged(torch.Tensor):
        pass

    with mode():
        y = model[0](x.as_subclass(Tagged))
        assert type(y) is Tagged
        torch.testing.assert_close(y.as_subclass(torch.Tensor), model[0](x))
