"""What is known about a model beyond its weights: shapes, samples, how much each layer's errors matter."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from kegfast._util.check import expected
from kegfast._util.inputs import Inputs, as_inputs, copied, each, tensors_in, to_like
from kegfast.compression.decompose import Metric
from kegfast.compression.matching import match_statistics
from kegfast.compression.norms import look_familiar
from kegfast.compression.samples import gather, of_every_class, probes
from kegfast.compression.sensitivity import metrics
from kegfast.compression.surgery import Site
from kegfast.compression.traffic import Traffic, trace


@dataclass
class Evidence:
    """Empty where the caller gave neither inputs nor their shape."""

    example: Inputs | None = None
    samples: Inputs | None = None  # real, generated or noise
    probes: bool = False  # the samples are noise
    synthetic: bool = False  # at first they did not look to BatchNorm like what it was trained on
    traffic: dict[str, Traffic] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Where the errors' weights come from, in two words."""
        return "on noise" if self.probes else "on the inputs" if self.metrics else "by weight"


def collect(
    model: nn.Module,
    sites: Sequence[Site],
    selected: Sequence[Site],
    *,
    budget: bool,
    example_input: Any,
    calibration: Any,
    samples: int,
) -> Evidence:
    """Runs the model as far as the arguments of `compress` allow."""
    evidence = Evidence()
    if example_input is not None:
        evidence.example = copied(as_inputs("example_input", example_input, alike=False))
        if not all(part.numel() and bool(part.isfinite().all()) for part in tensors_in(evidence.example)):
            raise ValueError(expected("example_input", "of finite values, one at least", example_input))
        evidence.traffic = trace(model, sites, evidence.example)
    if calibration is not None:
        evidence.samples = gather(calibration, samples, model)
    elif budget and evidence.example is not None:
        evidence.samples = _noise_like(evidence, sites)
        evidence.probes = evidence.synthetic = evidence.samples is not None
    if evidence.samples is not None:
        evidence.samples = copied(to_like(evidence.samples, next(model.parameters())))
        if not evidence.probes and not look_familiar(model, evidence.samples):
            evidence.synthetic = True
            evidence.samples = match_statistics(model, evidence.samples)
        elif not evidence.probes:
            evidence.samples = of_every_class(model, evidence.samples, calibration)
        if budget:
            evidence.metrics = metrics(model, selected, evidence.samples, noise=evidence.probes)
    return evidence


def _noise_like(evidence: Evidence, sites: Sequence[Site]) -> Inputs | None:
    """Noise in the shape of the example; None where that is no batch of one tensor of numbers."""
    (example, *more) = tensors_in(evidence.example)
    calls = [(site, evidence.traffic[site.name]) for site in sites if site.name in evidence.traffic]
    alone = any(isinstance(site.module, nn.Conv2d) and len(seen.inputs[0]) == 3 for site, seen in calls)
    if more or alone or not example.is_floating_point():
        return None
    return each(lambda x: probes(x.shape[1:]), evidence.example)
