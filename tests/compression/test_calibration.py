"""Calibration: samples from any source, factors solved on them, samples made familiar to BatchNorm."""

import copy

import pytest
import torch
from odd import odd
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kegfast import compress
from kegfast.compression.matching import match_statistics
from kegfast.compression.norms import batch_statistics, look_familiar, reestimate_norms
from kegfast.compression.refit import refit
from kegfast.compression.samples import balanced, gather, of_every_class, probes
from kegfast.decomposition.decompose import Metric
from kegfast.distillation import GaussianNoise, Mixture
from kegfast.models import LeNet5, ResNet14


def test_probes_are_the_same_every_time_and_normal():
    for shape in ((1, 32, 32), (3, 20, 24), (9,), (2, 3, 3)):
        first = probes(shape)
        assert torch.equal(first, probes(shape))
        assert first.shape[1:] == shape
        assert float(first.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("form", ["tensor", "dataset", "loader", "source"])
def test_calibration_takes_any_source(form):
    samples = torch.randn(40, 1, 32, 32)

    class Source:
        def sample(self, n):
            return samples[:n], None

    forms = {
        "tensor": samples,
        "dataset": TensorDataset(samples, torch.zeros(40)),
        "loader": DataLoader(samples, batch_size=7),
        "source": Source(),
    }
    teacher = LeNet5()
    _, report = compress(teacher, budget={"params": 0.4}, calibration=forms[form], samples=32)
    assert report.parameters <= 0.4 * report.parameters_before
    assert any("32 inputs" in note for note in report.notes)


class Sign(nn.Module):
    """Three classes by one number: below 0, above 1, and in between."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([-x[:, 0], 0.5 - (x[:, 0] - 0.5).abs(), x[:, 0] - 1], 1)


def test_sources_give_every_class_alike() -> None:
    class Skewed:
        def sample(self, n: int) -> tuple[Tensor, None]:
            return torch.randn(n, 4, generator=rng) - 0.5, None

    rng = torch.Generator().manual_seed(0)
    first = gather(Skewed(), 60, Sign())
    samples = of_every_class(Sign(), first, Skewed())
    assert samples.shape == (60, 4)
    assert Sign()(samples[:9]).argmax(1).bincount(minlength=3).tolist() == [3, 3, 3]  # so is every prefix
    assert Sign()(samples).argmax(1).bincount().tolist() == [20, 20, 20]  # of the first 60 few are above 1
    assert Sign()(first).argmax(1).bincount(minlength=3).tolist()[2] < 10
    mixture = Mixture([Skewed(), GaussianNoise((4,))], weights=[1, 3])
    mixed = of_every_class(Sign(), gather(mixture, 60, Sign()), mixture)
    assert mixed.shape == (60, 4)
    for part in (mixed[:9], mixed[15:24]):  # every source by itself
        assert Sign()(part).argmax(1).bincount(minlength=3).tolist() == [3, 3, 3]
    given = torch.randn(70, 4)
    assert of_every_class(Sign(), given, given) is given  # what the caller chose stays as it is
    flat = nn.Flatten(0)  # no table of logits
    assert torch.equal(balanced(flat, given, 8), given[:8])


def test_refitting_brings_outputs_closer():

    torch.manual_seed(0)
    teacher = odd()
    samples = torch.randn(64, 3, 16, 16)
    reestimate_norms(teacher, samples)
    student, _ = compress(teacher, {"stem": (2, 8), "block.0.0": (8, 12), "fc": (8, None)})
    with torch.no_grad():
        before = (student(samples) - teacher(samples)).square().mean()
        refit(student, teacher, samples)
        after = (student(samples) - teacher(samples)).square().mean()
    assert after < 0.7 * before


def best_product(weight, gram, output, rank):
    """Of all products of a rank the one whose outputs cost least, by two SVDs that say so."""
    left, right = torch.linalg.cholesky(output), torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(left.T @ weight @ right)
    return torch.linalg.solve(left.T, u[:, :rank] * s[:rank]) @ torch.linalg.solve(right.T, v[:rank].T).T


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_two_factors_are_solved_at_once_in_the_outputs_metric(rank: int) -> None:
    """Without a pull, the regression onto the dense layer's outputs is that layer's best approximation."""
    torch.manual_seed(rank)
    teacher = nn.Sequential(nn.Linear(12, 9, bias=False)).double()
    samples = torch.randn(200, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    mixing = torch.randn(9, 9, dtype=torch.float64)
    metric = Metric(torch.eye(12), mixing @ mixing.T)
    student, _ = compress(teacher, {"0": (rank, None)})
    refit(student, teacher, samples, {"0": metric}, ridge=(0.0, 0.0))
    wanted = best_product(teacher[0].weight.detach(), samples.T @ samples, metric.output, rank)
    found = student[0].core.weight @ student[0].first.weight
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


GEOMETRIES = {
    "strided": {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    "same": {"padding": "same"},
    "uneven same": {"padding": "same", "kernel_size": (4, 3)},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "valid": {"padding": "valid"},
    "pointwise": {"kernel_size": 1, "stride": 2},
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("rank", [(5, 4), (None, 4), (5, None)])
def test_refitting_reads_every_geometry(name: str, rank: tuple[int | None, int | None]) -> None:
    """With full ranks' worth of room on both sides the dense layer comes back from spoilt factors."""
    torch.manual_seed(0)
    options = {"kernel_size": 3, **GEOMETRIES[name]}
    conv = nn.Conv2d(6, 8, **options).double()
    with torch.no_grad():  # its ranks are those asked for
        basis, out = torch.randn(rank[0] or 6, 6).double(), torch.randn(8, rank[1] or 8).double()
        inner = torch.randn(out.shape[1], len(basis), *conv.kernel_size).double()
        conv.weight.copy_(torch.einsum("ko,oihw,ic->kchw", out, inner, basis))
    teacher = nn.Sequential(conv)
    samples = torch.randn(20, 6, 9, 8, dtype=torch.float64)
    pointwise = name == "pointwise"
    if pointwise and None not in rank:
        rank = (4, None)
    student, _ = compress(teacher, {"0": rank})
    metric = Metric(torch.eye(6), torch.eye(8))
    with torch.no_grad():
        for part in list(student[0].children())[0 if pointwise else -1 if rank[1] is None else -2 :]:
            part.weight.add_(torch.randn_like(part.weight))
        wanted = teacher(samples)
        refit(student, teacher, samples, {"0": metric}, ridge=(1e-9, 1e-9))
        torch.testing.assert_close(student(samples), wanted, rtol=1e-4, atol=1e-4)


def test_teacher_is_untouched_by_calibration():
    teacher = ResNet14().train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    modes = [module.training for module in teacher.modules()]
    compress(teacher, budget={"params": 0.5}, calibration=torch.randn(16, 1, 32, 32))
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert modes == [module.training for module in teacher.modules()]
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_made_samples_become_familiar_and_the_model_stays():
    teacher, start = odd(), 6 * torch.rand(32, 3, 16, 16) - 3
    scale = torch.tensor([0.3, 1.0, 2.0])[:, None, None]
    reestimate_norms(teacher, 1 + scale * torch.randn(256, 3, 16, 16))
    before = copy.deepcopy(teacher.state_dict())
    assert not look_familiar(teacher, start)
    moved = match_statistics(teacher, start)
    assert moved.shape == start.shape
    assert float(moved.min()) >= float(start.min())
    assert float(moved.max()) <= float(start.max())

    def distance(samples):
        with batch_statistics(teacher) as seen, torch.no_grad():
            teacher(samples)
        norms = [(teacher.get_submodule(name), mean) for name, (mean, _) in seen.items()]
        return sum(float(((mean - n.running_mean).square() / n.running_var).mean()) for n, mean in norms)

    assert distance(moved) < 0.3 * distance(start)
    assert torch.equal(moved, match_statistics(teacher, start))
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
