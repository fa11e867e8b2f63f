"""compress: ranks, factors and surgery in one call, with a report of every decision."""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from kegfast.check import expected
from kegfast.compression import ranks
from kegfast.compression.decompose import Factors, factorize, relative_error
from kegfast.compression.ranks import RankRules, Side
from kegfast.compression.report import CompressionReport, LayerReport
from kegfast.compression.surgery import Site, build, replace, survey

log = logging.getLogger(__name__)

Patterns = str | Sequence[str] | None


def compress(
    model: nn.Module,
    rank: RankRules = "evbmf",
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    round_to: int | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, CompressionReport]:
    """Replaces the convolutions and Linears of a model by low-rank ones.

    Args:
        model: any module. Layers that cannot be factored (grouped, parametrised, pruned, tied
            weights, ...) stay as they are, with the reason in the report.
        rank: the rule for the ranks: "evbmf" (Nakajima et al. 2013), "energy=0.9", a float (the
            share of channels each side keeps), an explicit (in_rank, out_rank), or a mapping from
            layer names or glob patterns to these; layers outside the mapping are left alone. Ranks
            above a layer's channels are an error under its exact name, and are cut otherwise.
        include: glob patterns of layer names, e.g. "layers3.*.conv1"; None takes every layer.
        exclude: glob patterns of layers to leave alone.
        round_to: rounds ranks to multiples of this number (the nearer of both neighbours that
            saves parameters).
        inplace: change `model` itself instead of a deep copy.

    Returns:
        The compressed model and the report.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, a pattern that matches no layer, or
            weights that are not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must be a plain module, got a TorchScript one")
    student = model if inplace else copy.deepcopy(model)
    sites = survey(student)
    selected = select(sites, include, exclude, rank)
    report = CompressionReport(
        [_entry(site) for site in sites], parameters_before=count_parameters(student)
    )
    for site in selected:
        entry = report[site.name]
        wanted = _rule_rank(site, rank, entry, round_to)
        if wanted is None:
            continue
        factors = factorize(site.module.weight, wanted)
        student = install(student, site, factors, entry)
    _finish(report, student)
    return student, report


def select(
    sites: list[Site], include: Patterns, exclude: Patterns, rules: RankRules = "evbmf"
) -> list[Site]:
    """The sites that the patterns choose and that can be factored; notes why the others are not."""
    taken, left = _patterns("include", include), _patterns("exclude", exclude)
    for argument, patterns in (("include", taken or []), ("exclude", left or [])):
        _check_matches(argument, patterns, sites)
    if isinstance(rules, Mapping):
        _check_matches("rank", rules, sites)
        for rule in rules.values():
            ranks.check_rule(rule)
    else:
        ranks.check_rule(rules)
    selected = []
    for site in sites:
        if taken is not None and not _matches(site, taken):
            site.refusal = "not in include"
        elif left is not None and _matches(site, left):
            site.refusal = "in exclude"
        elif site.refusal is None and _rule(site, rules) is None:
            site.refusal = "no rank given"
        if site.refusal is None:
            if not bool(site.module.weight.isfinite().all()):
                raise ValueError(f"model must have finite weights, got NaN or inf in {site.name!r}")
            selected.append(site)
    return selected


def _patterns(argument: str, patterns: Patterns) -> list[str] | None:
    if patterns is None:
        return None
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(expected(argument, "glob patterns of layer names", patterns))
    return patterns


def _check_matches(argument: str, patterns: Iterable[str], sites: list[Site]) -> None:
    for pattern in patterns:
        if not any(_matches(site, [pattern]) for site in sites):
            known = ", ".join(site.name for site in sites[:8])
            raise ValueError(f"{argument} must match a layer ({known}, ...), got {pattern!r}")


def _matches(site: Site, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in site.names for pattern in patterns)


def _rule(site: Site, rules: RankRules) -> Any:
    found = (ranks.rule_for(rules, name) for name in site.names)
    return next((rule for rule in found if rule is not None), None)


def _rule_rank(
    site: Site, rules: RankRules, entry: LayerReport, round_to: int | None
) -> tuple[Side, Side] | None:
    """The ranks of one layer; None, with the reason in the report, where they would not help."""
    rule = _rule(site, rules)
    weight = site.module.weight
    named = isinstance(rules, Mapping) and any(name in rules for name in site.names)
    if isinstance(rule, tuple | list) and not named and len(rule) == 2:
        sides = zip(rule, (weight.shape[1], weight.shape[0]), strict=True)
        rule = tuple(None if r is None else min(r, channels) for r, channels in sides)
    chosen = ranks.layer_rank(weight, rule)
    entry.rank_before_rounding = chosen
    rounded = round_rank(chosen, weight, round_to) if round_to else chosen
    saved = weight.numel() - factor_parameters(weight.shape, rounded)
    if saved <= 0 and not named:
        entry.reason = f"ranks {rounded[0]}/{rounded[1]} would not make it smaller"
        return None
    entry.reason = "explicit ranks" if isinstance(rule, tuple | list) else str(rule)
    return rounded


def round_rank(
    rank: tuple[Side, Side], weight: Tensor, step: int
) -> tuple[Side, Side]:  # to multiples of step
    """The nearest multiples of `step`, the upper one on a tie or where it is as cheap to run."""
    sides = []
    for side, channels in zip(rank, (weight.shape[1], weight.shape[0]), strict=True):
        if side is None:
            sides.append(None)
            continue
        down, up = side // step * step, -(-side // step) * step
        near = up if up - side <= side - down or down == 0 else down
        sides.append(min(near, channels))
    return sides[0], sides[1]


def factor_parameters(shape: Sequence[int], rank: tuple[Side, Side]) -> int:
    """Entries of the factors of a (K, C, ...) weight."""
    outputs, inputs, *kernel = shape
    inner, outer = rank[0] or inputs, rank[1] or outputs
    taps = 1
    for size in kernel:
        taps *= size
    first = rank[0] * inputs if rank[0] else 0
    last = rank[1] * outputs if rank[1] else 0
    return first + inner * outer * taps + last


def install(student: nn.Module, site: Site, factors: Factors, entry: LayerReport) -> nn.Module:
    """Builds the layer of the factors, hangs it into the model and reports it."""
    layer = build(site.module, factors)
    entry.rank = factors.rank
    entry.decision = "tucker" if type(layer).__name__.startswith("Tucker") else "factors"
    entry.error = relative_error(site.module.weight, factors)
    entry.parameters = count_parameters(layer)
    return replace(student, site, layer)


def count_parameters(model: nn.Module) -> int:
    """Parameters of a module, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _entry(site: Site) -> LayerReport:
    module = site.module
    weight = getattr(module, "weight", None)
    known = isinstance(weight, Tensor) and not isinstance(weight, nn.UninitializedParameter)
    size = count_parameters(module) if known else 0
    return LayerReport(
        site.name,
        type(module).__name__,
        tuple(weight.shape) if known else (),
        reason=site.refusal or "",
        parameters=size,
        parameters_before=size,
        aliases=site.names[1:],
    )


def _finish(report: CompressionReport, student: nn.Module) -> None:
    report.parameters = count_parameters(student)
    log.info("%d -> %d parameters (%.2fx)", report.parameters_before, report.parameters, report.ratio)
    for entry in report.layers:
        log.debug("%s: %s (%s)", entry.name, entry.decision, entry.reason)
