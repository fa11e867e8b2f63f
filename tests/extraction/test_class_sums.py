import pytest
import torch
from torch import nn

from kegfast.distillation import GaussianNoise
from kegfast.extraction.class_sums import ClassSums


def linear(features, classes):
    torch.manual_seed(0)
    return nn.Linear(features, classes, bias=False)


def sample(teacher, n, terms, features=8, seed=1):
    torch.manual_seed(seed)
    return ClassSums(teacher, teacher.out_features, GaussianNoise((features,)), terms).sample(n)[0]


def classes(teacher, rows):
    with torch.no_grad():
        return teacher(rows).argmax(1)


def test_sums_have_the_variance_of_data_and_every_class_alike_often():
    teacher = linear(8, 4)
    with torch.no_grad():
        teacher.weight[0] *= 4  # noise falls into the first class far too often
    rows = sample(teacher, 4_000, (1,))
    assert rows.shape == (4_000, 8)
    assert rows.square().mean() == pytest.approx(1, abs=1e-4)
    share = classes(teacher, rows).bincount(minlength=4) / 4_000
    assert share.tolist() == pytest.approx([0.25] * 4, abs=0.03)
    noise = classes(teacher, GaussianNoise((8,)).sample(4_000)[0]).bincount(minlength=4) / 4_000
    assert noise.max() > 0.35


def test_one_feature_gives_sums_of_half_normal_rows():
    # Two classes, x > 0 and x < 0: |x| has the mean m = sqrt(2 / pi) and the variance 1 - m^2, so a sum
    # of K over sqrt(K) has the mean sqrt(K) m and the deviation sqrt(1 - m^2).
    teacher = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        teacher.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    mean = (2 / torch.pi) ** 0.5
    for k in (1, 4, 9):
        rows = sample(teacher, 20_000, (k,), features=1).abs()
        wanted = k**0.5 * mean / (1 - mean**2) ** 0.5
        assert (rows.mean() / rows.std()).item() == pytest.approx(wanted, rel=0.03)


def test_more_terms_lie_closer_to_the_means_of_the_classes():
    teacher = linear(8, 4)
    within = []
    for terms in ((1,), (4,), (16,)):
        rows = sample(teacher, 4_000, terms)
        label = classes(teacher, rows)
        within.append(sum(rows[label == c].var(0).mean() for c in range(4)).item())
    assert within[0] > 1.5 * within[1] > 2 * within[2]


def test_a_class_that_noise_never_meets_is_left_out():
    teacher = nn.Linear(4, 3)
    with torch.no_grad():
        teacher.bias.copy_(torch.tensor([0.0, 0.0, -1e6]))
    rows = sample(teacher, 300, (1, 2), features=4)
    assert rows.isfinite().all()
    assert classes(teacher, rows).unique().tolist() == [0, 1]


def test_the_seed_decides_and_the_teacher_is_left_as_it_was():
    teacher = linear(5, 3).train()
    first, again, other = (sample(teacher, 50, (1, 2), 5, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert teacher.training
    assert teacher.weight.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [({"terms": ()}, "terms"), ({"terms": (0,)}, "terms"), ({"num_classes": 7}, "teacher")],
)
def test_bad_arguments_are_named(change, message):
    options = {"teacher": linear(5, 3), "num_classes": 3, "noise": GaussianNoise((5,)), **change}
    with pytest.raises(ValueError, match=message):
        ClassSums(**options)


def test_a_bad_number_of_rows_is_named():
    source = ClassSums(linear(5, 3), 3, GaussianNoise((5,)))
    with pytest.raises(ValueError, match="n must be"):
        source.sample(0)
