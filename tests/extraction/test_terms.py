"""Every term against arithmetic done by hand or by another route."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kegfast.extraction import (
    BatchNormStatistics,
    ClassBalance,
    Classification,
    Disagreement,
    Diversity,
    Generated,
    Reconstruction,
    TotalVariation,
)
from kegfast.extraction.moments import watched_norm
from kegfast.functional import diversity_loss


def batch(**parts) -> Generated:
    torch.manual_seed(0)
    defaults = {
        "labels": torch.eye(3).repeat(2, 2, 1)[:, :5],
        "noise": torch.randn(2, 5, 4),
        "samples": torch.randn(2, 5, 1, 6, 7),
        "logits": torch.randn(2, 5, 3),
        "decode": lambda samples: samples.flatten(2)[..., :4],
    }
    return Generated(**(defaults | parts))


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
    x = torch.tensor([[0.0, 2.0], [5.0, 5.0]]).reshape(4, 1, 1, 1)  # means 1, 5; variances 1, 0
    moments = watched_norm(x, layer, 2)[1]
    parts = batch(noise=torch.randn(2, 2, 4), norms=[moments, moments])
    got = BatchNormStatistics()(parts).tolist()
    assert got == pytest.approx([2 * (0 + 1 / 2), 2 * (4 / math.sqrt(2) + 2 / 2)], abs=1e-4)


def test_batch_norm_statistics_do_not_depend_on_the_scale_of_features():
    layer, scaled = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    scaled.running_mean.fill_(0.0)
    scaled.running_var.fill_(30.0**2)
    x = torch.randn(8, 3, 2, 2)
    pair = [watched_norm(30 * x, scaled, 2)[1], watched_norm(x, layer, 2)[1]]
    large, small = (BatchNormStatistics()(batch(noise=torch.randn(2, 4, 4), norms=[m])) for m in pair)
    torch.testing.assert_close(large, small, rtol=1e-4, atol=0)


def test_batch_norm_statistics_at_their_minimum_have_a_finite_gradient():
    layer = nn.BatchNorm1d(3)
    x = torch.tensor([[1.0], [-1.0]]).repeat(1, 3).requires_grad_()
    moments = watched_norm(x, layer, 1)[1]
    value = BatchNormStatistics()(batch(noise=torch.randn(1, 2, 4), norms=[moments]))
    value.sum().backward()
    assert value.item() == pytest.approx(0.0, abs=1e-4)
    assert x.grad.isfinite().all()


def trained_norm(channels: int, affine: bool, dtype: torch.dtype) -> nn.Module:
    layer = nn.BatchNorm2d(channels, affine=affine).to(dtype).eval()
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    return layer


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_watched_norm(affine, copies, layout):
    torch.manual_seed(0)
    layer = trained_norm(3, affine, torch.float64)
    x = (2 + 3 * torch.randn(4, 3, 5, 2, dtype=torch.float64)).to(memory_format=layout).requires_grad_()
    y, (_, mean, variance) = watched_norm(x, layer, copies)
    own = x.unflatten(0, (copies, -1))
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(mean, own.mean((1, 3, 4)))
    torch.testing.assert_close(variance, own.var((1, 3, 4), correction=0))
    assert torch.autograd.gradcheck(lambda x: (watched_norm(x, layer, copies)[0],), x)
    assert torch.autograd.gradcheck(lambda x: watched_norm(x, layer, copies)[1][1:], x)

    def total(y, mean, variance):
        return (y**2).sum() + mean.sum() + (variance**2).sum()

    got = torch.autograd.grad(total(y, mean, variance), x)[0]
    want = torch.autograd.grad(total(layer(x), own.mean((1, 3, 4)), own.var((1, 3, 4), correction=0)), x)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 6), (4, 3, 2, 3, 2)])
def test_watched_norm_of_other_shapes(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    layer = trained_norm(3, True, torch.float32)
    y, (_, mean, _) = watched_norm(x, layer, 2)
    torch.testing.assert_close(y, F.batch_norm(x, *(getattr(layer, n) for n in NORM_TENSORS)))
    torch.testing.assert_close(mean[1], x[len(x) // 2 :].transpose(0, 1).flatten(1).mean(1))


NORM_TENSORS = ("running_mean", "running_var", "weight", "bias")


def test_watched_norm_of_bfloat16_has_moments_in_float32():
    x = torch.randn(16, 4, 8, 8).bfloat16()
    layer = trained_norm(4, True, torch.float32)
    y, (_, mean, variance) = watched_norm(x, layer, 1)
    assert y.dtype == torch.bfloat16
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean[0], x.float().mean((0, 2, 3)))
    torch.testing.assert_close(variance[0], x.float().var((0, 2, 3), correction=0))


def test_watched_norm_of_a_constant_channel():
    x = torch.full((4, 2, 3, 3), 7.0, requires_grad=True)
    _, (_, mean, variance) = watched_norm(x, nn.BatchNorm2d(2), 1)
    assert variance.abs().max() < 1e-6
    (mean.sum() + variance.sum()).backward()
    assert x.grad.isfinite().all()


def test_class_balance():
    sure = 1000 * torch.eye(4)
    logits = torch.stack([sure, sure[:1].expand(4, -1), sure[[0, 0, 1, 1]]])  # all, one, two classes
    got = ClassBalance()(batch(logits=logits)).tolist()
    assert got == pytest.approx([-math.log(4), 0.0, -math.log(2)])


def test_disagreement_rises_with_the_distance_and_leaves_the_student_alone():
    student = nn.Sequential(nn.Flatten(), nn.Linear(42, 3), nn.Dropout(0.5))
    before = {name: t.clone() for name, t in student.state_dict().items()}
    term = Disagreement(student, weight=2.0)
    parts = batch(samples=torch.randn(2, 5, 1, 6, 7).requires_grad_())
    answers = student.eval()(parts.samples.flatten(0, 1)).detach().unflatten(0, (2, 5))
    parts.logits = answers + torch.tensor([0.0, 3.0])[:, None, None]
    got = term(parts)
    assert got.tolist() == pytest.approx([0.0, -math.log(4.0)], abs=1e-5)
    got.sum().backward()
    assert parts.samples.grad[1].abs().sum() > 0
    assert all(p.grad is None for p in student.parameters())
    assert all(torch.equal(before[name], t) for name, t in student.state_dict().items())
