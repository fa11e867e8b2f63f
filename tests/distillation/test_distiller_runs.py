"""The loop under bfloat16 and compiled; stopped and continued; what it leaves alone."""

import copy

import pytest
import torch
import torch.multiprocessing
from small_models import agreement, convolutional
from torch.utils.data import DataLoader, TensorDataset

import kegfast
from kegfast.distillation import GaussianNoise, Mixture, losses
from kegfast.distillation.objective import TERMS


class Stop(Exception):
    pass


class Fragile:
    """A source that fails once, at its n-th draw."""

    def __init__(self, source, at):
        self.source, self.left = source, at

    def sample(self, n):
        self.left -= 1
        if self.left == 0:
            raise Stop
        return self.source.sample(n)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_stopped_run_continues_to_the_same_weights(tmp_path, optimizer, monkeypatch):
    monkeypatch.setattr("kegfast.training.loop.CHECKPOINT_SECONDS", 0)
    teacher, whole = convolutional(6, seed=1), convolutional(4)
    halves = copy.deepcopy(whole)
    noise = GaussianNoise((1, 9, 9))
    options = {
        "loss": "soft_target+hint@3",
        "steps": 12,
        "batch_size": 8,
        "optimizer": optimizer,
        "log_every": 1,
    }
    history = kegfast.distill(whole, teacher, noise, **options)
    options["checkpoint"] = tmp_path / "run.pt"
    with pytest.raises(Stop):
        kegfast.distill(halves, teacher, Fragile(noise, 8), **options)
    fresh = convolutional(4, seed=3)
    resumed = kegfast.distill(fresh, teacher, noise, resume=True, **options)
    assert [entry["loss"] for entry in resumed] == [entry["loss"] for entry in history]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_the_teacher_and_both_modes_are_left_as_they_were():
    teacher, student = convolutional(6), convolutional(4)
    teacher.train()
    teacher[0].eval()
    student.eval()
    before = copy.deepcopy(teacher.state_dict())
    kegfast.distill(student, teacher, GaussianNoise((1, 9, 9)), steps=2, loss="soft_target+hint@3")
    assert teacher.training
    assert not teacher[0].training
    assert not any(module.training for module in student.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(module._forward_hooks for module in [*teacher.modules(), *student.modules()])


@pytest.mark.parametrize(("mode", "moved"), [("train", True), ("eval", False)])
def test_student_batchnorm(mode, moved):
    teacher, student = convolutional(6), convolutional(4)
    start = student[1].running_mean.clone()
    kegfast.distill(student, teacher, GaussianNoise((1, 9, 9)), steps=2, student_batchnorm=mode)
    assert torch.equal(start, student[1].running_mean) != moved


def test_amp_trains_float32_weights_under_bfloat16(student, teacher, noise):
    seen = []

    def loss(ours, theirs, labels):
        seen.append((ours.dtype, theirs.dtype))
        return losses.soft_target(ours, theirs)

    kegfast.distill(student, teacher, noise, loss=loss, steps=2, amp=True)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert student[0].weight.dtype == torch.float32
    assert agreement(student, teacher) > 0
    kegfast.distill(student, teacher, noise, loss="soft_target+rkd_angle:50+hint@0", steps=2, amp=True)


def test_a_compiled_student_learns(student, teacher, noise):
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    kegfast.distill(compiled, teacher, noise, steps=100, lr=1e-2)
    assert agreement(student, teacher) > 0.75


LAYERS = {"hint": "@3", "attention_transfer": "@0,3", "fsp": "@0,3", "rkd_distance": "@5", "rkd_angle": "@5"}


@pytest.mark.parametrize("way", ["amp", "compile"])
@pytest.mark.parametrize("name", TERMS)
def test_every_loss_takes_data_generators_and_noise_in_every_way(name, way):
    torch.manual_seed(0)
    teacher, student = convolutional(4, seed=1), convolutional(4)
    data = DataLoader(TensorDataset(torch.randn(20, 1, 9, 9), torch.randint(3, (20,))), batch_size=8)
    source = Mixture([data, kegfast.Generators(2, 3, (1, 9, 9)), GaussianNoise((1, 9, 9))])
    model = torch.compile(student, backend="aot_eager", fullgraph=True) if way == "compile" else student
    model(torch.randn(12, 1, 9, 9))  # compiled once without the hooks
    start = copy.deepcopy(student.state_dict())
    loss = "soft_target+" + name + LAYERS.get(name, "")
    history = kegfast.distill(
        model, teacher, source, loss=loss, steps=3, batch_size=12, log_every=1, amp=way == "amp"
    )
    assert all(torch.tensor(list(entry.values())).isfinite().all() for entry in history)
    assert not torch.equal(start["0.weight"], student.state_dict()["0.weight"])
    assert not any(module._forward_hooks for module in student.modules())


def test_a_compiled_student_gives_its_features(noise):
    teacher, noise = convolutional(6, seed=1), GaussianNoise((1, 9, 9))
    plain, student = convolutional(4), convolutional(4)
    options = {"loss": "soft_target+hint@3", "steps": 3, "batch_size": 8, "log_every": 1}
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(8, 1, 9, 9))
    student.load_state_dict(plain.state_dict())
    first = kegfast.distill(plain, teacher, noise, **options)
    second = kegfast.distill(compiled, teacher, noise, **options)
    assert [e["hint"] for e in first] == pytest.approx([e["hint"] for e in second], rel=1e-4)
