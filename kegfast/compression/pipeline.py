"""compress: ranks, factors and surgery in one call, with a report of every decision."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch
from torch import nn

from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.generators import generators_kept
from kegfast._util.inputs import count
from kegfast._util.modules import clone
from kegfast._util.progress import slow
from kegfast.compression import costs, entries
from kegfast.compression.allocation import Plan, choose, plans
from kegfast.compression.budget import Rank
from kegfast.compression.choice import Keep, keep_fastest
from kegfast.compression.damage import warn_of_damage
from kegfast.compression.evidence import Evidence, Samples, collect
from kegfast.compression.norms import has_norms, reestimate_norms, transfer_norms
from kegfast.compression.refit import refit
from kegfast.compression.report import CompressionReport, LayerReport
from kegfast.compression.selection import Patterns, rule_of, select
from kegfast.compression.surgery import (
    Site,
    as_dense,
    factored_layers,
    replace,
    spell_out_pools,
    survey,
)
from kegfast.decomposition import ranks
from kegfast.decomposition.decompose import Decomposition, Metric, relative_error
from kegfast.decomposition.factors import Factors, Side
from kegfast.decomposition.ranks import RankRules
from kegfast.nn.build import build

log = logging.getLogger(__name__)


@generators_kept()
def compress(
    model: nn.Module,
    rank: RankRules | None = None,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    budget: Mapping[str, float] | int | None = None,
    example_input: Any = None,
    calibration: Any = None,
    samples: int = 256,
    measure: bool = True,
    round_to: int | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, CompressionReport]:
    """Replaces the convolutions and Linears of a model by low-rank ones.

    Args:
        model: any module. Layers that cannot be factored (grouped, parametrized, pruned, tied
            weights, ...) stay as they are, with the reason in the report.
        rank: the rule for the ranks: "evbmf" (Nakajima et al. 2013; the default without a budget),
            "energy=0.9", a float (the share of channels each side keeps), an explicit (in_rank,
            out_rank), or a mapping from layer names or glob patterns to these; layers outside the mapping
            are left alone. Ranks above a layer's channels are an error under its exact name, and are cut
            otherwise. With a budget, a mapping settles the ranks of its layers, and the budget is spent
            on the others; a rule alone is a limit that no layer's ranks exceed.
        include: glob patterns of layer names, e.g. "layers3.*.conv1"; None takes every layer.
        exclude: glob patterns of layers to leave alone.
        budget: {"params" | "flops" | "memory" | "latency": fraction of the whole model}, or a number of
            parameters, spent over all layers so that the model's output changes least. All but "params"
            need `example_input`. Where there are inputs to look at, several ways to spend it are tried
            (errors weighted by sensitivity or not, absolute or relative, one share or energy for all
            layers), and the one whose outputs stay closest to the model's is taken.
        example_input: one input of the model (a tensor, a tuple of tensors, or a mapping by keyword), at
            the batch size, dtype and layout that matter. With it FLOPs are reported, layers are timed,
            and a budget weights errors by the outputs' sensitivity (on noise, with the teacher's BatchNorm
            statistics, unless `calibration` is given). Without either, errors are relative to each
            weight's norm.
        calibration: unlabeled inputs in the same forms, a Dataset or a DataLoader of them (labels are left
            out), or anything with `.sample(n)` such as Generators. Errors are weighted by them, factors and
            biases solved anew, BatchNorm statistics re-estimated. Samples that are visibly not what the
            model was trained on are first changed until BatchNorm finds them familiar (`match_statistics`, at
            most 256 images of 32 x 32 or their like); BatchNorm statistics are then moved as they move
            on both models.
        samples: how many to draw from `calibration`. Anything with `.sample(n)` is asked for eight times
            as many where that is cheap, and those are kept that fall into a classifier's classes alike;
            samples that are changed are not, as they are led to all classes.
        measure: time dense, unfused and fused layers on `example_input` and keep what is fastest;
            the whole model is then never slower than before. Under explicit ranks or a budget of latency a
            layer may lose as long as the model does not. Any other budget is kept, and the report says what
            it costs in time.
        round_to: rounds ranks to multiples of this number, for kernels that want it: up where that
            still saves parameters; under a budget only multiples are options.
        inplace: change `model` itself instead of a deep copy.

    What takes more than two seconds is named in the log (level INFO of "kegfast") and on a terminal.

    torch's global generators are left as they were; what `calibration` draws depends on them.

    Returns:
        The compressed model and the report.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, a pattern that matches no layer, a budget
            below what the lowest ranks cost, or weights that are not finite.
    """
    if isinstance(budget, int) and isinstance(model, nn.Module):
        budget = {"params": check.count("budget", budget) / _most(model, budget)}
    _check(model, rank, budget, example_input, samples, round_to)
    if rank is None and budget is None:
        rank = "evbmf"
    model = spell_out_pools(model, inplace)
    student = model if inplace else clone(model)
    sites = survey(student)
    selected = select(sites, include, exclude, rank, rest=budget is not None)
    report = entries.begin(student, sites)
    with slow("what errors of each layer do to the outputs"):
        evidence = collect(
            student,
            sites,
            selected,
            budget=budget is not None,
            example_input=example_input,
            calibration=calibration,
            samples=samples,
        )
    teacher = clone(model) if inplace and (evidence.samples is not None or measure) else model
    entries.note_flops(report, sites, evidence.traffic)
    decompose = _Decomposer(evidence.metrics)
    plan = _plan(model, sites, selected, rank, budget, round_to, evidence, decompose, report)
    ranked = _ranked(selected, plan)
    for site, chosen in ranked:
        student = _install(student, site, decompose(site, chosen), evidence, report)
    if measure and evidence.example is not None and ranked:
        replaced = {site.name: site for site, _ in ranked}
        keep = _keep(rank, budget)
        with slow(f"timing {len(replaced)} layers and the model"):
            student = keep_fastest(
                student, teacher, replaced, evidence.traffic, evidence.example, report, keep=keep
            )
    _adapt(student, teacher, evidence, report)
    entries.finish(report, student)
    if budget is None and isinstance(rank, str):  # a rule, not a size that someone chose
        warn_of_damage(student, teacher, evidence, report)
    return student, report


def _plan(
    model: nn.Module,
    sites: Sequence[Site],
    selected: Sequence[Site],
    rank: RankRules | None,
    budget: Mapping[str, float] | None,
    round_to: int | None,
    evidence: Evidence,
    decompose: "_Decomposer",
    report: CompressionReport,
) -> Plan:
    """The ranks of each selected layer, by the rules and the budget; None for one that stays dense."""
    wanted: Plan = {}
    for site in selected:
        if rule_of(site, rank) is not None:
            with slow(f"ranks of {_named(site)}"):
                wanted[site.name] = _rule_rank(site, rank, report[site.name], round_to)
    if budget is None:
        return wanted
    settled, limits = _settle(wanted, rank)
    with slow("errors of all layers at all ranks"):
        found = plans(
            sites, selected, budget, evidence, report, fixed=settled, limits=limits, step=round_to or 1
        )
    way, report.plans = choose(found, model, partial(_trial, model, decompose, evidence), evidence)
    if evidence.samples is not None and not report.plans:
        report.notes.append(f"the outputs hold no tensors to compare plans by; {way} was taken")
    entries.note_plan(report, found[way], settled, way, evidence.source)
    return found[way]


def _ranked(sites: Sequence[Site], plan: Plan) -> list[tuple[Site, Rank]]:
    """The sites that a plan factors, with their ranks."""
    found = [(site, plan.get(site.name)) for site in sites]
    return [(site, rank) for site, rank in found if rank is not None]


def _keep(rank: RankRules | None, budget: Mapping[str, float] | None) -> Keep:
    """Which layers stay factored even where that is slower: those whose ranks or size the user asked for."""
    if budget is not None:
        return "layers" if "latency" in budget else "size"
    return "layers" if isinstance(rank, Mapping | tuple | list) else "fastest"


def _named(site: Site) -> str:
    return f"{site.name or 'the model'} ({' x '.join(map(str, site.layer.weight.shape))})"


def _most(model: nn.Module, budget: int) -> int:
    """The model's parameters, which a budget in their number does not exceed."""
    most = entries.count_parameters(model)
    if budget > most:
        raise ValueError(expected("budget", f"at most the model's {most} parameters", budget))
    return most


