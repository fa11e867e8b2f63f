"""Whose ranks to take: several ways to spend one budget, and the one that changes the outputs least."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from kegfast._util.inputs import call, split
from kegfast._util.modules import evaluation
from kegfast.compression import costs
from kegfast.compression.budget import Cost, Option, Rank, Table, allocate, settled, tabulate
from kegfast.compression.evidence import Evidence, Samples
from kegfast.compression.norms import batch_statistics
from kegfast.compression.surgery import Site
from kegfast.compression.traffic import tensors_of
from kegfast.decomposition.decompose import Metric, whiten
from kegfast.decomposition.ranks import RankRule, layer_rank, spectra

log = logging.getLogger(__name__)

STEPS = 12
"""Halvings of the interval in which a uniform share or energy is sought."""
CHUNK = 64
"""Samples that run at once."""

WEIGHINGS = {
    "sensitivity": {
        "sensitivity": 0.0,
        "half relative sensitivity": 0.5,
        "mostly relative sensitivity": 2 / 3,
        "relative sensitivity": 1.0,
    },
    "error": {"error": 0.0, "relative error": 1.0},
}
"""For each kind of error the ways to count it, and the power of each layer's own size that it is divided by.

Sensitivity is true of small errors; large ones hurt beyond it, which the relative ones foresee.
"""

USUAL = "mostly relative sensitivity"
"""Seldom far from the best plan on real inputs."""
ROUGH = 0.1
"""Such a share of the change of outputs is below what made samples can tell."""

Plan = dict[str, Rank | None]
"""The ranks of each layer; None stays dense."""


class OutOfBudget(ValueError):
    """A budget below what the cheapest ranks cost; `least` is that fraction."""

    def __init__(self, message: str, least: float):
        super().__init__(message)
        self.least = least


def plans(
    sites: Sequence[Site],
    selected: Sequence[Site],
    budget: Mapping[str, float],
    evidence: Evidence,
    *,
    parameters: int,
    fixed: Plan,
    limits: Mapping[str, Rank],
    step: int = 1,
) -> tuple[dict[str, Plan], list[str]]:
    """Every way to spend the budget, by its name, and the layers that did not run.

    Args:
        sites: all layers of the model.
        selected: those that may be factored.
        budget: kind and fraction of the whole model.
        evidence: traffic for budgets other than of parameters, and metrics of the errors, if any.
        parameters: of the whole model.
        fixed: layers whose ranks the caller named.
        limits: pairs that layers' ranks may not exceed.
        step: multiples that ranks must be.

    Returns:
        "sensitivity" (what an error does to the outputs), "relative sensitivity" (the same as a share of
        each layer's all), two between them, "error" (of the weight), "relative error", and "ratio" and
        "energy", one number for all layers. Without metrics there is "relative error" alone: nothing could
        tell plans apart.

    Raises:
        OutOfBudget: the budget is below what the cheapest ranks cost.
    """
    kind, fraction = next(iter(budget.items()))
    total = spent = float(parameters) if kind == "params" else 0.0
    chosen = {site.name for site in selected}
    priced: dict[str, tuple[Site, Cost, float]] = {}
    unseen: list[str] = []
    for site in sites:
        counts = kind in ("flops", "memory") and isinstance(site.module, nn.Conv2d | nn.Linear)
        found = price(kind, site, evidence) if counts or site.name in chosen else None
        if found is None:
            continue
        cost, dense = found
        if site.name not in chosen:
            total, spent = total + dense, spent + dense
            continue
        if kind == "params":
            spent -= dense
        else:
            total += dense
        if evidence.metrics and site.name not in evidence.metrics and site.name not in fixed:
            unseen.append(site.name)
            spent += dense
            continue
        priced[site.name] = site, cost, dense
    tables = _tables(priced, evidence.metrics, fixed, limits, step)
    first = next(iter(tables.values()), {})
    least = spent + sum(table.costs.min() for table in first.values())
    if least > fraction * total:
        count = f" ({least:,.0f} parameters)" if kind == "params" else ""
        message = (
            f"budget[{kind!r}] must be at least {least / total:.4f}{count} for this model, of whose "
            f"{len(sites)} layers {len(priced)} can be factored, got {fraction:.4f}"
        )
        raise OutOfBudget(message, least / total)
    ways = {way: allocate(own, fraction * total - spent) for way, own in tables.items()}
    if evidence.metrics:
        weights = {name: site.layer.weight for name, (site, _, _) in priced.items()}
        ways |= _uniform_plans(weights, first, fraction * total - spent)
    ranks = {way: {name: option.rank for name, option in options.items()} for way, options in ways.items()}
    return ranks, unseen


def price(kind: str, site: Site, evidence: Evidence) -> tuple[Cost, float] | None:
    """What a layer costs at each pair of ranks, and as it is; None where that is unknown: it did not run."""
    layer = site.layer
    if kind == "params":
        return costs.parameters(layer.weight.shape), layer.weight.numel()
    seen, example = evidence.traffic.get(site.name), evidence.example
    if seen is None or example is None:
        return None
    if kind == "latency":
        return costs.latency(site, seen, example, seconds=0.1)
    return costs.flops(layer, seen) if kind == "flops" else costs.memory(layer, seen)


def _tables(
    priced: Mapping[str, tuple[Site, Cost, float]],
    metrics: Mapping[str, Metric],
    fixed: Plan,
    limits: Mapping[str, Rank],
    step: int,
) -> dict[str, dict[str, Table]]:
    """Tables of all layers for each way to weigh errors."""
    ways: dict[str, dict[str, Table]] = {}
    for name, (site, cost, dense) in priced.items():
        weight = site.layer.weight
        for kind, shares in WEIGHINGS.items():
            if kind == "sensitivity" and not metrics:
                continue
            metric = metrics.get(name) if kind == "sensitivity" else None
            if name in fixed:
                table, size = settled(fixed[name], _price_of(fixed[name], cost, dense)), 1.0
            else:
                white = whiten(weight, metric)
                table = tabulate(white, cost, dense, step=step)
                table = table.capped(limits[name]) if name in limits else table
                size = max(float(white.square().sum()), 1e-30)
            for way, share in shares.items():
                if metrics or way == "relative error":
                    ways.setdefault(way, {})[name] = table.scaled(size**-share)
    return ways


def _price_of(rank: Rank | None, cost: Cost, dense: float) -> float:
    """Of ranks that the caller named; as much as the dense layer where nothing like it was measured."""
    price = dense if rank is None else float(cost(*(np.array(side or 0) for side in rank)))
    return price if np.isfinite(price) else dense


def _uniform_plans(
    weights: Mapping[str, Tensor], tables: Mapping[str, Table], budget: float
) -> Iterator[tuple[str, dict[str, Option]]]:
    """The highest share of channels, and of energy, at which all layers together fit the budget."""
    values = {name: spectra(weight) for name, weight in weights.items()}
    rules: dict[str, Callable[[float], RankRule]] = {"ratio": float, "energy": "energy={}".format}
    for way, rule in rules.items():

        def spend(number: float, rule: Callable[[float], RankRule] = rule) -> dict[str, Option]:
            ranks = {name: layer_rank(w, rule(number), values[name]) for name, w in weights.items()}
            return {name: tables[name].capped(rank).dearest() for name, rank in ranks.items()}

        found, low, high = None, 0.0, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            options = spend(middle)
            if sum(option.cost for option in options.values()) <= budget:
                found, low = options, middle
            else:
                high = middle
        if found is not None:
            yield way, found


def choose(
    found: Mapping[str, Plan], teacher: nn.Module, trial: Callable[[Plan], nn.Module], evidence: Evidence
) -> tuple[str, dict[str, float]]:
    """The plan whose student's outputs are closest to the teacher's, and how far each plan's are.

    Made samples judge roughly: what they find nearly as good as the best loses to `USUAL`.

    Args:
        found: plans by name.
        teacher: the original.
        trial: makes a plan's student.
        evidence: the inputs; without any the first plan is taken, and where the outputs hold no tensors.
    """
    samples = evidence.samples
    outputs = [] if samples is None else outputs_of(teacher, samples)
    if samples is None or not outputs:
        return next(iter(found)), {}
    distances: dict[str, float] = {}
    for way, plan in found.items():
        same = next((other for other in distances if found[other] == plan), None)
        distances[way] = distances[same] if same else distance(outputs, outputs_of(trial(plan), samples))
        log.info("ranks by %s: outputs change by %.4f", way, distances[way])
    best = min(distances, key=distances.__getitem__)
    if samples.synthetic and distances.get(USUAL, math.inf) <= (1 + ROUGH) * distances[best]:
        best = USUAL
    return best, distances


@torch.no_grad()
def outputs_of(model: nn.Module, samples: Samples) -> list[Tensor]:
    """The model's outputs over all samples, one tensor each; on noise by the batch's statistics."""
    with evaluation(model):
        if samples.probes:
            with batch_statistics(model):
                return [part.float() for part in tensors_of(call(model, samples.inputs))]
        chunks = [tensors_of(call(model, chunk)) for chunk in split(samples.inputs, CHUNK)]
    return [torch.cat(parts).float() for parts in zip(*chunks, strict=True)]


def distance(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Squared error of the outputs, as a share of their own variance; plus the share of other answers.

    The answer is the largest output, where they are one table as a classifier's. By squares alone a plan
    wins that leaves out all but a few directions of the logits, and with them the classes in between.
    """
    error = sum(float((a - b).square().sum()) for a, b in zip(wanted, found, strict=True))
    size = sum(float((a - a.mean(0)).square().sum()) for a in wanted)
    share = error / max(size, 1e-30)
    if len(wanted) == 1 and wanted[0].dim() == 2 and wanted[0].shape[1] > 1:
        share += float((wanted[0].argmax(1) != found[0].argmax(1)).float().mean())
    return share if math.isfinite(share) else math.inf
