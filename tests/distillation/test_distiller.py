"""The loop: what it learns, what it leaves alone, and that it can be stopped and continued."""

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import kegfast
from kegfast.distillation import GaussianNoise, InMemory, Mixture, Pool, losses
from kegfast.distillation.objective import TERMS


def perceptron(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 3),
    )


@pytest.fixture
def teacher() -> nn.Sequential:
    return perceptron(8, 32, 4, seed=1)


@pytest.fixture
def student() -> nn.Sequential:
    return perceptron(8, 16, 4, seed=2)


@pytest.fixture
def noise() -> GaussianNoise:
    return GaussianNoise((8,))


def agreement(student: nn.Module, teacher: nn.Module) -> float:
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return (student(x).argmax(dim=1) == teacher(x).argmax(dim=1)).float().mean().item()


@pytest.mark.parametrize(
    "loss", ["soft_target", "logit_regression", "noisy_logits", "decoupled", "soft_target+boundary"]
)
@pytest.mark.parametrize("kept", [False, True])
def test_the_student_learns_the_teachers_classes(student, teacher, noise, loss, kept):
    torch.manual_seed(0)
    source = Pool(noise, 2000) if kept else noise
    before = agreement(student, teacher)
    history = kegfast.distill(student, teacher, source, loss=loss, steps=300, lr=1e-2)
    assert before < 0.5
    assert agreement(student, teacher) > 0.85
    assert history[-1]["step"] == 300
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize(
    "source",
    [
        torch.randn(64, 8),
        TensorDataset(torch.randn(64, 8), torch.randint(4, (64,))),
        DataLoader(TensorDataset(torch.randn(64, 8)), batch_size=10),
        Mixture([torch.randn(64, 8), GaussianNoise((8,))]),
    ],
    ids=["tensor", "dataset", "loader", "mixture"],
)
def test_any_source_will_do(student, teacher, source):
    start = copy.deepcopy(student.state_dict())
    kegfast.distill(student, teacher, source, steps=3, batch_size=16)
    assert not torch.equal(start["0.weight"], student.state_dict()["0.weight"])


def test_a_network_that_makes_samples_is_not_trained(student, teacher):
    class Network(nn.Linear):
        def sample(self, n):
            return self(torch.randn(n, 3)), None

    source = Network(3, 8)
    kegfast.distill(student, teacher, source, steps=2)
    assert source.weight.grad is None


def test_labels_are_used_below_alpha_one(teacher):
    torch.manual_seed(0)
    samples = torch.randn(256, 8)
    labels = (teacher(samples).argmax(dim=1) + 1) % 4  # contradict the teacher
    student = perceptron(8, 32, 4)
    kegfast.distill(student, teacher, InMemory(samples, labels), alpha=0.0, steps=200, lr=1e-2)
    assert (student(samples).argmax(dim=1) == labels).float().mean() > 0.8


class AskEachTime:
    """The same draws from an object that keeps no answers."""

    def __init__(self, source):
        self.sample = source.sample


def test_a_pool_gives_the_run_that_asking_each_time_gives(student, teacher, noise):
    torch.manual_seed(0)
    pool = Pool(noise, 100)
    other = copy.deepcopy(student)
    first = kegfast.distill(student, teacher, pool, steps=20)
    second = kegfast.distill(other, teacher, AskEachTime(pool), steps=20)
    assert [entry["loss"] for entry in first] == pytest.approx([entry["loss"] for entry in second], rel=1e-4)


