"""What compress writes into its report: all layers first, then plans and layers, the totals last."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from kegfast.compression import costs
from kegfast.compression.allocation import Plan
from kegfast.compression.report import CompressionReport, LayerReport
from kegfast.compression.surgery import Site
from kegfast.compression.traffic import Traffic
from kegfast.decomposition.decompose import relative_error
from kegfast.decomposition.factors import Factors
from kegfast.nn import TuckerConv2d, TuckerLinear

log = logging.getLogger(__name__)


def begin(model: nn.Module, sites: Sequence[Site]) -> CompressionReport:
    """A report of a model that is as it was."""
    return CompressionReport([_entry(site) for site in sites], parameters_before=count_parameters(model))


def _entry(site: Site) -> LayerReport:
    module, size = site.module, 0
    shape: tuple[int, ...] = ()
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and not isinstance(weight, nn.UninitializedParameter):
        shape, size = tuple(weight.shape), count_parameters(module)
    return LayerReport(
        site.name,
        type(module).__name__,
        shape,
        reason=site.refusal or "",
        parameters=size,
        parameters_before=size,
        aliases=site.names[1:],
    )


def note_flops(report: CompressionReport, sites: Sequence[Site], traffic: Mapping[str, Traffic]) -> None:
    """What the dense layers cost."""
    for site in sites:
        if site.name in traffic and isinstance(site.module, nn.Conv2d | nn.Linear):
            _, dense = costs.flops(site.module, traffic[site.name])
            report[site.name].flops = report[site.name].flops_before = dense


def note_plan(report: CompressionReport, plan: Plan, settled: Plan, way: str, source: str) -> None:
    """Why each layer that the budget was spent on has its ranks, and what other plans would change."""
    for name, rank in plan.items():
        if name not in settled:
            worth = "worth its cost as it is" if rank is None else "its share of the budget"
            report[name].reason = f"{worth} ({way}, {source})"
            report[name].rank_before_rounding = rank
    if len(report.plans) > 1:
        changes = ", ".join(f"{change:.4f} by {way}" for way, change in report.plans.items())
        report.notes.append(f"outputs change by {changes}; {way} was taken")


def note_layer(
    entry: LayerReport, site: Site, layer: nn.Module, factors: Factors, traffic: Traffic | None
) -> None:
    """What became of a layer that is factored."""
    entry.rank = factors.rank
    entry.decision = "tucker" if isinstance(layer, TuckerConv2d | TuckerLinear) else "factors"
    if traffic is not None:
        cost, _ = costs.flops(site.layer, traffic)
        entry.flops = int(cost(*(np.array(side or 0) for side in factors.rank)))
    entry.error = relative_error(site.layer.weight, factors)
    entry.parameters = count_parameters(layer)


def finish(report: CompressionReport, student: nn.Module) -> None:
    """The totals."""
    report.parameters = count_parameters(student)
    if any(entry.flops_before for entry in report.layers):
        report.flops_before = sum(entry.flops_before or 0 for entry in report.layers)
        report.flops = sum(entry.flops or 0 for entry in report.layers)
    log.info("%d -> %d parameters (%.2fx)", report.parameters_before, report.parameters, report.ratio)
    for entry in report.layers:
        log.debug("%s: %s (%s)", entry.name, entry.decision, entry.reason)


def count_parameters(model: nn.Module) -> int:
    """Parameters of a module, shared ones once; those of lazy layers that have not run count as none."""
    known = (p for p in model.parameters() if not isinstance(p, nn.UninitializedParameter))
    return sum(parameter.numel() for parameter in known)
