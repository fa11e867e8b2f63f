"""Turns: who runs when, how often, and by which clock."""

import time

import pytest

from kegfast._util.timing import interleaved, take_turns


def note(order, name, seconds=0.0):
    def call():
        order.append(name)
        time.sleep(seconds)

    return call


def test_calls_take_turns_and_medians_are_of_one_call():
    order = []
    calls = {"a": note(order, "a", 0.001), "b": note(order, "b", 0.004)}
    times = interleaved(calls, 3, shuffle=False)
    assert order == ["a", "b"] * 4  # once untimed
    assert 0.001 <= times["a"] < 0.004 <= times["b"] < 0.1


def test_every_round_has_each_call_once_in_changing_order():
    order = []
    calls = {name: note(order, name) for name in "abc"}
    times = take_turns(calls, 20)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 20)
    rounds = [tuple(order[i : i + 3]) for i in range(3, len(order), 3)]
    assert all(set(turn) == set("abc") for turn in rounds)
    assert len(set(rounds)) > 2


def test_rounds_go_on_for_the_time_given():
    start = time.perf_counter()
    times = take_turns({"a": note([], "a", 0.002)}, 1, seconds=0.05)
    assert time.perf_counter() - start >= 0.05
    assert 5 <= len(times["a"]) <= 30


def test_short_calls_are_repeated_inside_a_turn():
    order = []
    times = interleaved(
        {"short": note(order, "short", 0.001), "long": note(order, "long", 0.03)}, 2, turn=0.02
    )
    assert order.count("long") == 2 + 2  # warm-up, estimate, two turns
    assert 2 + 2 * 5 <= order.count("short") <= 2 + 2 * 20
    assert times["short"] < 0.01


def test_a_warm_turn_starts_with_an_untimed_call():
    order = []
    times = take_turns({"a": note(order, "a")}, 4, warm=True)
    assert len(order) == 1 + 2 * 4
    assert len(times["a"]) == 4


def test_the_processor_clock_does_not_count_sleep():
    times = interleaved({"sleep": note([], "sleep", 0.01)}, 3, clock="cpu")
    assert times["sleep"] < 0.005


@pytest.mark.parametrize("options", [{"rounds": 0}, {"clock": "moon"}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=next(iter(options)) if "clock" in options else "round"):
        take_turns({"a": list}, **options)
    with pytest.raises(ValueError, match="at least one"):
        take_turns({})
