import pytest
import torch
from torch import nn

from kegfast.extraction.langevin import Langevin


def linear(features, classes, scale=1.0):
    torch.manual_seed(0)
    layer = nn.Linear(features, classes)
    with torch.no_grad():
        layer.weight.mul_(scale)
    return layer


def test_samples_follow_the_density_of_prior_and_teacher():
    # One feature, two classes, logits (0, w x): p(x | 1) ~ sigmoid(w x) N(x; 0, 1), by quadrature below.
    teacher = nn.Linear(1, 2)
    with torch.no_grad():
        teacher.weight.copy_(torch.tensor([[0.0], [2.0]]))
        teacher.bias.zero_()
    torch.manual_seed(0)
    samples, labels = Langevin(teacher, 2, (1,), steps=300, rate=0.02, noise=1.0).sample(20_000)
    grid = torch.linspace(-6, 6, 2001)
    density = (2 * grid).sigmoid() * (-grid.square() / 2).exp()
    density /= density.sum()
    mean = (density * grid).sum()
    std = ((density * grid.square()).sum() - mean.square()).sqrt()
    ones = samples[labels == 1]
    assert ones.mean() == pytest.approx(mean.item(), abs=0.03)
    assert ones.std() == pytest.approx(std.item(), abs=0.03)
    assert samples[labels == 0].mean() == pytest.approx(-mean.item(), abs=0.03)


def test_the_teacher_is_surer_of_them_than_of_the_prior():
    teacher = linear(8, 4, scale=4)
    torch.manual_seed(1)
    samples, labels = Langevin(teacher, 4, (8,)).sample(500)
    with torch.no_grad():
        right = (teacher(samples).argmax(1) == labels).float().mean()
    assert samples.shape == (500, 8)
    assert right > 0.9
    assert set(labels.tolist()) == {0, 1, 2, 3}


def test_no_two_samples_are_alike_and_the_seed_decides():
    source = Langevin(linear(5, 3), 3, (5,))
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(source.sample(50)[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.pdist(draws[0]).min() > 0


def test_the_teacher_is_left_as_it_was():
    teacher = nn.Sequential(linear(5, 3), nn.Dropout(0.5)).train()
    before = teacher[0].weight.clone()
    with torch.no_grad():
        Langevin(teacher, 3, (5,)).sample(10)
    assert teacher.training
    assert teacher[0].weight.grad is None
    assert torch.equal(teacher[0].weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"rate": 0.0}, "rate"),
        ({"noise": -1.0}, "noise"),
        ({"num_classes": 4}, "teacher"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Langevin(**{"teacher": linear(5, 3), "num_classes": 3, "sample_shape": (5,), **options})


def test_a_bad_count_is_named():
    with pytest.raises(ValueError, match="n must be"):
        Langevin(linear(5, 3), 3, (5,)).sample(0)
