"""What is known about a model beyond its weights: shapes, samples, how much each layer's errors matter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from kegfast._util.check import expected
from kegfast._util.inputs import Inputs, as_inputs, copied, each, tensors_in, to_like
from kegfast.compression.matching import match_statistics
from kegfast.compression.norms import look_familiar
from kegfast.compression.samples import gather, of_every_class, probes
from kegfast.compression.sensitivity import metrics
from kegfast.compression.surgery import Site
from kegfast.compression.traffic import Traffic, trace
from kegfast.decomposition.decompose import Metric


@dataclass
class Samples:
    """Inputs that models are compared and adapted on."""

    inputs: Inputs  # real, generated or noise
    probes: bool = False  # they are noise
    synthetic: bool = False  # at first they did not look to BatchNorm like what it was trained on


@dataclass
class Evidence:
    """Empty where the caller gave neither inputs nor their shape."""

    example: Inputs | None = None
    samples: Samples | None = None
    traffic: dict[str, Traffic] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Where the errors' weights come from, in two words."""
        if self.samples is not None and self.samples.probes:
            return "on noise"
        return "on the inputs" if self.metrics else "by weight"


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
        evidence.samples = _drawn(model, calibration, samples)
    elif budget and evidence.example is not None:
        noise = _noise_like(evidence.example, evidence.traffic, sites)
        if noise is not None:
            evidence.samples = Samples(_beside(model, noise), probes=True, synthetic=True)
    if budget and (found := evidence.samples) is not None:
        evidence.metrics = metrics(model, selected, found.inputs, noise=found.probes)
    return evidence


def _drawn(model: nn.Module, calibration: Any, n: int) -> Samples:
    """What the caller gave to calibrate with, as the model knows its data."""
    inputs = _beside(model, gather(calibration, n, model))
    if look_familiar(model, inputs):
        return Samples(of_every_class(model, inputs, calibration))
    return Samples(match_statistics(model, inputs), synthetic=True)


def _beside(model: nn.Module, inputs: Inputs) -> Inputs:
    """A copy on the model's device and in its dtype."""
    return copied(to_like(inputs, next(model.parameters())))


def _noise_like(example: Inputs, traffic: Mapping[str, Traffic], sites: Sequence[Site]) -> Inputs | None:
    """Noise in the shape of the example; None where that is no batch of one tensor of numbers."""
    (first, *more) = tensors_in(example)
    calls = [(site, traffic[site.name]) for site in sites if site.name in traffic]
    alone = any(isinstance(site.module, nn.Conv2d) and len(seen.inputs[0]) == 3 for site, seen in calls)
    if more or alone or not first.is_floating_point():
        return None
    return each(lambda x: probes(x.shape[1:]), example)
