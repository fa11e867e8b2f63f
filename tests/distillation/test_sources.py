"""Sources: shapes, ranges, repeatability, shares, and the teacher's kept answers."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from kegfast.distillation import (
    Augmented,
    GaussianNoise,
    InMemory,
    Mixture,
    Munge,
    Noisy,
    Pool,
    UniformNoise,
    as_source,
)


class Squares(Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.full((2,), float(i)), i


class Unlabeled(Squares):
    def __getitem__(self, i: int) -> torch.Tensor:
        return super().__getitem__(i)[0]


SOURCES = {
    "uniform": lambda: UniformNoise((3, 4)),
    "gaussian": lambda: GaussianNoise((3, 4)),
    "samples": lambda: InMemory(torch.randn(20, 3, 4), torch.arange(20)),
    "pool": lambda: Pool(UniformNoise((3, 4)), 20),
    "noisy": lambda: Noisy(torch.randn(20, 3, 4)),
    "augmented": lambda: Augmented(torch.randn(20, 3, 4), lambda x: x + torch.randn_like(x)),
    "munge": lambda: Munge(torch.randn(20, 3, 4)),
    "mixture": lambda: Mixture([UniformNoise((3, 4)), GaussianNoise((3, 4))]),
    "dataset": lambda: as_source(Squares()),
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_global_seed_repeats_a_draw(name):
    torch.manual_seed(0)
    source = SOURCES[name]()
    torch.manual_seed(1)
    first, labels = source.sample(7)
    torch.manual_seed(1)
    again, _ = source.sample(7)
    other, _ = source.sample(7)
    assert first.dtype == torch.float32
    assert first.shape == (7, 3, 4) or name == "dataset"
    assert labels is None or labels.shape == (7,)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_noise_has_its_moments():
    torch.manual_seed(0)
    uniform, _ = UniformNoise((100,), low=-2, high=4).sample(1000)
    assert -2 <= uniform.min() < -1.99
    assert 3.99 < uniform.max() < 4
    gaussian, _ = GaussianNoise((100,), mean=3, std=0.5).sample(1000)
    assert gaussian.mean().item() == pytest.approx(3, abs=0.01)
    assert gaussian.std().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("data", [Squares(), DataLoader(Squares(), batch_size=3, shuffle=True)])
def test_data_keep_their_labels(data):
    samples, labels = as_source(data).sample(25)
    assert torch.equal(samples, labels[:, None].expand(25, 2).float())


@pytest.mark.parametrize(
    "data", [Unlabeled(), DataLoader(Unlabeled(), batch_size=3), TensorDataset(torch.ones(4, 2))]
)
def test_unlabeled_data_have_none(data):
    samples, labels = as_source(data).sample(5)
    assert samples.shape == (5, 2)
    assert labels is None


def test_a_loader_is_read_batch_after_batch_without_loss():
    source = as_source(DataLoader(Squares(), batch_size=4))
    drawn = torch.cat([source.sample(n)[1] for n in (3, 5, 1, 11)])
    assert drawn.tolist() == [*range(10), *range(10)]


def test_a_pool_draws_once_and_keeps_samples_with_their_labels():
    torch.manual_seed(0)
    pool = Pool(Squares(), 50, batch_size=16)
    assert len(pool) == 50
    samples, labels = pool.sample(30)
    assert torch.equal(samples[:, 0], labels.float())


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += len(x)
        return super().forward(x)


def test_the_teacher_is_asked_again_only_when_its_weights_changed():
    pool = Pool(UniformNoise((4,)), 50)
    teacher = Counting(4, 3)
    torch.testing.assert_close(pool.answers(teacher), nn.Linear.forward(teacher, pool.samples))
    pool.answers(teacher)
    assert teacher.calls == 50
    teacher.weight.data[0, 0] += 1e-3  # .data: no version counter sees this
    torch.testing.assert_close(pool.answers(teacher), nn.Linear.forward(teacher, pool.samples))
    assert teacher.calls == 100


def test_noisy_adds_noise_and_keeps_labels():
    torch.manual_seed(0)
    samples, labels = Noisy(Squares(), std=0.5).sample(4000)
    noise = samples - labels[:, None]
    assert noise.std().item() == pytest.approx(0.5, rel=0.05)


def test_augmented_changes_samples_and_keeps_labels():
    source = Augmented(Squares(), lambda x: -2 * x)
    samples, labels = source.sample(30)
    assert torch.equal(samples, -2.0 * labels[:, None].expand(30, 2))
    with pytest.raises(TypeError, match=r"^change must be"):
        Augmented(Squares(), 2)


def test_munge_moves_values_towards_the_nearest_neighbor_only():
    torch.manual_seed(0)
    data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 50.0], [50.0, 52.0]])
    munge = Munge(data, swap=0.5)
    assert munge.neighbors.tolist() == [1, 0, 3, 2]
    samples, labels = munge.sample(4000)
    assert labels is None
    near = samples[samples[:, 0] < 25]
    assert (near[:, 1] == 0).all()  # equal values stay
    assert (samples[samples[:, 0] > 25][:, 0] == 50).all()
    assert ((near[:, 0] != 0) & (near[:, 0] != 1)).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(Munge(data, swap=0.0).sample(9)[0].unique(dim=0), data)
    sharp, _ = Munge(data, swap=1.0, sharpness=1e6).sample(100)
    torch.testing.assert_close(sharp, sharp.round(), rtol=0, atol=1e-3)


def test_nearest_neighbors_span_blocks_of_rows():
    from kegfast.distillation.sources import _nearest

    torch.manual_seed(0)
    x = torch.randn(50, 3, dtype=torch.float64)
    distance = ((x[:, None] - x[None]) ** 2).sum(dim=2) + torch.eye(50) * 1e9
    assert torch.equal(_nearest(x, rows=7), distance.argmin(dim=1))


def test_a_mixture_takes_shares_and_marks_unlabeled_samples():
    mixture = Mixture([Squares(), UniformNoise((2,), -9, -8)], weights=[3, 1])
    assert mixture.counts(128) == [96, 32]
    assert all(sum(mixture.counts(n)) == n for n in range(1, 50))
    samples, labels = mixture.sample(128)
    assert ((samples[:, 0] < 0) == (labels == -100)).all()
    assert (labels == -100).sum() == 32
    assert Mixture([UniformNoise((2,))] * 2).sample(4)[1] is None


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: UniformNoise((2,), 1, 1), "low"),
        (lambda: UniformNoise(()), "sample_shape"),
        (lambda: GaussianNoise((2, 0)), "sample_shape"),
        (lambda: GaussianNoise((2,), std=0), "std"),
        (lambda: InMemory(torch.ones(0, 2)), "samples"),
        (lambda: UniformNoise((2,), 0, math.inf), "high"),
        (lambda: UniformNoise(3), "sample_shape"),
        (lambda: UniformNoise((2.5,)), "sample_shape"),
        (lambda: UniformNoise((2,), device="abacus"), "device"),
        (lambda: UniformNoise((2,)).sample(-1), "n"),
        (lambda: GaussianNoise((2,), std="1"), "std"),
        (lambda: GaussianNoise((2,), mean=math.nan), "mean"),
        (lambda: InMemory([1.0, 2.0]), "samples"),
        (lambda: InMemory(torch.ones(3, 2), torch.ones(2, dtype=int)), "labels"),
        (lambda: InMemory(torch.ones(3, 2), torch.ones(3)), "labels"),
        (lambda: InMemory(torch.ones(3, 2)).sample(0), "n"),
        (lambda: Augmented(torch.ones(3, 2), lambda x: x[:1]).sample(3), "change"),
        (lambda: Pool(UniformNoise((2,)), 0), "size"),
        (lambda: Noisy(UniformNoise((2,)), std=-1), "std"),
        (lambda: Munge(torch.ones(1, 2)), "samples"),
        (lambda: Munge(torch.ones(3, 2), swap=2), "swap"),
        (lambda: Munge(torch.ones(3, 2), sharpness=0), "sharpness"),
        (lambda: Mixture([]), "sources"),
        (lambda: Mixture(torch.ones(3, 2)), "sources"),
        (lambda: Mixture([torch.ones(3, 2), torch.ones(3, 4)]).sample(4), "sources"),
        (lambda: Mixture([UniformNoise((2,))] * 2, [math.nan, 1.0]), "weights"),
        (lambda: Mixture([UniformNoise((2,))], [0.0]), "weights"),
        (lambda: as_source(DataLoader([])).sample(1), "source"),
        (lambda: as_source([]), "source"),
    ],
)
def test_bad_arguments_are_named(call, argument):
    with pytest.raises((ValueError, TypeError), match=f"^{argument} must be"):
        call()


class Named(Dataset):
    """Samples whose labels are words."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.ones(2), "cat"


@pytest.mark.parametrize("source", [Named(), DataLoader(Named(), batch_size=2)], ids=["set", "loader"])
def test_words_are_no_labels(source):
    with pytest.raises(TypeError, match=r"labels must be integers, got .*cat"):
        as_source(source).sample(2)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(2)


@pytest.mark.parametrize("thing", [3, None, iter([1]), Endless()])
def test_what_is_no_source_is_refused(thing):
    with pytest.raises(TypeError, match=r"^source must be"):
        as_source(thing)
    assert as_source(DataLoader(Endless(), batch_size=3)).sample(4)[0].shape == (4, 2)


def test_items_that_are_no_tensors_are_refused():
    with pytest.raises(TypeError, match=r"^source must be a tensor, or a tuple or a dict of tensors"):
        as_source(["cat", "dog"]).sample(2)
