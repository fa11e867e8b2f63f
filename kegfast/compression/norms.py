"""BatchNorm under other inputs or other layers: its statistics re-estimated, or moved."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kegfast._util.inputs import Arguments, Inputs, call, only_input
from kegfast._util.modules import evaluation, submodule
from kegfast.extraction.moments import running_statistics

_STATE = ("training", "track_running_stats", "momentum", "num_batches_tracked", "running_mean", "running_var")


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Runs BatchNorm on each batch's own statistics, and collects these, without changing the model.

    Whatever the inputs look like, every BatchNorm then passes on channels with the means and
    variances that it learnt: activations as the layers behind it know them, even from noise.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    before = {name: {key: getattr(norm, key) for key in _STATE} for name, norm in norms.items()}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, norm: _BatchNorm, args: Arguments, out: Tensor) -> None:
        seen[name] = running_statistics(norm)

    def fresh(norm: _BatchNorm, args: Arguments, kwargs: Mapping[str, Any]) -> None:
        # With momentum 1 torch leaves the batch's own moments, at the cost of normalizing alone.
        x, known = only_input(args, kwargs), norm.running_mean
        dtype = torch.promote_types(x.dtype, torch.float32) if known is None else known.dtype
        norm.running_mean, norm.running_var = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)

    handles = [norm.register_forward_pre_hook(fresh, with_kwargs=True) for norm in norms.values()]
    handles += [norm.register_forward_hook(partial(note, name)) for name, norm in norms.items()]
    try:
        for norm in norms.values():
            norm.training, norm.track_running_stats = True, True
            norm.momentum, norm.num_batches_tracked = 1.0, None
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for name, norm in norms.items():
            for key, value in before[name].items():
                setattr(norm, key, value)


def has_norms(model: nn.Module) -> bool:
    """Whether any BatchNorm is in it."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


@torch.no_grad()
def reestimate_norms(student: nn.Module, samples: Inputs) -> bool:
    """Sets every BatchNorm's running statistics to those of the samples; False if there is none."""
    with evaluation(student), batch_statistics(student) as seen:
        call(student, samples)
    for name, (mean, variance) in seen.items():
        norm = submodule(student, name, _BatchNorm)
        if norm.running_mean is not None:
            for kept, value in zip(running_statistics(norm), (mean, variance), strict=True):
                kept.copy_(value)
    return bool(seen)


@torch.no_grad()
def look_familiar(model: nn.Module, samples: Inputs, limit: float = 0.04) -> bool:
    """Whether the samples look to a model's BatchNorms like what they were trained on.

    Real inputs reproduce the running means to about 0.02 standard deviations, generated ones
    and noise to 0.06 and more. A model without BatchNorm finds everything familiar.
    """
    with evaluation(model), batch_statistics(model) as seen:
        call(model, samples)
    shifts = []
    for name, (mean, _) in seen.items():
        norm = submodule(model, name, _BatchNorm)
        if norm.running_mean is not None:
            known_mean, known_variance = running_statistics(norm)
            shifts.append(((mean - known_mean) / (known_variance + norm.eps).sqrt()).abs().mean())
    return not shifts or float(torch.stack(shifts).mean()) < limit


@torch.no_grad()
def transfer_norms(student: nn.Module, teacher: nn.Module, samples: Inputs) -> bool:
    """Moves BatchNorm's running statistics as compression moved them on synthetic samples.

    Noise cannot say what a channel's mean is, but both models on the same noise say how far
    compression shifted it: in units of its standard deviation that shift is applied to the statistics
    that the teacher learnt from real data.
    """
    found = []
    for model in (teacher, student):
        with evaluation(model), batch_statistics(model) as seen:
            call(model, samples)
        found.append(seen)
    for name, (mean, variance) in found[1].items():
        if name not in found[0]:
            continue
        old_mean, old_variance = (part.clamp_min(0) if i else part for i, part in enumerate(found[0][name]))
        norm = submodule(student, name, _BatchNorm)
        if norm.running_mean is None:
            continue
        running_mean, running_variance = running_statistics(norm)
        learnt_mean, learnt_variance = running_statistics(submodule(teacher, name, _BatchNorm))
        old_variance = old_variance.clamp_min(1e-12)
        unit = (learnt_variance / old_variance).sqrt()
        running_mean.copy_(learnt_mean + (mean - old_mean) * unit)
        running_variance.copy_(learnt_variance * (variance / old_variance))
    return bool(found[1])
