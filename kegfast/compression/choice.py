"""Never slower: what runs fastest is measured, layer by layer and then as a whole."""

import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from kegfast._util import timing
from kegfast._util.inputs import Inputs, call, tensors_in
from kegfast._util.modules import evaluation, modes_kept
from kegfast.compression.surgery import Site, replace, unfused
from kegfast.compression.traffic import Traffic
from kegfast.nn import TuckerConv2d

log = logging.getLogger(__name__)


@dataclass
class Measured:
    """What was timed, and what it led to; nothing where nothing was.

    Attributes:
        latency: median seconds of the whole model, "before" and "after".
        layers: of each layer's ways to run.
        reasons: of what became of layers, by their names.
        notes: what there is to say of the model as a whole.
    """

    latency: dict[str, float] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


Keep = Literal["fastest", "layers", "size"]
"""What of a student stays that is not faster: nothing, its layers, or all of it."""

MARGIN = 0.01
"""By this share the student must be faster: what wins by less may lose when it is timed again."""

ROUNDS = 3
"""Turns of whole models at least; calls so slow that they get no more vary little."""

LAYER_ROUNDS = 2
"""Turns of layers at least: what they say is checked on the whole model."""


def time_layers(
    student: nn.Module,
    sites: Mapping[str, Site],
    traffic: Mapping[str, Traffic],
    example: Inputs,
    seconds: float,
) -> dict[str, tuple[dict[str, nn.Module], dict[str, float]]]:
    """For each factored site its ways to run ("dense", "unfused", "fused") and their median seconds.

    Layers that differ in nothing but their numbers are timed once.
    """
    found, known = {}, {}
    for name, site in sites.items():
        if name not in traffic:
            continue
        ways = _ways(site.module, student.get_submodule(name))
        kind = _kind(ways, traffic[name])
        if kind not in known:
            inputs = inputs_like(example, traffic[name], site.layer.weight)
            known[kind] = _time_ways(ways, inputs, seconds)
        found[name] = ways, dict(known[kind])
    return found


def _kind(ways: Mapping[str, nn.Module], traffic: Traffic) -> tuple[str, ...]:
    """All that the time of a layer's ways depends on; every layer prints its arguments."""
    weight = ways["dense"].weight
    return *(f"{way}: {layer}" for way, layer in ways.items()), f"{traffic} {weight.dtype} {weight.device}"


def _ways(dense: nn.Module, layer: nn.Module) -> dict[str, nn.Module]:
    ways = {"dense": dense}
    if isinstance(layer, TuckerConv2d):
        return {**ways, "unfused": unfused(layer), "fused": layer}
    return {**ways, "unfused": layer}


def _time_ways(ways: Mapping[str, nn.Module], inputs: Sequence[Tensor], seconds: float) -> dict[str, float]:
    with modes_kept(*ways.values()), torch.inference_mode():
        calls = {way: partial(run_all, layer.eval(), inputs) for way, layer in ways.items()}
        return timing.interleaved(calls, LAYER_ROUNDS, seconds=seconds)


def run_all(layer: nn.Module, inputs: Sequence[Tensor]) -> None:
    """One forward pass's calls of a layer."""
    for x in inputs:
        layer(x)


def inputs_like(example: Inputs, traffic: Traffic, weight: Tensor) -> list[Tensor]:
    """Random inputs for a layer's calls, in its weight's dtype and the example's memory format."""
    inputs = [torch.randn(shape, device=weight.device).to(weight.dtype) for shape in traffic.inputs]
    wanted = tensors_in(example)[0]
    last = wanted.dim() == 4 and wanted.is_contiguous(memory_format=torch.channels_last)
    if not last or wanted.is_contiguous():
        return inputs
    return [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]


def keep_fastest(
    student: nn.Module,
    teacher: nn.Module,
    sites: Mapping[str, Site],
    traffic: Mapping[str, Traffic],
    example: Inputs,
    *,
    keep: Keep,
    seconds: float = 0.1,
) -> tuple[nn.Module, Measured]:
    """Replaces layers of the student by whichever way of running them is fastest.

    Args:
        student: the compressed model.
        teacher: the original, to be timed against.
        sites: the factored sites by name, with their original modules.
        traffic: shapes at the sites for `example`.
        example: input of the model.
        keep: "fastest" makes every layer that is slower factored dense again, and then more of them until
            the whole model is faster; "layers" only the latter; "size" none of them: the notes then say
            what the size that was asked for costs in time.
        seconds: for each layer's timing.

    Returns:
        The student, which unless its size is kept was faster than the teacher in the last measurement, or is
        it again; and what was measured.
    """
    measured = Measured()
    timed = time_layers(student, sites, traffic, example, seconds)
    losses: dict[str, float] = {}
    for name, (ways, times) in timed.items():
        measured.layers[name] = times
        measured.reasons[name] = []
        low = min((way for way in times if way != "dense"), key=times.__getitem__)
        losses[name] = times[low] - times["dense"]
        student = replace(student, sites[name], ways[low])
        if len(ways) == 3:
            measured.reasons[name].append(f"{low} is the faster way")
        if losses[name] > 0 and keep == "fastest":
            student = _restore(student, sites[name], measured, "slower than the dense layer")
            del losses[name]
    if keep == "size":
        _note_cost(measured, _time_models(teacher, student, example, 8 * seconds))
    else:
        student = _not_slower(student, teacher, sites, losses, example, measured, 8 * seconds)
    return student, measured


