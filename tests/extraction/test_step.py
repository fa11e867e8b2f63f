"""One step of all generators: what it calls, that it never waits for the device, and its other forms."""

import copy

import pytest
import torch
from fake_cuda import FakeCuda
from small_models import SHAPE, image_teacher
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kegfast._util.cuda_graph import WARM_UP, Captured
from kegfast.extraction import (
    RECIPES,
    Decoder,
    FrozenTeacher,
    GeneratorObjective,
    Generators,
    Recipe,
    Step,
    extract,
)
from kegfast.extraction import terms as extraction_terms
from kegfast.models import LeNet5, ResNet14

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.equal,
    aten.is_nonzero,
}
"""Operators that read a value from the device, or whose result's size depends on one."""


class Waits(TorchDispatchMode):
    """Collects the operators that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in WAITS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def make_step(
    recipe: Recipe, teacher: nn.Module | None = None, shape=SHAPE, classes: int = 4, **options
) -> Step:
    torch.manual_seed(0)
    recipe = recipe.but(steps=10, batch_size=8)
    network = Generators(2, classes, shape, labels=recipe.labels).network.train()
    terms = recipe.terms()
    frozen = FrozenTeacher(teacher or image_teacher(), any(term.name == "batch_norm" for term in terms))
    return Step(
        GeneratorObjective(network, Decoder(2, shape, 10), frozen, terms), recipe, classes, 10, 2, **options
    )


ALL_TERMS = RECIPES["kegfast"].but(beta=1.0, total_variation=1.0, class_balance=1.0)


@pytest.mark.parametrize("labels", ["one-hot", "soft"])
@pytest.mark.parametrize("amp", [False, True])
def test_a_step_never_waits_for_the_device(amp, labels):
    step = make_step(ALL_TERMS.but(labels=labels), amp=amp)
    step(0)
    with Waits() as waits:
        step(1)
    assert waits.found == []


def test_waits_are_seen():
    with Waits() as waits:
        torch.ones(2).sum().item()
        torch.ones(2).nonzero()
    assert len(waits.found) == 2


def test_without_beta_no_diversity_is_computed(monkeypatch):
    calls = []
    monkeypatch.setattr(extraction_terms, "diversity_loss", lambda *a: calls.append(a) or torch.zeros(()))
    make_step(RECIPES["paper"].but(beta=0.0))(0)
    assert calls == []
    make_step(RECIPES["paper"])(0)
    assert len(calls) == 2  # one a generator


@pytest.mark.parametrize("model", [LeNet5, ResNet14])
def test_the_objective_compiles_into_one_graph(model):
    step = make_step(ALL_TERMS, model().eval(), (1, 32, 32), 10)
    draws = step.draw()
    eager, log = step.objective(*draws)
    parameters = list(step.objective.generator.parameters())
    want = torch.autograd.grad(eager, parameters)
    compiled, compiled_log = torch.compile(step.objective.__call__, fullgraph=True, backend="eager")(*draws)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(compiled_log, log)
    for got, gradient in zip(torch.autograd.grad(compiled, parameters), want, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-4)


def test_faithful_is_the_teacher_in_train_mode_on_each_generators_batch():
    teacher = image_teacher()
    before = copy.deepcopy(teacher.state_dict())
    x = torch.randn(12, *SHAPE)
    logits, _ = FrozenTeacher(teacher, watch=False, faithful=True)(x, copies=2)
    alone = copy.deepcopy(teacher).train()
    torch.testing.assert_close(logits, torch.cat([alone(x[:6]), alone(x[6:])]))
    assert not torch.allclose(logits, teacher.eval()(x), atol=1e-3)
    arguments = {"num_classes": 4, "sample_shape": SHAPE, "generators": 2, "steps": 3, "recipe": "paper"}
    faithful, other = (extract(teacher, faithful=mode, **arguments) for mode in (True, False))
    assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())
    differ = zip(faithful.network.parameters(), other.network.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in differ)


def test_faithful_and_batch_norm_statistics_exclude_each_other():
    with pytest.raises(ValueError, match="faithful must be False"):
        extract(image_teacher(), num_classes=4, sample_shape=SHAPE, faithful=True)


def test_soft_labels_are_asked_for_and_scaled_to_shares(tmp_path):
    step = make_step(RECIPES["paper"].but(labels="soft"))
    labels, noise = step.draw()
    assert labels.shape == (2, 8, 4)
    assert ((labels >= 0) & (labels < 1)).all()
    seen = []
    step.objective.terms.append(type("Look", (), {
        "name": "look", "weight": 0.0, "__call__": lambda self, b: seen.append(b) or b.logits.new_zeros(2)
    })())  # fmt: skip
    step.objective(labels, noise)
    torch.testing.assert_close(seen[0].labels, labels / labels.sum(-1, keepdim=True))
    made = extract(
        image_teacher(),
        num_classes=4,
        sample_shape=SHAPE,
        generators=2,
        steps=2,
        recipe="paper",
        labels="soft",
    )
    made.save(tmp_path / "g.safetensors")
    loaded = Generators.load(tmp_path / "g.safetensors")
    torch.manual_seed(0)
    soft = loaded.sample(30)
    loaded.labels = "one-hot"
    torch.manual_seed(0)
    hard = loaded.sample(30)
    assert not torch.equal(soft[0], hard[0])
    assert soft[1].unique().tolist() == [0, 1, 2, 3]


def test_labels_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="labels must be"):
        extract(image_teacher(), num_classes=4, sample_shape=SHAPE, labels="hard")


def test_capture_warms_up_records_once_and_replays(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    calls = []
    captured = Captured(lambda x: calls.append(x) or {"y": x})
    for i in range(WARM_UP + 3):
        captured(torch.full((2,), float(i)))
    assert len(calls) == WARM_UP + 1  # the last call is the recording
    assert fake.log.count("CUDAGraph") == fake.log.count("graph") == 1
    assert fake.log.count("replay") == 3
    assert calls[-1].tolist() == [WARM_UP + 2.0] * 2  # the recorded input holds the latest one
    # On another device's stream nothing would be recorded, and every replay would do nothing.
    (stream,) = fake.graph_streams
    assert stream.device == torch.device("cpu")
    assert fake.log.count("Stream") == 1


def test_nothing_is_captured_on_the_cpu():
    assert not isinstance(make_step(RECIPES["paper"]).train, Captured)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", ["paper", "kegfast"])
def test_captured_training_equals_eager_training(recipe):
    arguments = {"num_classes": 4, "sample_shape": SHAPE, "generators": 2, "steps": 12, "device": "cuda"}
    a, b = (extract(image_teacher(), recipe=recipe, capture=mode, **arguments) for mode in (True, False))
    for got, want in zip(a.network.parameters(), b.network.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
