"""The soft-target loss as a module."""

import pytest
import torch
import torch.nn.functional as F

from kegfast.nn import SoftTargetLoss


def test_it_is_the_divergence_from_the_softened_teacher():
    student, teacher = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    loss = SoftTargetLoss(temperature=3)
    soft = [(logits.double() / 3).log_softmax(1) for logits in (student, teacher)]
    want = 9 * F.kl_div(*soft, reduction="batchmean", log_target=True)
    assert loss(student, teacher).item() == pytest.approx(want.item(), rel=1e-5)
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert "temperature=3" in repr(loss)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        SoftTargetLoss(temperature)
