"""The resumable step loop under training, extraction and distillation, and its log of metrics."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.files import as_path, atomic_write, digest, read_checkpoint, save_checkpoint
from kegfast._util.generators import generators_kept
from kegfast._util.progress import progress_bar
from kegfast.training.finite import Given

CHECKPOINT_SECONDS = 20.0
"""Time between two checkpoints: what a killed process loses at most."""
ADVICE = "try a lower learning rate"
"""Where what went into the steps was finite."""


class Stateful(Protocol):
    """What can be checkpointed: modules, optimizers, schedulers."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class MetricsLog:
    """A file of JSON lines: `{"stage": ..., "step": ..., "seconds": ..., <values>}`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, stage: str, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Append one line."""
        line = json.dumps({"stage": stage, "step": step, "seconds": round(seconds, 3), **values})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All lines; what is none, such as one that a killed process left unfinished, is skipped."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [entry for entry in map(_parse, lines) if entry is not None]

    def rewind(self, stage: str, step: int) -> None:
        """Drop the lines of `stage` that lie beyond `step`: that part is about to run again."""
        kept = [e for e in self.read() if e["stage"] != stage or e["step"] <= step]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")


def mix(seed: int, index: int) -> int:
    """Hash two integers to 63 bits (the finalizer of SplitMix64 over each), as the seed of one step."""
    mask = (1 << 64) - 1
    state = 0
    for value in (seed, index):
        state = (state + value + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from a seed of their own; the global generators, CUDA's where it is in use, stay as they were."""
    with generators_kept():
        torch.manual_seed(check.seed("seed", seed))
        yield


def run_steps(
    step: Callable[[int], Mapping[str, Tensor | float]],
    steps: int,
    *,
    state: Mapping[str, Stateful],
    given: Given | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    metrics: MetricsLog | None = None,
    progress: bool = False,
    label: str = "steps",
    log_every: int = 10,
    until: Callable[[], bool] = lambda: False,
) -> list[dict[str, float]]:
    """Call `step(0) ... step(steps - 1)` so that an interrupted run can go on to the same result.

    Before step i torch's global generators are seeded from (seed, i), so that its draws depend on nothing
    else; together with the checkpoint of `state` this makes a resumed run equal an uninterrupted one, bit
    for bit where torch's kernels are deterministic (the CPU). The generators' states are restored at the end.

    With a `checkpoint`, Ctrl-C lets the current step finish, saves, and raises KeyboardInterrupt; a second
    Ctrl-C does not wait.

    Args:
        step: does step i and returns scalars by name; they are read from the device only when logged.
        steps: how many.
        state: everything that the steps change: modules, optimizers, schedulers.
        given: notes of what went into the steps; told apart where a value is not finite.
        seed: seed of all draws.
        checkpoint: file for the state, written atomically every 20 seconds or so and at the end.
        resume: continue from `checkpoint` where it exists.
        metrics: log that gets each logged entry.
        progress: show a bar on a terminal.
        label: the stage's name, in the log, the bar and the checkpoint.
        log_every: steps between two entries of the history.
        until: whether the run is done before all its steps are, by `state` alone; asked before each.

    Returns:
        The history: `{"step": steps done, <values of that step>}` every `log_every` steps and at the end.

    Raises:
        TypeError, ValueError: an argument is wrong, or the checkpoint belongs to another run.
        FloatingPointError: a logged value is NaN or infinite; the checkpoint keeps an earlier state.
        KeyboardInterrupt: after Ctrl-C.
    """
    check.counts(steps=steps, log_every=log_every)
    if metrics is not None and not isinstance(metrics, MetricsLog):
        raise TypeError(expected("metrics", "a MetricsLog", metrics))
    run = _Run(label, steps, seed, state, checkpoint)
    if resume and run.path is not None and run.path.exists():
        run.load()
    else:
        run.save()  # an unwritable folder shows before the work, not after
    if metrics is not None:
        metrics.rewind(label, run.done)
    # torch's own writes the stack down for every kind of device that is not there: 0.4 ms a step
    reseed = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    with (
        seeded(seed),
        _deferred_interrupt(checkpoint is not None) as interrupted,
        progress_bar(label, steps, done=run.done, enabled=progress) as update,
    ):
        while not (finished := run.done == steps or until()) and not interrupted.is_set():
            reseed(mix(seed, run.done))
            values = step(run.done)
            run.done += 1
            if run.done % log_every == 0 or run.done == steps:
                entry = _read(values, label, run.done, given)
                run.history.append({"step": run.done, **entry})
                update(run.done, entry)
                if metrics is not None:
                    metrics.write(label, run.done, run.seconds(), entry)
            if run.due() or interrupted.is_set():
                _read(values, label, run.done, given)  # what has diverged must not replace what has not
                run.save()
        run.save()
    if not finished:
        raise KeyboardInterrupt(f"{label} stopped at step {run.done} of {steps}")
    return run.history


class _Run:
    """How far a run is, and its checkpoint."""

    def __init__(
        self, label: str, steps: int, seed: int, state: Mapping[str, Stateful], path: str | Path | None
    ) -> None:
        self.identity = {"label": label, "steps": steps, "seed": seed}
        self.state = state
        self.path = None if path is None else as_path("checkpoint", path)
        self.done = 0
        self.history: list[dict[str, float]] = []
        self.started = self.saved = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def due(self) -> bool:
        return time.monotonic() - self.saved >= CHECKPOINT_SECONDS

    def save(self) -> None:
        if self.path is None:
            return
        content = {
            **self.identity,
            "done": self.done,
            "history": self.history,
            "seconds": self.seconds(),
            "state": {name: part.state_dict() for name, part in self.state.items()},
        }
        save_checkpoint(self.path, content | {"digest": digest(content)})
        self.saved = time.monotonic()

    def load(self) -> None:
        assert self.path is not None  # a run without a checkpoint loads none
        content = read_checkpoint(self.path)
        found = {key: content.get(key) for key in self.identity} if isinstance(content, dict) else content
        if found != self.identity:
            raise ValueError(f"{self.path}: expected the checkpoint of {self.identity}, got that of {found}")
        if content.pop("digest", None) != digest(content):
            raise ValueError(f"{self.path}: expected a whole checkpoint, got one whose values were changed")
        try:
            for name, part in self.state.items():
                part.load_state_dict(content["state"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self.path}: expected the state of this run, got another's ({name})"
            ) from error
        self.done = content["done"]
        self.history = content["history"]
        self.started = time.monotonic() - content["seconds"]


def _read(
    values: Mapping[str, Tensor | float], label: str, done: int, given: Given | None
) -> dict[str, float]:
    entry = {name: float(value) for name, value in values.items()}
    for name, value in entry.items():
        if not math.isfinite(value):
            wrong = given and given.wrong()
            advice = f"{wrong} must give finite values, got NaN or infinite ones" if wrong else ADVICE
            raise FloatingPointError(f"{label}: {name} is {value} at step {done}; {advice}")
    return entry


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    kinds = {"stage": str, "step": int, "seconds": int | float}
    known = isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
    return entry if known else None


@contextmanager
def _deferred_interrupt(enabled: bool) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event; a second one interrupts at once."""
    event = threading.Event()
    in_main = threading.current_thread() is threading.main_thread()
    if not (enabled and in_main) or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield event
        return

    def note(signum: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
