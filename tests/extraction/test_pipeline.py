"""The extraction loop: the teacher is left alone, generators are independent, runs resume."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from small_models import SHAPE, image_teacher
from torch import Tensor, nn

from kegfast.extraction import (
    RECIPES,
    Decoder,
    FrozenTeacher,
    GeneratorObjective,
    Generators,
    Recipe,
    extract,
)
from kegfast.extraction.generators import one_hot
from kegfast.models import MLP


def short(**arguments):
    options = {
        "num_classes": 4,
        "sample_shape": SHAPE,
        "generators": 2,
        "steps": 8,
        "batch_size": 16,
        "lr": 1e-2,
    }
    return extract(arguments.pop("teacher", None) or image_teacher(), **(options | arguments))


def take(module: nn.Module, stack: nn.Module, i: int) -> None:
    """Copies network i of a stack into a stack of one: its slice of the leading dimension."""
    ours = module.state_dict()
    for name, whole in stack.state_dict().items():
        ours[name].copy_(whole if whole.dim() == 0 else whole.chunk(stack_copies(whole, ours[name]))[i])


def stack_copies(whole: torch.Tensor, own: torch.Tensor) -> int:
    return whole.shape[0] // own.shape[0]


@pytest.mark.parametrize("shape", [(1, 12, 10), (3, 32, 32), (7,)], ids=str)
@pytest.mark.parametrize("recipe", ["paper", "kegfast"])
def test_batched_training_equals_one_by_one(shape, recipe, monkeypatch):
    copies, classes, size = 3, 4, 6
    teacher = (nn.Linear(7, classes) if len(shape) == 1 else image_teacher(channels=shape[0])).double()
    if shape[-1] == 32:
        teacher[-1] = nn.Linear(6 * 15 * 15, classes).double()
    terms = RECIPES[recipe].terms()
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # in float64 throughout
    torch.manual_seed(0)
    stack = Generators(copies, classes, shape).network.double()
    decoders = Decoder(copies, shape, 10).double()
    singles = [
        (Generators(1, classes, shape).network.double(), Decoder(1, shape, 10).double())
        for _ in range(copies)
    ]
    for i, (network, decoder) in enumerate(singles):
        take(network, stack, i)
        take(decoder, decoders, i)
    frozen = FrozenTeacher(teacher, watch=True)

    def train(network, decoder, draws):
        parameters = [*network.parameters(), *decoder.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        for labels, noise in draws:
            loss, _ = GeneratorObjective(network, decoder, frozen, terms)(labels, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    draws = [
        (
            one_hot(torch.randint(classes, (copies, size)), classes).double(),
            torch.randn(copies, size, 10).double(),
        )
        for _ in range(3)
    ]
    train(stack, decoders, draws)
    for i, (network, decoder) in enumerate(singles):
        train(network, decoder, [(labels[i : i + 1], noise[i : i + 1]) for labels, noise in draws])
        expected = copy.deepcopy(network), copy.deepcopy(decoder)
        take(network, stack, i)
        take(decoder, decoders, i)
        for got, want in zip((network, decoder), expected, strict=True):
            for name, value in want.state_dict().items():
                torch.testing.assert_close(got.state_dict()[name], value, msg=name, rtol=1e-5, atol=1e-7)


def test_generators_of_one_stack_differ():
    samples = short().generate(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 10))
    assert not torch.allclose(samples[0], samples[1], atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_teacher_stays_untouched(training):
    teacher = image_teacher().train(training)
    teacher[0].bias.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    short(teacher=teacher)
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert teacher.training is training
    assert [p.requires_grad for p in teacher.parameters()] == [True, False, True, True, True, True]
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(module._forward_pre_hooks for module in teacher.modules())


def test_frozen_teacher_is_in_eval_mode_and_passes_gradients_to_its_input():
    teacher = image_teacher()
    x = torch.randn(5, *SHAPE, requires_grad=True)
    logits, norms = FrozenTeacher(teacher, watch=True)(x)
    torch.testing.assert_close(logits, teacher.eval()(x))
    assert not any(p.requires_grad for p in norms[0].layer.parameters())
    torch.testing.assert_close(norms[0].mean, teacher[0](x).mean((0, 2, 3))[None])
    logits.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("amp", [False, True])
def test_training_lowers_the_loss_and_the_teacher_agrees(amp):
    teacher = image_teacher()
    teacher[-1].weight.data *= 10  # confident, as trained classifiers are
    result = short(teacher=teacher, generators=1, steps=60, batch_size=32, amp=amp, seed=1)
    first, last = result.history[0], result.history[-1]
    assert last["loss"] < 0.7 * first["loss"]
    samples, labels = result.sample(200)
    agreement = (teacher.eval()(samples).argmax(1) == labels).float().mean()
    assert agreement > 0.8  # chance: 0.25


def test_tables():
    teacher = MLP(5, 3)
    result = short(teacher=teacher, num_classes=3, sample_shape=(5,), recipe="paper", steps=10, batch_size=64)
    samples, _ = result.sample(400)
    assert samples.shape == (400, 5)
    assert samples.mean(0).abs().max() < 1.0
    assert 0.3 < samples.std() < 3.0


def test_same_seed_same_result_other_seed_another():
    def samples(seed):
        result = short(seed=seed)
        torch.manual_seed(0)
        return result.sample(5)[0]

    assert torch.equal(samples(1), samples(1))
    assert not torch.equal(samples(1), samples(2))


def test_global_random_state_is_left_alone():
    teacher = image_teacher()
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    short(teacher=teacher, steps=1)
    assert torch.equal(torch.rand(1), want)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = short()

    class Stop(Exception):
        pass

    class Bomb:
        name, weight = "bomb", 0.0

        def __init__(self, calls):
            self.calls = itertools.count(-calls)

        def __call__(self, batch):
            if next(self.calls) == 0:
                raise Stop
            return batch.logits.new_zeros(2)

    path = tmp_path / "state"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kegfast.training.loop.CHECKPOINT_SECONDS", 0.0)
        with pytest.raises(Stop):
            short(checkpoint=path, extra_terms=[Bomb(5)])
    resumed = short(checkpoint=path, resume=True)
    for (name, a), b in zip(
        whole.network.state_dict().items(), resumed.network.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_terms_of_weight_zero_are_left_out():
    names = {term.name for term in Recipe(beta=0.0, alpha=0.0).terms()}
    assert names == {"classification"}


def test_input_range_bounds_the_samples():
    samples, _ = short(input_range=(-0.5, 2.0)).sample(50)
    assert samples.min() >= -0.5
    assert samples.max() <= 2.0
    paper, _ = short(input_range=(-0.5, 2.0), recipe="paper").sample(50)
    torch.testing.assert_close(paper.mean((1, 2, 3)), torch.zeros(50), atol=1e-4, rtol=0)
    torch.testing.assert_close(paper.std((1, 2, 3), correction=0), torch.ones(50), atol=1e-2, rtol=0)


def test_range_per_channel():
    teacher = image_teacher(channels=3)
    result = short(teacher=teacher, sample_shape=(3, 12, 10), input_range=([0.0, 1.0, 2.0], [0.5, 1.5, 2.5]))
    samples, _ = result.sample(40)
    low = torch.tensor([0.0, 1.0, 2.0]).reshape(3, 1, 1)
    assert ((samples >= low) & (samples <= low + 0.5)).all()


class Reshaping(nn.Module):
    """Gives logits of whatever it is told."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full((len(x), 4), self.value) + 0 * x.flatten(1)[:, :1]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_classes": 1}, "num_classes"),
        ({"num_classes": 5}, "teacher"),
        ({"num_classes": 4.0}, "num_classes"),
        ({"sample_shape": (2, 12, 10)}, "sample_shape"),
        ({"sample_shape": (1, 3, 3)}, "sample_shape"),
        ({"sample_shape": ()}, "sample_shape"),
        ({"sample_shape": (1, 0, 4)}, "sample_shape"),
        ({"sample_shape": 5}, "sample_shape"),
        ({"generators": 0}, "generators"),
        ({"generators": True}, "generators"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 1}, "batch_size"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"noise_size": -1}, "noise_size"),
        ({"lr": "fast"}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"recipe": RECIPES["kegfast"].but(alpha=-1.0)}, "alpha"),
        ({"recipe": RECIPES["kegfast"].but(batch_norm=float("nan"))}, "batch_norm"),
        ({"seed": "x"}, "seed"),
        ({"device": "abacus"}, "device"),
        ({"metrics": "log.jsonl"}, "metrics"),
        ({"extra_terms": [3]}, "extra_terms"),
        ({"teacher": nn.Linear(2, 3, device="meta")}, "device"),
        ({"recipe": "magic"}, "recipe"),
        ({"recipe": 3}, "recipe"),
        ({"input_range": (1.0, 0.0)}, "input_range"),
        ({"input_range": (0.0, float("inf"))}, "input_range"),
        ({"input_range": ([0.0, 0.0], 1.0)}, "input_range"),
        ({"input_range": 1.0}, "input_range"),
        ({"teacher": Reshaping(float("nan"))}, "teacher"),
        ({"teacher": "a file"}, "teacher"),
    ],
)
def test_bad_arguments(arguments, name):
    with pytest.raises((ValueError, TypeError), match=f"^{name} must be"):
        short(**arguments)


def test_divergence_is_an_error():
    with pytest.raises(FloatingPointError, match="extract"):
        short(teacher=Exploding(), steps=20)


class Exploding(nn.Module):
    """Finite at the first look, NaN from then on."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        logits = F.pad(x.flatten(1)[:, :1], (0, 3))
        return logits if self.calls == 1 else logits * float("nan")
