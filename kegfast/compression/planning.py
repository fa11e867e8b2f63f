"""The ranks of every layer: by a rule, or as one budget over all layers asks for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod

from torch import nn

from kegfast._util.progress import slow
from kegfast.compression import costs
from kegfast.compression.allocation import Plan, choose, plans
from kegfast.compression.budget import Rank
from kegfast.compression.evidence import Evidence
from kegfast.compression.selection import rule_of
from kegfast.compression.surgery import Site
from kegfast.decomposition.factors import Side
from kegfast.decomposition.ranks import RankRules, layer_rank


@dataclass
class Planned:
    """What is to become of the selected layers, and why.

    Attributes:
        ranks: of each; None for one that stays dense.
        asked: the ranks before they were rounded.
        reasons: in a few words.
        changes: how much the outputs change by each way to spend the budget; empty where none was tried.
        notes: what there is to say of the model as a whole.
    """

    ranks: Plan = field(default_factory=dict)
    asked: dict[str, Rank | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    changes: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plan(
    trial: Callable[[Plan], nn.Module],
    model: nn.Module,
    sites: Sequence[Site],
    selected: Sequence[Site],
    rules: RankRules | None,
    budget: Mapping[str, float] | None,
    evidence: Evidence,
    *,
    parameters: int,
    round_to: int | None,
) -> Planned:
    """The ranks that the rules give the layers that they name; a budget is spent on the others.

    Args:
        trial: makes a plan's student, to compare plans by.
        model: the teacher.
        sites: all layers of the model.
        selected: those that may be factored.
        rules, budget, round_to: as of `compress`; the budget is a fraction.
        evidence: of errors and costs.
        parameters: of the whole model.
    """
    ruled = Planned()
    for site in selected:
        if rule_of(site, rules) is not None:
            with slow(f"ranks of {site.title}"):
                _apply_rule(ruled, site, rules, round_to)
    if budget is None:
        return ruled
    settled, limits = _settle(ruled.ranks, rules)
    with slow("errors of all layers at all ranks"):
        found, unseen = plans(
            sites,
            selected,
            budget,
            evidence,
            parameters=parameters,
            fixed=settled,
            limits=limits,
            step=round_to or 1,
        )
    way, changes = choose(found, model, trial, evidence)
    spent = {name: rank for name, rank in found[way].items() if name not in settled}
    reasons = dict.fromkeys(unseen, "did not run on the inputs")
    for name, rank in spent.items():
        worth = "worth its cost as it is" if rank is None else "its share of the budget"
        reasons[name] = f"{worth} ({way}, {evidence.source})"
    notes = []
    if evidence.samples is not None and not changes:
        notes.append(f"the outputs hold no tensors to compare plans by; {way} was taken")
    if len(changes) > 1:
        told = ", ".join(f"{change:.4f} by {other}" for other, change in changes.items())
        notes.append(f"outputs change by {told}; {way} was taken")
    return Planned(found[way], ruled.asked | spent, ruled.reasons | reasons, changes, notes)


def _settle(ruled: Plan, rules: RankRules | None) -> tuple[Plan, dict[str, Rank]]:
    """What the caller's rules leave open under a budget: settled layers, and limits of the others' ranks.

    A mapping settles what it names; any other rule is a limit, and settles layers that it cannot shrink.
    """
    if isinstance(rules, Mapping):
        return ruled, {}
    limits = {name: limit for name, limit in ruled.items() if limit is not None}
    return {name: None for name in ruled if name not in limits}, limits


def _apply_rule(planned: Planned, site: Site, rules: RankRules | None, round_to: int | None) -> None:
    """The ranks of one layer; None where they would not help."""
    rule = rule_of(site, rules)
    weight = site.layer.weight
    named = isinstance(rules, Mapping) and any(name in rules for name in site.names)
    if isinstance(rule, tuple | list) and not named and len(rule) == 2:
        sides = zip(rule, (weight.shape[1], weight.shape[0]), strict=True)
        rule = tuple(None if r is None else min(r, channels) for r, channels in sides)
    try:
        chosen = layer_rank(weight, rule)
    except ValueError as error:
        raise ValueError(f"rank of {site.name or 'the model'}: {error}") from error
    planned.asked[site.name] = chosen
    rounded = round_rank(chosen, weight.shape, round_to) if round_to else chosen
    saved = weight.numel() - costs.factor_parameters(weight.shape, rounded)
    if saved <= 0 and not named:
        planned.ranks[site.name] = None
        planned.reasons[site.name] = f"ranks {rounded[0]}/{rounded[1]} would not make it smaller"
        return
    planned.ranks[site.name] = rounded
    planned.reasons[site.name] = "explicit ranks" if isinstance(rule, tuple | list) else str(rule)


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
    in_rank, out_rank = rank
    sides = product(_neighbors(in_rank, shape[1], step), _neighbors(out_rank, shape[0], step))
    pairs = sorted(sides, key=lambda pair: -costs.factor_parameters(shape, pair))
    return next((p for p in pairs if costs.factor_parameters(shape, p) < prod(shape)), pairs[-1])


def _neighbors(rank: Side, channels: int, step: int) -> list[Side]:
    if rank is None:
        return [None]
    return [min(n, channels) for n in {-(-rank // step) * step, max(rank // step, 1) * step}]
