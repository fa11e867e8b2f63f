"""The step loop: its history, and that an interrupted run ends as an uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kegfast.training import loop
from kegfast.training.loop import MetricsLog, mix, run_steps

STEPS = 40


class Toy:
    """A small training run with dropout, momentum, a schedule and BatchNorm: much that can go astray."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)

    def step(self, i: int) -> dict[str, torch.Tensor | float]:
        x = torch.randn(16, 4)
        loss = (self.model(x) - x[:, :2]).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return {"loss": loss.detach(), "share": i / STEPS}

    def run(self, step=None, **options) -> list[dict[str, float]]:
        state = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return run_steps(step or self.step, STEPS, state=state, seed=3, **options)

    def interrupted_at(self, stop: int, signum: int = signal.SIGINT):
        def step(i: int):
            if i == stop:
                os.kill(os.getpid(), signum)
            return self.step(i)

        return step


@pytest.fixture(scope="module")
def whole():
    toy = Toy()
    return toy, toy.run()


@pytest.fixture(autouse=True)
def interrupts():
    """Ctrl-C as on a terminal; a background job's tests would start with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def assert_same(toy: Toy, history, whole) -> None:
    reference, expected = whole
    assert history == expected
    for name, tensor in reference.model.state_dict().items():
        assert torch.equal(toy.model.state_dict()[name], tensor), name


def test_history_has_an_entry_every_log_every_steps_and_the_last():
    toy = Toy()
    history = toy.run(log_every=15)
    assert [entry["step"] for entry in history] == [15, 30, 40]
    assert history[0]["share"] == 14 / STEPS
    assert all(isinstance(entry["loss"], float) for entry in history)


def test_draws_depend_on_seed_and_step_alone(whole):
    toy = Toy()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert_same(toy, toy.run(), whole)
    assert torch.equal(torch.get_rng_state(), before)
    assert len({mix(seed, i) for seed in range(50) for i in range(50)}) == 2500
    assert all(0 <= mix(seed, 1) < 2**63 for seed in (-1, 0, 2**64))


@pytest.mark.parametrize("stop", [0, 17, STEPS - 1])
def test_ctrl_c_finishes_the_step_and_resumes_bit_for_bit(tmp_path, whole, stop):
    checkpoint, log = tmp_path / "run.pt", MetricsLog(tmp_path / "metrics.jsonl")
    toy = Toy()
    if stop < STEPS - 1:
        with pytest.raises(KeyboardInterrupt, match=f"at step {stop + 1} of {STEPS}"):
            toy.run(toy.interrupted_at(stop), checkpoint=checkpoint, metrics=log)
    else:  # nothing is left to do: the run is complete
        toy.run(toy.interrupted_at(stop), checkpoint=checkpoint, metrics=log)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    later = Toy()
    assert_same(later, later.run(checkpoint=checkpoint, resume=True, metrics=log), whole)
    assert [entry["step"] for entry in log.read()] == [10, 20, 30, 40]


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    toy = Toy()

    def step(i: int):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal must interrupt the step")

    with pytest.raises(KeyboardInterrupt):
        toy.run(step, checkpoint=tmp_path / "run.pt")


def test_an_ignored_ctrl_c_stays_ignored(tmp_path, whole):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    toy = Toy()
    assert_same(toy, toy.run(toy.interrupted_at(5), checkpoint=tmp_path / "run.pt"), whole)


def test_a_killed_run_resumes_bit_for_bit(tmp_path, whole):
    script = f"""
import signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_loop import Toy, loop
loop.CHECKPOINT_SECONDS = 0.0
toy = Toy()
toy.run(toy.interrupted_at(23, signal.SIGKILL), checkpoint="run.pt",
    metrics=loop.MetricsLog("m.jsonl"), log_every=1)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    log = MetricsLog(tmp_path / "m.jsonl")
    with open(log.path, "a") as file:
        file.write('{"stage": "steps", "st')  # killed while it wrote
    log.write("steps", 39, 1.0, {"loss": 1.0})
    toy = Toy()
    history = toy.run(checkpoint=tmp_path / "run.pt", resume=True, metrics=log, log_every=1)
    assert len(history) == STEPS
    assert [entry["step"] for entry in log.read()] == list(range(1, STEPS + 1))
    assert_same(toy, history[9::10], whole)


