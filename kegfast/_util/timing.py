"""Timing calls against each other: they take turns, so that a busy machine hits all of them alike."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch

from kegfast._util.check import expected

Name = TypeVar("Name", bound=str)
Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}


def interleaved(
    calls: Mapping[Name, Callable[[], object]], rounds: int = 5, **options: Any
) -> dict[Name, float]:
    """Median seconds of one call each; arguments as of `take_turns`."""
    times = take_turns(calls, rounds, **options)
    return {name: statistics.median(values) for name, values in times.items()}


def take_turns(
    calls: Mapping[Name, Callable[[], object]],
    rounds: int = 5,
    *,
    seconds: float = 0.0,
    turn: float = 0.0,
    warm: bool = False,
    shuffle: bool = True,
    clock: Clock = "wall",
    seed: int = 0,
) -> dict[Name, list[float]]:
    """Seconds of one call, for each call in each round.

    Every call runs once beforehand, untimed. Where CUDA is in use, a turn ends when the devices have.

    Args:
        calls: what to time, by name.
        rounds: turns of each, at least.
        seconds: go on with further rounds until all have taken about this long together.
        turn: seconds a turn should last; a shorter call is repeated inside its turn, whose mean counts.
        warm: run a call untimed at the start of its turn, so that it finds the caches as it left them; else
            as another call left them.
        shuffle: another order in each round, so that no call always follows the same one.
        clock: "wall", or "cpu" for the CPU time of this thread alone, which other processes do not add to.
        seed: of the shuffling.

    Raises:
        ValueError: no calls, no rounds, or another clock.
    """
    if not calls or rounds < 1:
        raise ValueError(expected("calls", "at least one call and one round", f"{len(calls)} and {rounds}"))
    if clock not in CLOCKS:
        raise ValueError(expected("clock", " or ".join(CLOCKS), clock))
    now = CLOCKS[clock]
    repeats = {name: _repeats(call, turn, now) for name, call in calls.items()}
    times: dict[Name, list[float]] = {name: [] for name in calls}
    order, shuffled = list(calls), random.Random(seed)
    end = time.perf_counter() + seconds
    done = 0
    while done < rounds or time.perf_counter() < end:
        if shuffle:
            shuffled.shuffle(order)
        for name in order:
            call = calls[name]
            if warm:
                call()
            times[name].append(_turn(call, repeats[name], now))
        done += 1
    return times


def _repeats(call: Callable[[], object], turn: float, now: Callable[[], float]) -> int:
    """How often a call fits into a turn; also what warms it up."""
    _turn(call, 1, now)
    return 1 if turn <= 0 else max(1, round(turn / max(_turn(call, 1, now), 1e-7)))


def _turn(call: Callable[[], object], repeats: int, now: Callable[[], float]) -> float:
    _wait()
    start = now()
    for _ in range(repeats):
        call()
    _wait()
    return (now() - start) / repeats


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