def _note_cost(measured: Measured, times: Mapping[str, Sequence[float]]) -> None:
    """Writes the whole model's times down, and in words where it became slower."""
    measured.latency = {name: statistics.median(values) for name, values in times.items()}
    share = statistics.median(_shares(times))
    if not _faster(times):
        measured.notes.append(f"the budget is kept although a call takes {share:.2f} times as long as before")


def _restore(student: nn.Module, site: Site, measured: Measured, reason: str) -> nn.Module:
    measured.reasons[site.name].append(reason)
    log.info("%s stays dense: %s", site.name, reason)
    return replace(student, site, site.module)


def _not_slower(
    student: nn.Module,
    teacher: nn.Module,
    sites: Mapping[str, Site],
    losses: dict[str, float],
    example: Inputs,
    measured: Measured,
    seconds: float,
) -> nn.Module:
    """Times the whole model, and restores the layers that lost most until it is surely not slower."""
    worst = sorted(losses, key=losses.__getitem__)
    tries = 0
    while worst:
        times = _time_models(teacher, student, example, seconds)
        measured.latency = {name: statistics.median(values) for name, values in times.items()}
        share = statistics.median(_shares(times))
        if _faster(times):
            return student
        # As many layers as their own times ask for; more each time that these did not foretell the whole.
        tries += 1
        wanted = (share - (1 - MARGIN)) * measured.latency["before"]
        step = max(_enough([losses[name] for name in reversed(worst)], wanted), 2**tries // 4)
        for name in worst[: -step - 1 : -1]:
            worst.remove(name)
            reason = "restored, the whole model was not faster with it"
            student = _restore(student, sites[name], measured, reason)
    before = measured.latency.get("before")
    measured.latency = {} if before is None else {"before": before, "after": before}
    measured.notes.append("every layer that runs is dense again: nothing was surely faster")
    return student


def _enough(losses: Sequence[float], wanted: float) -> int:
    """How many of the losses, the worst first, add up to what is wanted; a quarter where all do not."""
    saved = 0.0
    for count, loss in enumerate(losses, start=1):
        saved += max(loss, 0.0)
        if saved >= wanted:
            return count
    return max(1, len(losses) // 4)


def _time_models(
    teacher: nn.Module, student: nn.Module, example: Inputs, seconds: float
) -> dict[str, list[float]]:
    """Seconds of both, round by round; for longer where the first rounds leave it open and are short."""
    calls = {"before": lambda: call(teacher, example), "after": lambda: call(student, example)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + 7 * seconds
    with evaluation(student), evaluation(teacher), torch.inference_mode():
        for longer in (1, 2, 4):
            for name, values in timing.take_turns(
                calls, ROUNDS, seconds=longer * seconds, seed=longer
            ).items():
                times[name] += values
            if _faster(times) or min(_interval(_shares(times))) > 1 or time.perf_counter() > end:
                break
    return times


def _shares(times: Mapping[str, Sequence[float]]) -> list[float]:
    """After over before, round by round: what slows the machine for a while is in both."""
    return [after / before for before, after in zip(times["before"], times["after"], strict=True)]


def _faster(times: Mapping[str, Sequence[float]]) -> bool:
    """Whether the student is faster by the margin, and surely not slower."""
    shares = _shares(times)
    return statistics.median(shares) <= 1 - MARGIN and max(_interval(shares)) <= 1


def _interval(shares: Sequence[float]) -> tuple[float, float]:
    """Of the median, with about 95 % confidence whatever the distribution (order statistics)."""
    ordered = sorted(shares)
    reach = math.ceil(math.sqrt(len(ordered)))  # 1.96 * sqrt(n) / 2, rounded up
    middle = len(ordered) / 2
    low, high = math.floor(middle - reach), math.ceil(middle + reach) - 1
    return ordered[max(low, 0)], ordered[min(high, len(ordered) - 1)]
