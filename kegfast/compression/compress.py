"""compress: ranks, factors and surgery in one call, with a report of every decision."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kegfast.check import expected
from kegfast.compression import calibration as calibrating
from kegfast.compression import costs, ranks
from kegfast.compression.budget import Rank, allocate, tabulate
from kegfast.compression.calibration import Inputs, Traffic
from kegfast.compression.choice import keep_fastest
from kegfast.compression.decompose import Factors, Metric, factorize, relative_error
from kegfast.compression.ranks import RankRules, Side
from kegfast.compression.report import CompressionReport, LayerReport
from kegfast.compression.selection import Patterns, rule_of, select
from kegfast.compression.surgery import Site, build, clone, factors_of, replace, survey
from kegfast.nn import TuckerConv2d, TuckerLinear

log = logging.getLogger(__name__)


@dataclass
class _Evidence:
    """What is known about the model beyond its weights."""

    example: Inputs | None = None
    samples: Tensor | None = None  # real, generated or noise
    probes: bool = False  # the samples are noise
    synthetic: bool = False  # they do not look to BatchNorm like what it was trained on
    traffic: dict[str, Traffic] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)


def compress(
    model: nn.Module,
    rank: RankRules = "evbmf",
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    budget: Mapping[str, float] | int | None = None,
    example_input: Tensor | Sequence[Tensor] | None = None,
    calibration: Any = None,
    samples: int = 256,
    measure: bool = True,
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
        budget: instead of a rule: {"params" | "flops" | "memory" | "latency": fraction of the whole
            model}, or a number of parameters, spent over all layers so that the model's output
            changes least. All but "params" need `example_input`.
        example_input: one input of the model (a tensor, or a tuple of them), at the batch size,
            dtype and layout that matter. With it FLOPs are reported, layers are timed, and a budget
            weights errors by the outputs' sensitivity (on noise, with the teacher's BatchNorm
            statistics, unless `calibration` is given). Without either, errors are relative to each
            weight's norm.
        calibration: unlabelled inputs (a tensor, a Dataset, a DataLoader, or anything with
            `.sample(n)` such as Generators). Errors are weighted by them, last factors and biases
            solved anew, BatchNorm statistics re-estimated, or, where the samples are visibly not what
            the model was trained on, moved as they move on both models.
        samples: how many to draw from `calibration`.
        measure: time dense, unfused and fused layers on `example_input` and keep what is fastest;
            the whole model is then never slower than before. Under a budget or explicit ranks a layer
            may lose as long as the model does not.
        round_to: rounds ranks to multiples of this number, for kernels that want it: up where that
            still saves parameters; under a budget only multiples are options.
        inplace: change `model` itself instead of a deep copy.

    Returns:
        The compressed model and the report.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, a pattern that matches no layer, a budget
            below what the lowest ranks cost, or weights that are not finite.
    """
    if isinstance(budget, int) and isinstance(model, nn.Module):
        budget = {"params": budget / max(count_parameters(model), 1)}
    _check(model, rank, budget, example_input, samples, round_to)
    student = model if inplace else clone(model)
    sites = survey(student)
    selected = select(sites, include, exclude, rank)
    report = CompressionReport([_entry(site) for site in sites], parameters_before=count_parameters(student))
    evidence = _gather(student, sites, selected, budget, example_input, calibration, samples)
    teacher = clone(model) if inplace and (evidence.samples is not None or measure) else model
    _report_flops(report, sites, evidence.traffic)
    if budget is None:
        wanted = {site.name: _rule_rank(site, rank, report[site.name], round_to) for site in selected}
    else:
        wanted = _spend(sites, selected, budget, evidence, report, round_to or 1)
    replaced = {site.name: site for site in selected if wanted.get(site.name) is not None}
    for name, site in replaced.items():
        factors = factorize(site.module.weight, wanted[name], evidence.metrics.get(name))
        student = _install(student, site, factors, report[name], evidence.traffic.get(name))
    if measure and evidence.example is not None and replaced:
        keep_small = budget is not None or isinstance(rank, Mapping | tuple | list)
        student = keep_fastest(
            student,
            teacher,
            replaced,
            evidence.traffic,
            evidence.example,
            report,
            keep_small=keep_small,
        )
    _adapt(student, teacher, evidence, report)
    _finish(report, student)
    return student, report