def test_the_seed_repeats_a_run_and_the_callers_draws_go_on(student, teacher, noise):
    other, third = copy.deepcopy(student), copy.deepcopy(student)
    torch.manual_seed(5)
    kegfast.distill(student, teacher, noise, steps=5)
    after = torch.rand(1)
    kegfast.distill(other, teacher, noise, steps=5)
    kegfast.distill(third, teacher, noise, steps=5, seed=1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(student[0].weight, other[0].weight)
    assert not torch.equal(student[0].weight, third[0].weight)


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
    monkeypatch.setattr("kegfast.loop.CHECKPOINT_SECONDS", 0)
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


def test_the_readmes_ten_lines_run():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = text.split("<!-- example: distil -->\n```python\n")[1].split("```")[0]
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 10
    assert "steps=1000" in lines[-1]
    names: dict = {}
    exec(compile(code.replace("steps=1000", "steps=2"), "README.md", "exec"), names)
    assert names["student"][0].weight.grad is not None


def test_schedules_scale_the_rate(student, teacher, noise):
    def rates(schedule):
        seen = []

        def make(parameters):
            optimiser = torch.optim.SGD(parameters, lr=0.5)
            optimiser.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
            return optimiser

        kegfast.distill(student, teacher, noise, steps=4, optimizer=make, schedule=schedule)
        return seen

    assert rates("constant") == [0.5] * 4
    assert rates("cosine") == pytest.approx([0.5, 0.25 * (1 + 0.5**0.5), 0.25, 0.25 * (1 - 0.5**0.5)])
    assert rates(lambda done: 1 - done) == pytest.approx([0.5, 0.375, 0.25, 0.125])


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


def test_several_teachers_are_averaged(student, noise):
    teachers = [perceptron(8, 32, 4, seed=s) for s in (1, 2, 3)]
    seen = []

    def loss(ours, theirs, labels):
        seen.append(theirs)
        return losses.soft_target(ours, theirs)

    samples = torch.randn(1, 8)
    kegfast.distill(student, teachers, InMemory(samples), loss=loss, steps=1, temperature=2.0)
    expected = sum((t(samples) / 2).softmax(dim=1) for t in teachers) / 3
    torch.testing.assert_close((seen[0][:1] / 2).softmax(dim=1), expected)


def test_different_devices_are_refused(student, teacher, noise):
    with pytest.raises(ValueError, match=r"^teacher must be on the student's device cpu"):
        kegfast.distill(student, teacher.to("meta"), noise)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"lr": 0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"optimizer": "adagrad"}, "optimizer"),
        ({"schedule": "step"}, "schedule"),
        ({"student_batchnorm": "off"}, "student_batchnorm"),
        ({"loss": "kd"}, "loss"),
        ({"loss": "hint@nowhere"}, "layer"),
        ({"temperature": -1}, "temperature"),
        ({"alpha": 0.5}, "labels"),
        ({"teacher": perceptron(8, 3)}, "teacher"),
        ({"teacher": None}, "teacher"),
        ({"source": 5}, "source"),
        ({"student": 5}, "student"),
        ({"student": nn.Flatten()}, "student"),
    ],
)
def test_bad_arguments_are_named(student, teacher, noise, options, argument):
    arguments = {"student": student, "teacher": teacher, "source": noise, "steps": 1, **options}
    with pytest.raises((ValueError, TypeError), match=f"^{argument} must be"):
        kegfast.distill(**arguments)
    assert teacher.training


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher": Pair(8, 4)}, TypeError, "teacher must be a model that gives logits"),
        ({"student": Pair(8, 4)}, TypeError, "student must be a model that gives logits"),
        ({"teacher": nn.Linear(8, 4).double()}, ValueError, "source must be what the teacher takes"),
        ({"student": nn.Linear(7, 4)}, ValueError, "source must be what the student takes"),
        ({"source": torch.ones(5, 7)}, ValueError, "source must be what the teacher takes"),
    ],
)
def test_models_and_sources_that_do_not_fit_are_refused(student, teacher, noise, change, error, message):
    with pytest.raises(error, match=message):
        kegfast.distill(**({"student": student, "teacher": teacher, "source": noise} | change), steps=1)


def test_a_teacher_cannot_teach_itself(teacher, noise):
    with pytest.raises(ValueError, match=r"^student must be another model"):
        kegfast.distill(teacher, teacher, noise)


def test_a_loss_that_is_no_number_stops_the_run(student, teacher):
    with pytest.raises(FloatingPointError):
        kegfast.distill(student, teacher, torch.full((4, 8), float("nan")), steps=1)


class ByRank:
    """The rank's own part of a batch, the same at every step."""

    def __init__(self, batch, ranks):
        self.parts = batch.chunk(ranks)

    def sample(self, n):
        part = self.parts[torch.distributed.get_rank()]
        return part[:n], None


def _in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    teacher, student = convolutional(6, seed=1).eval(), convolutional(4)
    batch = torch.load(f"{folder}/batch.pt")
    kegfast.distill(DistributedDataParallel(student), teacher, ByRank(batch, 2), batch_size=8, **DISTRIBUTED)
    torch.save(student.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


# Neither term mixes the samples of a batch, so that two halves give the gradient of the whole.
DISTRIBUTED = {
    "loss": "soft_target+hint@3",
    "steps": 3,
    "optimizer": "sgd",
    "student_batchnorm": "eval",
}


def test_two_processes_train_one_student(tmp_path: Path):
    torch.manual_seed(0)
    batch = torch.randn(16, 1, 9, 9)
    torch.save(batch, tmp_path / "batch.pt")
    torch.multiprocessing.spawn(_in_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    class Whole:
        def sample(self, n):
            return batch[:n], None

    teacher, student = convolutional(6, seed=1).eval(), convolutional(4)
    kegfast.distill(student, teacher, Whole(), batch_size=16, **DISTRIBUTED)
    for name, tensor in student.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


class HalfLabelled:
    """The first rank's labels are the teacher's, the second's are wrong: it has no base sample."""

    def __init__(self, batch, teacher):
        with torch.no_grad():
            right = teacher(batch).argmax(dim=1)
        self.batch, self.labels = batch, (right + torch.distributed.get_rank()) % 3

    def sample(self, n):
        return self.batch[:n], self.labels[:n]


def _boundary_in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    teacher = convolutional(6, seed=1).eval()
    student = convolutional(6, seed=1)  # agrees with the teacher: every sample it is given is a base sample
    start = student[6].weight.detach().clone()
    source = HalfLabelled(torch.randn(16, 1, 9, 9), teacher)
    parallel = DistributedDataParallel(student)
    history = kegfast.distill(
        parallel, teacher, source, loss="soft_target+boundary:1", steps=3, batch_size=16, log_every=1
    )
    result = {"losses": [entry["boundary"] for entry in history], "moved": student[6].weight - start}
    torch.save(result | {"weights": dict(student.named_parameters())}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_boundary_samples_of_one_process_alone_hold_nobody_up(tmp_path: Path):
    torch.multiprocessing.spawn(_boundary_in_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert any(first["losses"])
    assert not any(second["losses"])
    assert first["moved"].abs().max() > 0
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
