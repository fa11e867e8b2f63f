"""The report of compress, written in one place once all is done: layer by layer, then the totals."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from kegfast.compression import costs
from kegfast.compression.choice import Measured
from kegfast.compression.planning import Planned
from kegfast.compression.report import CompressionReport, LayerReport
from kegfast.compression.surgery import Site, is_factored
from kegfast.compression.traffic import Traffic
from kegfast.decomposition.decompose import relative_error
from kegfast.nn import TuckerConv2d, TuckerLinear
from kegfast.nn.build import FactoredLayer

log = logging.getLogger(__name__)


def write(
    student: nn.Module,
    sites: Sequence[Site],
    traffic: Mapping[str, Traffic],
    planned: Planned,
    measured: Measured,
    adapted: Sequence[str],
    *,
    parameters: int,
) -> CompressionReport:
    """What became of a model's layers, and why.

    Args:
        student: the compressed model.
        sites: all layers of the original.
        traffic: the shapes at those that ran.
        planned, measured, adapted: what each step says of it, the last in notes.
        parameters: of the original.
    """
    layers = [_entry(student, site, traffic.get(site.name), planned, measured) for site in sites]
    notes = [*planned.notes, *measured.notes, *adapted]
    report = CompressionReport(
        layers, latency=measured.latency, plans=planned.changes, notes=notes, parameters_before=parameters
    )
    report.parameters = count_parameters(student)
    if any(entry.flops_before for entry in layers):
        report.flops_before = sum(entry.flops_before or 0 for entry in layers)
        report.flops = sum(entry.flops or 0 for entry in layers)
    log.info("%d -> %d parameters (%.2fx)", report.parameters_before, report.parameters, report.ratio)
    for entry in layers:
        log.debug("%s: %s (%s)", entry.name, entry.decision, entry.reason)
    return report


def _entry(
    student: nn.Module, site: Site, traffic: Traffic | None, planned: Planned, measured: Measured
) -> LayerReport:
    entry = _as_it_was(site, traffic)
    if site.refusal is not None:
        return entry
    reasons = [planned.reasons.get(site.name, ""), *measured.reasons.get(site.name, [])]
    entry.reason = "; ".join(filter(None, reasons))
    entry.rank_before_rounding = planned.asked.get(site.name)
    entry.latency = measured.layers.get(site.name, {})
    layer = student.get_submodule(site.name)
    if is_factored(layer):
        _note_factors(entry, site, layer, traffic)
    return entry


def _as_it_was(site: Site, traffic: Traffic | None) -> LayerReport:
    module, size = site.module, 0
    shape: tuple[int, ...] = ()
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and not isinstance(weight, nn.UninitializedParameter):
        shape, size = tuple(weight.shape), count_parameters(module)
    flops = None
    if traffic is not None and isinstance(module, nn.Conv2d | nn.Linear):
        _, flops = costs.flops(module, traffic)
    return LayerReport(
        site.name,
        type(module).__name__,
        shape,
        reason=site.refusal or "",
        parameters=size,
        parameters_before=size,
        flops=flops,
        flops_before=flops,
        aliases=site.names[1:],
    )


def _note_factors(entry: LayerReport, site: Site, layer: FactoredLayer, traffic: Traffic | None) -> None:
    factors = layer.factors
    entry.rank = factors.rank
    entry.decision = "tucker" if isinstance(layer, TuckerConv2d | TuckerLinear) else "factors"
    if traffic is not None:
        cost, _ = costs.flops(site.layer, traffic)
        entry.flops = int(cost(*(np.array(side or 0) for side in factors.rank)))
    entry.error = relative_error(site.layer.weight, factors)
    entry.parameters = count_parameters(layer)


def count_parameters(model: nn.Module) -> int:
    """Parameters of a module, shared ones once; those of lazy layers that have not run count as none."""
    known = (p for p in model.parameters() if not isinstance(p, nn.UninitializedParameter))
    return sum(parameter.numel() for parameter in known)