def _check(
    model: nn.Module,
    rank: RankRules | None,
    budget: Mapping[str, float] | None,
    example_input: Any,
    samples: int,
    round_to: int | None,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must be a plain module, got a TorchScript one")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(f"model must hold the values of its weights, got a {type(model).__name__} on meta")
    if round_to is not None:
        check.count("round_to", round_to)
    check.count("samples", samples, least=2)
    if budget is None:
        if isinstance(rank, Mapping) and not rank:
            raise ValueError(expected("rank", "a rule for one layer at least", rank))
        return
    if not isinstance(budget, Mapping) or len(budget) != 1 or next(iter(budget)) not in costs.KINDS:
        raise ValueError(expected("budget", f"one of {', '.join(costs.KINDS)} with its fraction", budget))
    kind, fraction = next(iter(budget.items()))
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ValueError(expected(f"budget[{kind!r}]", "a fraction in (0, 1]", fraction))
    if kind != "params" and example_input is None:
        raise ValueError(f"example_input must be given with a budget of {kind}, got None")


class _Decomposer:
    """Factors of layers at ranks, each computed once."""

    def __init__(self, metrics: Mapping[str, Metric]):
        self._metrics = metrics
        self._layers: dict[str, Decomposition] = {}
        self._known: dict[tuple[str, Rank], Factors] = {}

    def __call__(self, site: Site, rank: Rank) -> Factors:
        key = site.name, rank
        if key not in self._known:
            if site.name not in self._layers:
                self._layers[site.name] = Decomposition(site.layer.weight, self._metrics.get(site.name))
            with slow(f"factors of {_named(site)}"):
                self._known[key] = self._layers[site.name].at(rank)
        return self._known[key]


def _settle(ruled: Plan, rank: RankRules | None) -> tuple[Plan, dict[str, Rank]]:
    """What the caller's rules leave open under a budget: settled layers, and limits of the others' ranks.

    A mapping settles what it names; any other rule is a limit, and settles layers that it cannot shrink.
    """
    if isinstance(rank, Mapping):
        return ruled, {}
    limits = {name: limit for name, limit in ruled.items() if limit is not None}
    return {name: None for name in ruled if name not in limits}, limits


def _trial(model: nn.Module, decompose: _Decomposer, evidence: Evidence, plan: Plan) -> nn.Module:
    """A plan's student, adapted as `_adapt` will do it, to compare plans by; without a report."""
    student = clone(model)
    for site, rank in _ranked(survey(student), plan):
        student = replace(student, site, build(site.layer, decompose(site, rank)))
    samples = evidence.samples
    if samples is not None and not samples.probes:  # noise runs by its own statistics
        _refit(student, model, samples, evidence.metrics)
        _adapt_norms(student, model, samples)
    return student


def _adapt(student: nn.Module, teacher: nn.Module, evidence: Evidence, report: CompressionReport) -> None:
    """Lets the student's last factors and BatchNorms answer for what the ranks took away."""
    samples, ranked = evidence.samples, report.ranks
    if samples is None or not ranked:
        return
    if not samples.probes:  # least squares would fit what only noise has in common
        with slow("factors solved anew"):
            _refit(student, teacher, samples, evidence.metrics)
        report.notes.append(f"factors and biases solved anew on {count(samples.inputs)} inputs")
    if note := _adapt_norms(student, teacher, samples):
        report.notes.append(note)
    for name, layer in factored_layers(student):
        if name in ranked:
            dense = as_dense(teacher.get_submodule(name))
            report[name].error = relative_error(dense.weight, layer.factors)


def _refit(student: nn.Module, teacher: nn.Module, samples: Samples, metrics: Mapping[str, Metric]) -> None:
    """Solves two factors of a layer, or the last alone beside BatchNorm, where two overfit made samples."""
    refit(student, teacher, samples.inputs, None if has_norms(teacher) else metrics)


def _adapt_norms(student: nn.Module, teacher: nn.Module, samples: Samples) -> str:
    if samples.synthetic:
        moved = transfer_norms(student, teacher, samples.inputs)
        return "BatchNorm statistics moved as synthetic inputs to both models say" if moved else ""
    return "BatchNorm statistics re-estimated on them" if reestimate_norms(student, samples.inputs) else ""


def _rule_rank(
    site: Site, rules: RankRules | None, entry: LayerReport, round_to: int | None
) -> tuple[Side, Side] | None:
    """The ranks of one layer; None, with the reason in the report, where they would not help."""
    rule = rule_of(site, rules)
    weight = site.layer.weight
    named = isinstance(rules, Mapping) and any(name in rules for name in site.names)
    if isinstance(rule, tuple | list) and not named and len(rule) == 2:
        sides = zip(rule, (weight.shape[1], weight.shape[0]), strict=True)
        rule = tuple(None if r is None else min(r, channels) for r, channels in sides)
    try:
        chosen = ranks.layer_rank(weight, rule)
    except ValueError as error:
        raise ValueError(f"rank of {site.name or 'the model'}: {error}") from error
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
        Of both neighbors of each rank, the pair with the most channels that has fewer parameters than
        the dense layer; the lowest pair where none has.
    """
    in_rank, out_rank = rank
    sides = product(_neighbors(in_rank, shape[1], step), _neighbors(out_rank, shape[0], step))
    pairs = sorted(sides, key=lambda pair: -costs.factor_parameters(shape, pair))
    return next((p for p in pairs if costs.factor_parameters(shape, p) < prod(shape)), pairs[-1])


def _neighbors(rank: Side, channels: int, step: int) -> list[Side]:
    if rank is None:
        return [None]
    return [min(n, channels) for n in {-(-rank // step) * step, max(rank // step, 1) * step}]


def _install(
    student: nn.Module, site: Site, factors: Factors, evidence: Evidence, report: CompressionReport
) -> nn.Module:
    """Builds the layer of the factors, hangs it into the model and reports it."""
    layer = build(site.layer, factors)
    entries.note_layer(report[site.name], site, layer, factors, evidence.traffic.get(site.name))
    return replace(student, site, layer)