def _check(
    model: nn.Module,
    rank: RankRules,
    budget: Mapping[str, float] | None,
    example_input: Any,
    samples: int,
    round_to: int | None,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must be a plain module, got a TorchScript one")
    if round_to is not None and (not isinstance(round_to, int) or round_to < 1):
        raise ValueError(expected("round_to", "a positive int", round_to))
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise ValueError(expected("samples", "an int of at least 2", samples))
    if budget is None:
        return
    if not isinstance(budget, Mapping) or len(budget) != 1 or next(iter(budget)) not in costs.KINDS:
        raise ValueError(expected("budget", f"one of {', '.join(costs.KINDS)} with its fraction", budget))
    kind, fraction = next(iter(budget.items()))
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ValueError(expected(f"budget[{kind!r}]", "a fraction in (0, 1]", fraction))
    if rank != "evbmf":
        raise ValueError("rank and budget exclude each other, got both")
    if kind != "params" and example_input is None:
        raise ValueError(f"example_input must be given with a budget of {kind}, got None")


def _gather(
    model: nn.Module,
    sites: Sequence[Site],
    selected: Sequence[Site],
    budget: Mapping[str, float] | None,
    example_input: Any,
    calibration: Any,
    samples: int,
) -> _Evidence:
    evidence = _Evidence()
    if example_input is not None:
        sequence = isinstance(example_input, Sequence)
        evidence.example = tuple(example_input) if sequence else (example_input,)
        if not all(isinstance(part, Tensor) for part in evidence.example):
            raise TypeError(expected("example_input", "a tensor or tensors", example_input))
        evidence.traffic = calibrating.trace(model, sites, evidence.example)
    if calibration is not None:
        evidence.samples = calibrating.gather(calibration, samples)
    elif budget is not None and evidence.example is not None and len(evidence.example) == 1:
        example = evidence.example[0]
        if example.is_floating_point():
            evidence.samples = calibrating.probes(example.shape[1:])
            evidence.probes = evidence.synthetic = True
    if evidence.samples is not None:
        weight = next(model.parameters())
        evidence.samples = evidence.samples.to(weight)
        if not evidence.synthetic:
            evidence.synthetic = not calibrating.look_familiar(model, evidence.samples)
        if budget is not None:
            evidence.metrics = calibrating.metrics(
                model, selected, evidence.samples, synthetic=evidence.synthetic
            )
    return evidence


def _spend(
    sites: Sequence[Site],
    selected: Sequence[Site],
    budget: Mapping[str, float],
    evidence: _Evidence,
    report: CompressionReport,
    step: int,
) -> dict[str, Rank | None]:
    """The ranks that spend the budget best."""
    kind, fraction = next(iter(budget.items()))
    total = fixed = float(report.parameters_before) if kind == "params" else 0.0
    tables = {}
    chosen = {id(site) for site in selected}
    for site in sites:
        seen = evidence.traffic.get(site.name)
        if id(site) not in chosen or (kind != "params" and seen is None):
            if kind in ("flops", "memory") and seen and isinstance(site.module, nn.Conv2d | nn.Linear):
                _, dense = _cost(kind, site, seen, evidence)
                total, fixed = total + dense, fixed + dense
            continue
        cost, dense = _cost(kind, site, seen, evidence)
        if kind == "params":
            fixed -= dense
        else:
            total += dense
        metric = evidence.metrics.get(site.name)
        if evidence.metrics and metric is None:
            report[site.name].reason = "did not run on the inputs"
            fixed += dense
            continue
        weight = site.module.weight
        scale = 1.0 if metric else 1 / max(float(weight.detach().double().square().sum()), 1e-30)
        tables[site.name] = tabulate(weight, cost, dense, metric=metric, scale=scale, step=step)
    try:
        options = allocate(tables, fraction * total - fixed)
    except ValueError as error:
        least = fixed + sum(table.costs.min() for table in tables.values())
        raise ValueError(
            f"budget[{kind!r}] must be at least {least / total:.4f} for this model, got {fraction}"
        ) from error
    for name, option in options.items():
        share = "on noise" if evidence.probes else "on the inputs" if evidence.metrics else "by weight"
        worth = "worth its cost as it is" if option.rank is None else "its share of the budget"
        report[name].reason = f"{worth} ({share})"
        report[name].rank_before_rounding = option.rank
    return {name: option.rank for name, option in options.items()}


def _cost(kind: str, site: Site, traffic: Traffic | None, evidence: _Evidence) -> tuple[costs.Cost, float]:
    if kind == "params":
        return costs.parameters(site.module.weight.shape), site.module.weight.numel()
    if kind == "latency":
        return costs.latency(site, traffic, evidence.example, seconds=0.1)
    return getattr(costs, kind)(site.module, traffic)


def _adapt(student: nn.Module, teacher: nn.Module, evidence: _Evidence, report: CompressionReport) -> None:
    """Lets the student's last factors and BatchNorms answer for what the ranks took away."""
    if evidence.samples is None or not report.ranks:
        return
    if not evidence.probes:
        calibrating.refit(student, teacher, evidence.samples)
        report.notes.append(f"last factors and biases solved anew on {len(evidence.samples)} inputs")
    if evidence.synthetic:
        if calibrating.transfer_norms(student, teacher, evidence.samples):
            report.notes.append("BatchNorm statistics moved as synthetic inputs to both models say")
    elif calibrating.reestimate_norms(student, evidence.samples):
        report.notes.append("BatchNorm statistics re-estimated on them")
    layers = dict(student.named_modules())
    for name in report.ranks:
        weight = teacher.get_submodule(name).weight
        report[name].error = relative_error(weight, factors_of(layers[name]))


def _rule_rank(
    site: Site, rules: RankRules, entry: LayerReport, round_to: int | None
) -> tuple[Side, Side] | None:
    """The ranks of one layer; None, with the reason in the report, where they would not help."""
    rule = rule_of(site, rules)
    weight = site.module.weight
    named = isinstance(rules, Mapping) and any(name in rules for name in site.names)
    if isinstance(rule, tuple | list) and not named and len(rule) == 2:
        sides = zip(rule, (weight.shape[1], weight.shape[0]), strict=True)
        rule = tuple(None if r is None else min(r, channels) for r, channels in sides)
    chosen = ranks.layer_rank(weight, rule)
    entry.rank_before_rounding = chosen
    rounded = round_rank(chosen, weight.shape, round_to) if round_to else chosen
    saved = weight.numel() - costs.factor_parameters(weight.shape, rounded)
    if saved <= 0 and not named:
        entry.reason = f"ranks {rounded[0]}/{rounded[1]} would not make it smaller"
        return None
    entry.reason = "explicit ranks" if isinstance(rule, tuple | list) else str(rule)
    return rounded


def round_rank(rank: Rank, shape: Sequence[int], step: int) -> Rank:
    """Multiples of `step` beside a layer's ranks: above, as the kernels pad to that anyway, if it saves.

    Args:
        rank: (in_rank, out_rank) as a rule gave it.
        shape: of the weight, (K, C, ...).
        step: what the kernels compute at once.

    Returns:
        Of both neighbours of each rank, the pair with the most channels that has fewer parameters than
        the dense layer; the lowest pair where none has.
    """
    sides = []
    for side, channels in zip(rank, (shape[1], shape[0]), strict=True):
        near = {None} if side is None else {-(-side // step) * step, max(side // step, 1) * step}
        sides.append([None if n is None else min(n, channels) for n in near])
    pairs = sorted(product(*sides), key=lambda pair: -costs.factor_parameters(shape, pair))
    return next((p for p in pairs if costs.factor_parameters(shape, p) < prod(shape)), pairs[-1])


def _install(
    student: nn.Module, site: Site, factors: Factors, entry: LayerReport, traffic: Traffic | None
) -> nn.Module:
    """Builds the layer of the factors, hangs it into the model and reports it."""
    layer = build(site.module, factors)
    entry.rank = factors.rank
    entry.decision = "tucker" if isinstance(layer, TuckerConv2d | TuckerLinear) else "factors"
    if traffic is not None:
        cost, _ = costs.flops(site.module, traffic)
        entry.flops = int(cost(*(np.array(side or 0) for side in factors.rank)))
    entry.error = relative_error(site.module.weight, factors)
    entry.parameters = count_parameters(layer)
    return replace(student, site, layer)


def count_parameters(model: nn.Module) -> int:
    """Parameters of a module, shared ones once; those of lazy layers that have not run count as none."""
    known = (p for p in model.parameters() if not isinstance(p, nn.UninitializedParameter))
    return sum(parameter.numel() for parameter in known)


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


def _report_flops(report: CompressionReport, sites: Sequence[Site], traffic: Mapping[str, Traffic]) -> None:
    for site in sites:
        if site.name in traffic and isinstance(site.module, nn.Conv2d | nn.Linear):
            _, dense = costs.flops(site.module, traffic[site.name])
            report[site.name].flops = report[site.name].flops_before = dense


def _finish(report: CompressionReport, student: nn.Module) -> None:
    report.parameters = count_parameters(student)
    if any(entry.flops_before for entry in report.layers):
        report.flops_before = sum(entry.flops_before or 0 for entry in report.layers)
        report.flops = sum(entry.flops or 0 for entry in report.layers)
    log.info("%d -> %d parameters (%.2fx)", report.parameters_before, report.parameters, report.ratio)
    for entry in report.layers:
        log.debug("%s: %s (%s)", entry.name, entry.decision, entry.reason)