def test_a_finished_run_resumes_without_a_step(tmp_path, whole):
    Toy().run(checkpoint=tmp_path / "run.pt")
    toy = Toy()
    history = toy.run(lambda i: pytest.fail("no step is left"), checkpoint=tmp_path / "run.pt", resume=True)
    assert_same(toy, history, whole)


def test_without_resume_a_run_starts_anew(tmp_path, whole):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write("other", 5, 0.0, {"loss": 0.5})
    for _ in range(2):
        toy = Toy()
        assert_same(toy, toy.run(checkpoint=tmp_path / "run.pt", metrics=log), whole)
    assert [entry["stage"] for entry in log.read()] == ["other"] + 4 * ["steps"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    toy = Toy()
    toy.run(checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="'steps': 41"):
        run_steps(toy.step, 41, state={}, seed=3, checkpoint=tmp_path / "run.pt", resume=True)
    with pytest.raises(ValueError, match=r"another's \(model\)"):
        run_steps(toy.step, STEPS, state={"model": nn.Linear(1, 1)}, seed=3,
                  checkpoint=tmp_path / "run.pt", resume=True)  # fmt: skip
    (tmp_path / "run.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"run\.pt"):
        toy.run(checkpoint=tmp_path / "run.pt", resume=True)


@pytest.mark.parametrize(
    "value", [{"done": "many"}, {"history": 3}, {"seconds": None}, {"state": {"model": 1}}]
)
def test_a_checkpoint_whose_values_were_changed_is_refused(tmp_path, value):
    toy = Toy()
    toy.run(checkpoint=tmp_path / "run.pt")
    content = loop.read_checkpoint(tmp_path / "run.pt")
    torch.save(content | value, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"run\.pt: expected a whole checkpoint"):
        toy.run(checkpoint=tmp_path / "run.pt", resume=True)


@pytest.mark.parametrize(
    "line", ['{"stage": "a"}', '{"stage": "a", "step": "3", "seconds": 1}', "[" * 200_000, "3"]
)
def test_lines_of_a_log_that_are_none_are_skipped(tmp_path, line):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write("a", 1, 0.5, {"loss": 2.0})
    with open(log.path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    log.rewind("a", 5)
    assert log.read() == [{"stage": "a", "step": 1, "seconds": 0.5, "loss": 2.0}]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, bad):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    toy = Toy()

    def step(i: int):
        return {**toy.step(i), "loss": bad if i >= 20 else 1.0}

    with pytest.raises(FloatingPointError, match=r"loss is .* at step 21"):
        toy.run(step, checkpoint=tmp_path / "run.pt")
    assert loop.read_checkpoint(tmp_path / "run.pt")["done"] == 20  # no diverged state


def test_values_are_read_from_the_device_only_when_logged():
    class Counting:
        reads = 0

        def __float__(self) -> float:
            Counting.reads += 1
            return 1.0

    run_steps(lambda i: {"loss": Counting()}, 25, state={}, log_every=10)
    assert Counting.reads == 3


def test_metrics_are_json_lines(tmp_path):
    log = MetricsLog(tmp_path / "new" / "m.jsonl")
    Toy().run(metrics=log)
    entries = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [10, 20, 30, 40]
    assert entries[0].keys() == {"stage", "step", "seconds", "loss", "share"}


def test_a_log_skips_what_is_no_line_of_it(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("train", 10, 0.5, {"loss": 1.0})
    with open(log.path, "ab") as file:
        file.write(b'\xff\xfe\n3\n[1]\n{"loss": 2.0}\n{"stage": "tr')
    assert [entry["step"] for entry in log.read()] == [10]
    log.rewind("train", 5)
    assert log.read() == []
