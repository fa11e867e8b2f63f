"""Every term against arithmetic done by hand or by another route."""

import math

import pytest
import torch
from torch import nn

from kegfast.extraction import (
    Batch,
    BatchNormStatistics,
    Classification,
    Diversity,
    Reconstruction,
    TotalVariation,
)
from kegfast.extraction.moments import channel_moments
from kegfast.functional import diversity_loss


def batch(**parts) -> Batch:
    torch.manual_seed(0)
    defaults = {
        "labels": torch.eye(3).repeat(2, 2, 1)[:, :5],
        "noise": torch.randn(2, 5, 4),
        "samples": torch.randn(2, 5, 1, 6, 7),
        "logits": torch.randn(2, 5, 3),
        "decode": lambda samples: samples.flatten(2)[..., :4],
    }
    return Batch(**(defaults | parts))


def test_classification():
    labels = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    logits = torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0]]])
    want = (math.log(4 / 3) + math.log(2)) / 2
    assert Classification()(batch(labels=labels, logits=logits)).tolist() == pytest.approx([want])


def test_classification_of_soft_labels():
    labels = torch.tensor([[[0.25, 0.75]]])
    logits = torch.tensor([[[0.0, math.log(3.0)]]])
    want = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert Classification()(batch(labels=labels, logits=logits)).tolist() == pytest.approx([want])


def test_reconstruction():
    noise = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    guess = torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]]])
    got = Reconstruction()(batch(noise=noise, decode=lambda _: guess))
    assert got.tolist() == pytest.approx([2.5, 12.5])


def test_diversity_is_one_value_per_generator():
    parts = batch()
    want = [float(diversity_loss(parts.noise[i], parts.samples[i])) for i in range(2)]
    assert Diversity()(parts).tolist() == pytest.approx(want)
    assert want[0] != pytest.approx(want[1])


def test_total_variation():
    ramp = torch.arange(6.0).expand(1, 1, 1, 3, 6)
    assert TotalVariation()(batch(samples=torch.cat([ramp, 0 * ramp]))).tolist() == [1.0, 0.0]
    assert TotalVariation()(batch(samples=torch.randn(2, 5, 8))).tolist() == [0.0, 0.0]


def test_batch_norm_statistics():
    layer = nn.BatchNorm2d(1)
    layer.running_mean.fill_(1.0)
    layer.running_var.fill_(2.0)
    x = torch.tensor([[0.0, 2.0], [5.0, 5.0]]).reshape(2, 2, 1, 1, 1)  # means 1, 5; variances 1, 0
    parts = batch(
        noise=torch.randn(2, 2, 4), norm_inputs=[(layer, x.flatten(0, 1)), (layer, x.flatten(0, 1))]
    )
    got = BatchNormStatistics()(parts).tolist()
    assert got == pytest.approx([2 * (0 + 1), 2 * (4 + 2)], abs=1e-4)


def test_batch_norm_statistics_at_their_minimum_have_a_finite_gradient():
    layer = nn.BatchNorm1d(3)
    x = torch.tensor([[1.0], [-1.0]]).repeat(1, 3).requires_grad_()
    value = BatchNormStatistics()(batch(noise=torch.randn(1, 2, 4), norm_inputs=[(layer, x)]))
    value.sum().backward()
    assert value.item() == pytest.approx(0.0, abs=1e-4)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 6), (3, 4, 5, 6), (2, 1, 1, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channel_moments(shape, layout):
    if layout == torch.channels_last and len(shape) != 4:
        pytest.skip("a layout of images")
    torch.manual_seed(0)
    x = (2 + 3 * torch.randn(shape, dtype=torch.float64)).to(memory_format=layout).requires_grad_()
    dims = [d for d in range(len(shape)) if d != 1]
    mean, var = channel_moments(x)
    torch.testing.assert_close(mean, x.mean(dims))
    torch.testing.assert_close(var, x.var(dims, correction=0))
    assert torch.autograd.gradcheck(channel_moments, x)


def test_channel_moments_of_bfloat16_are_float32():
    x = torch.randn(16, 4, 8, 8).bfloat16()
    mean, var = channel_moments(x)
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(mean, x.float().mean((0, 2, 3)))
    torch.testing.assert_close(var, x.float().var((0, 2, 3), correction=0))


def test_channel_moments_of_a_constant_channel():
    x = torch.full((4, 2, 3, 3), 7.0, requires_grad=True)
    mean, var = channel_moments(x)
    assert var.abs().max() < 1e-6
    (mean.sum() + var.sum()).backward()
    assert x.grad.isfinite().all()
