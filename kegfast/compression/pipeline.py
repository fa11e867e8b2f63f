"""compress: ranks, factors and surgery in one call, with a report of every decision."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.generators import generators_kept
from kegfast._util.inputs import count
from kegfast._util.modules import clone
from kegfast._util.progress import slow
from kegfast.compression import costs
from kegfast.compression.allocation import Plan
from kegfast.compression.budget import Rank
from kegfast.compression.choice import Keep, Measured, keep_fastest
from kegfast.compression.damage import warn_of_damage
from kegfast.compression.entries import count_parameters, write
from kegfast.compression.evidence import Evidence, Samples, collect
from kegfast.compression.norms import has_norms, reestimate_norms, transfer_norms
from kegfast.compression.planning import plan
from kegfast.compression.refit import refit
from kegfast.compression.report import CompressionReport
from kegfast.compression.selection import Patterns, select
from kegfast.compression.surgery import Site, is_factored, replace, spell_out_pools, survey
from kegfast.decomposition.decompose import Decomposition, Metric
from kegfast.decomposition.factors import Factors
from kegfast.decomposition.ranks import RankRules
from kegfast.nn.build import build


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
    parameters = count_parameters(student)
    sites = survey(student)
    selected = select(sites, include, exclude, rank, rest=budget is not None)
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
    fit = Fitting(evidence.metrics)

    planned = plan(
        partial(_trial, model, fit, evidence),
        model,
        sites,
        selected,
        rank,
        budget,
        evidence,
        parameters=parameters,
        round_to=round_to,
    )
    factors = fit(selected, planned.ranks)
    student = install(student, selected, factors)
    measured = Measured()
    if measure:
        replaced = {site.name: site for site in selected if site.name in factors}
        student, measured = time_ways(student, teacher, replaced, evidence, _keep(rank, budget))
    adapted = adapt(student, teacher, evidence, factors)
    report = write(student, sites, evidence.traffic, planned, measured, adapted, parameters=parameters)
    if budget is None and isinstance(rank, str):  # a rule, not a size that someone chose
        warn_of_damage(student, teacher, evidence, report)
    return student, report


class Fitting:
    """Factors of layers at ranks, each computed once.

    Args:
        metrics: what errors cost, of layers by name.
    """

    def __init__(self, metrics: Mapping[str, Metric]):
        self._metrics = metrics
        self._layers: dict[str, Decomposition] = {}
        self._known: dict[tuple[str, Rank], Factors] = {}

    def __call__(self, sites: Sequence[Site], ranks: Plan) -> dict[str, Factors]:
        """Those of every layer that a plan factors, by its name."""
        found = [(site, ranks.get(site.name)) for site in sites]
        return {site.name: self._at(site, rank) for site, rank in found if rank is not None}

    def _at(self, site: Site, rank: Rank) -> Factors:
        key = site.name, rank
        if key not in self._known:
            if site.name not in self._layers:
                self._layers[site.name] = Decomposition(site.layer.weight, self._metrics.get(site.name))
            with slow(f"factors of {site.title}"):
                self._known[key] = self._layers[site.name].at(rank)
        return self._known[key]


def install(student: nn.Module, sites: Sequence[Site], factors: Mapping[str, Factors]) -> nn.Module:
    """The student with the layers of the factors in the place of the dense ones."""
    for site in sites:
        if site.name in factors:
            student = replace(student, site, build(site.layer, factors[site.name]))
    return student


def time_ways(
    student: nn.Module, teacher: nn.Module, replaced: Mapping[str, Site], evidence: Evidence, keep: Keep
) -> tuple[nn.Module, Measured]:
    """The student with its layers in their fastest way, or dense again where that is left open; the times."""
    if evidence.example is None or not replaced:
        return student, Measured()
    with slow(f"timing {len(replaced)} layers and the model"):
        return keep_fastest(student, teacher, replaced, evidence.traffic, evidence.example, keep=keep)


def _keep(rank: RankRules | None, budget: Mapping[str, float] | None) -> Keep:
    """Which layers stay factored even where that is slower: those whose ranks or size the user asked for."""
    if budget is not None:
        return "layers" if "latency" in budget else "size"
    return "layers" if isinstance(rank, Mapping | tuple | list) else "fastest"


def adapt(student: nn.Module, teacher: nn.Module, evidence: Evidence, names: Collection[str]) -> list[str]:
    """Lets the last factors and the BatchNorms answer for what the ranks took away from these layers.

    Returns:
        What was done, in words; nothing where there are no samples, or none of the layers is factored.
    """
    samples = evidence.samples
    if samples is None or not any(is_factored(student.get_submodule(name)) for name in names):
        return []
    notes = []
    if not samples.probes:  # least squares would fit what only noise has in common
        with slow("factors solved anew"):
            _refit(student, teacher, samples, evidence.metrics)
        notes.append(f"factors and biases solved anew on {count(samples.inputs)} inputs")
    return [*notes, *_adapt_norms(student, teacher, samples)]


def _refit(student: nn.Module, teacher: nn.Module, samples: Samples, metrics: Mapping[str, Metric]) -> None:
    """Two factors of a layer at once, but beside BatchNorm the last alone: two fit made samples too well."""
    refit(student, teacher, samples.inputs, None if has_norms(teacher) else metrics)


def _adapt_norms(student: nn.Module, teacher: nn.Module, samples: Samples) -> list[str]:
    if samples.synthetic:
        moved = transfer_norms(student, teacher, samples.inputs)
        return ["BatchNorm statistics moved as synthetic inputs to both models say"] if moved else []
    seen = reestimate_norms(student, samples.inputs)
    return ["BatchNorm statistics re-estimated on them"] if seen else []


def _trial(model: nn.Module, fit: Fitting, evidence: Evidence, ranks: Plan) -> nn.Module:
    """A plan's student, adapted as `adapt` will do it, but not on noise, to compare plans by."""
    student = clone(model)
    sites = survey(student)
    student = install(student, sites, fit(sites, ranks))
    samples = evidence.samples
    if samples is not None and not samples.probes:  # noise runs by its own statistics
        _refit(student, model, samples, evidence.metrics)
        _adapt_norms(student, model, samples)
    return student


def _most(model: nn.Module, budget: int) -> int:
    """The model's parameters, which a budget in their number does not exceed."""
    most = count_parameters(model)
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
