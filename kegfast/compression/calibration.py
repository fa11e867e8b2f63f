"""What a model's inputs say about its layers: error metrics, BatchNorm statistics, refitted factors."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from kegfast.check import accepts, expected
from kegfast.compression.decompose import Metric
from kegfast.compression.surgery import Site, factored_layers, tail_of

Inputs = tuple[Tensor, ...]

CHUNK = 64
"""Samples that run at once wherever BatchNorm's own statistics are not in play."""


@dataclass
class Traffic:
    """What passed through one layer: shapes for one batch."""

    inputs: tuple[int, ...]  # (N, C, H, W) or (..., C)
    outputs: tuple[int, ...]


def gather(calibration: Any, n: int) -> Tensor:
    """n unlabelled samples from a tensor, a Dataset, a DataLoader or anything with `.sample(n)`."""
    if isinstance(calibration, Tensor):
        samples = calibration[:n]
    elif callable(getattr(calibration, "sample", None)):
        drawn = calibration.sample(n)
        samples = drawn[0] if isinstance(drawn, tuple | list) else drawn
    elif isinstance(calibration, DataLoader | Dataset):
        loader = (
            calibration
            if isinstance(calibration, DataLoader)
            else DataLoader(calibration, batch_size=n, shuffle=True)
        )
        batches, count = [], 0
        for batch in loader:
            batches.append(batch[0] if isinstance(batch, tuple | list) else batch)
            count += len(batches[-1])
            if count >= n:
                break
        samples = torch.cat(batches)[:n] if batches else torch.empty(0)
    else:
        what = "a tensor, a Dataset, a DataLoader or an object with .sample(n)"
        raise TypeError(expected("calibration", what, calibration))
    if len(samples) < 2 or not bool(samples.isfinite().all()):
        raise ValueError(expected("calibration", "at least two finite samples", samples))
    return samples.detach()


def probes(shape: Sequence[int]) -> Tensor:
    """Noise of all scales in the shape of one input, for where no sample is at hand.

    White noise excites images' first layers in one narrow way; sums of noise at several resolutions
    have the falling spectrum of natural images.

    Args:
        shape: of one sample, without the batch.

    Returns:
        (n, *shape) samples with zero mean and unit variance each, the same on every call.
    """
    size = int(torch.tensor(shape).prod())
    n = max(8, min(256, (1 << 20) // size))
    generator = torch.Generator().manual_seed(0)
    if len(shape) != 3 or min(shape[1:]) < 4:
        return torch.randn((n, *shape), generator=generator)
    total = torch.zeros((n, *shape))
    levels = max(shape[1:]).bit_length()
    for level in range(1, levels):
        coarse = torch.randn((n, shape[0], 1 << level, 1 << level), generator=generator)
        weight = torch.rand((n, 1, 1, 1), generator=generator) * 2 ** ((levels - level) / 2)
        total += weight * F.interpolate(coarse, size=tuple(shape[1:]), mode="bicubic")
    total -= total.mean((2, 3), keepdim=True) / 2
    return total / total.std((1, 2, 3), keepdim=True)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Runs BatchNorm on each batch's own statistics, and collects these, without changing the model.

    Whatever the inputs look like, every BatchNorm then passes on channels with the means and
    variances that it learnt: activations as the layers behind it know them, even from noise.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    before = {name: (m.training, m.track_running_stats) for name, m in norms.items()}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(norm: nn.Module, args: Inputs) -> None:
            dims = [d for d in range(args[0].dim()) if d != 1]
            variance, mean = torch.var_mean(args[0].detach().float(), dims)
            seen[name] = mean, variance

        return hook

    handles = [norm.register_forward_pre_hook(note(name)) for name, norm in norms.items()]
    try:
        for norm in norms.values():
            norm.training, norm.track_running_stats = True, False
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for name, norm in norms.items():
            norm.training, norm.track_running_stats = before[name]


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; each module gets its own mode back."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@torch.no_grad()
def trace(model: nn.Module, sites: Sequence[Site], inputs: Inputs) -> dict[str, Traffic]:
    """Runs the model once and notes the shapes at every site that ran.

    Raises:
        ValueError: the model does not take `inputs`.
    """
    traffic: dict[str, Traffic] = {}
    handles = []
    for site in sites:

        def note(_: nn.Module, args: Inputs, out: Tensor, name: str = site.name) -> None:
            traffic[name] = Traffic(tuple(args[0].shape), tuple(out.shape))

        handles.append(site.module.register_forward_hook(note))
    try:
        with evaluation(model), accepts("example_input", inputs[0] if len(inputs) == 1 else inputs):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return traffic


def _rows(x: Tensor, linear: bool) -> Tensor:  # (N, C, H, W) or (..., C) -> (rows, C)
    return x.flatten(0, -2) if linear else x.movedim(1, -1).flatten(0, -2)


def metrics(
    model: nn.Module, sites: Sequence[Site], samples: Tensor, *, synthetic: bool, draws: int = 8
) -> dict[str, Metric]:
    """What an error of each layer's weight does to the model's output (a Kronecker-factored Hessian).

    The squared change of the outputs, to first order and with neighbouring pixels taken as
    independent (cf. Martens and Grosse 2015), is tr(G dW A dW^T): A the covariance of the layer's
    input channels, G the second moments of the gradients of random projections of the output. The
    mean is left out of A, since BatchNorm or the bias can take up a constant.

    Args:
        model: the teacher, unchanged.
        sites: layers to look at.
        samples: (n, ...) inputs.
        synthetic: whether BatchNorm should use the samples' own statistics, as noise needs.
        draws: random projections of the output.

    Returns:
        A metric for every site that ran, all in the same unit.
    """
    gathered: dict[str, list[Tensor]] = {}
    handles = []
    for site in sites:

        def forward(module: nn.Module, args: Inputs, out: Tensor, name: str = site.name) -> None:
            linear = isinstance(module, nn.Linear)
            rows = _rows(args[0].detach(), linear).float()
            zero = rows.new_zeros(())
            sums = gathered.setdefault(name, [zero, zero, zero, zero])
            sums[0] = sums[0] + rows.T @ rows
            sums[1] = sums[1] + rows.sum(0)
            sums[2] = sums[2] + len(rows)

            def backward(gradient: Tensor) -> None:
                gradient = _rows(gradient, linear).float()
                sums[3] = sums[3] + gradient.T @ gradient

            out.register_hook(backward)

        handles.append(site.module.register_forward_hook(forward))
    rng = torch.Generator(device=samples.device).manual_seed(0)
    chunks = [samples] if synthetic else samples.split(CHUNK)
    frozen = copy.copy(list(model.parameters()))
    required = [parameter.requires_grad for parameter in frozen]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with evaluation(model), torch.enable_grad():
            for chunk in chunks:
                chunk = chunk.clone().requires_grad_(True)
                if synthetic:
                    with batch_statistics(model):
                        outputs = _tensors(model(chunk))
                else:
                    outputs = _tensors(model(chunk))
                for draw in range(draws):
                    noise = [torch.randn(o.shape, generator=rng, device=o.device) for o in outputs]
                    torch.autograd.backward(
                        outputs,
                        [v.to(o) for v, o in zip(noise, outputs, strict=True)],
                        retain_graph=draw < draws - 1,
                    )
    finally:
        for handle in handles:
            handle.remove()
        for parameter, grad in zip(frozen, required, strict=True):
            parameter.requires_grad_(grad)
    found = {}
    for name, (square, total, count, gradients) in gathered.items():
        mean = total / count
        output = gradients / (draws * len(samples))
        if output.dim() == 2:
            found[name] = Metric(square / count - mean[:, None] * mean, output)
    return found


def _tensors(output: Any) -> list[Tensor]:
    """The differentiable tensors in whatever a model returns."""
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    if isinstance(output, Mapping):
        output = output.values()
    if isinstance(output, Sequence) or hasattr(output, "__iter__"):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


@torch.no_grad()
def reestimate_norms(student: nn.Module, samples: Tensor) -> bool:
    """Sets every BatchNorm's running statistics to those of the samples; False if there is none."""
    with evaluation(student), batch_statistics(student) as seen:
        student(samples)
    for name, (mean, variance) in seen.items():
        norm = student.get_submodule(name)
        if norm.running_mean is not None:
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
    return bool(seen)


@torch.no_grad()
def look_familiar(model: nn.Module, samples: Tensor, limit: float = 0.04) -> bool:
    """Whether the samples look to a model's BatchNorms like what they were trained on.

    Real inputs reproduce the running means to about 0.02 standard deviations, generated ones
    and noise to 0.06 and more. A model without BatchNorm finds everything familiar.
    """
    with evaluation(model), batch_statistics(model) as seen:
        model(samples)
    shifts = []
    for name, (mean, _) in seen.items():
        norm = model.get_submodule(name)
        if norm.running_mean is not None:
            deviation = (norm.running_var + norm.eps).sqrt()
            shifts.append(((mean - norm.running_mean) / deviation).abs().mean())
    return not shifts or float(torch.stack(shifts).mean()) < limit


@torch.no_grad()
def transfer_norms(student: nn.Module, teacher: nn.Module, samples: Tensor) -> bool:
    """Moves BatchNorm's running statistics as compression moved them on synthetic samples.

    Noise cannot say what a channel's mean is, but both models on the same noise say how far
    compression shifted it: in units of its standard deviation that shift is applied to the statistics
    that the teacher learnt from real data.
    """
    found = []
    for model in (teacher, student):
        with evaluation(model), batch_statistics(model) as seen:
            model(samples)
        found.append(seen)
    for name, (mean, variance) in found[1].items():
        if name not in found[0]:
            continue
        old_mean, old_variance = (part.clamp_min(0) if i else part for i, part in enumerate(found[0][name]))
        norm, source = student.get_submodule(name), teacher.get_submodule(name)
        if norm.running_mean is None:
            continue
        old_variance = old_variance.clamp_min(1e-12)
        unit = (source.running_var / old_variance).sqrt()
        norm.running_mean.copy_(source.running_mean + (mean - old_mean) * unit)
        norm.running_var.copy_(source.running_var * (variance / old_variance))
    return bool(found[1])


class _Reached(Exception):
    """Ends a forward pass at the layer whose input is wanted."""


@torch.no_grad()
def refit(
    student: nn.Module, teacher: nn.Module, samples: Tensor, *, rows: int = 1 << 14, ridge: float = 1e-3
) -> None:
    """Solves each factored layer's last factor and bias anew, from the first layer to the last.

    Least squares, in closed form: the layer sees what the student's earlier layers now send it, and
    answers as close as it can to what the teacher's layer sent (cf. Zhang et al. 2016, asymmetric
    reconstruction). So each layer also undoes errors of those before it.

    Args:
        student: changed in place.
        teacher: the original, with dense layers under the same names.
        samples: (n, ...) inputs.
        rows: at most so many pixels (rows of a Linear) enter each regression.
        ridge: pull towards the factor as it is, relative to the mean square of its inputs.
    """
    targets: dict[str, tuple[Tensor, Tensor]] = {}  # in the order of execution
    handles = []
    generator = torch.Generator().manual_seed(0)
    for name, _ in factored_layers(student):

        def keep(module: nn.Module, args: Inputs, out: Tensor, name: str = name) -> None:
            out = _rows(out, isinstance(module, nn.Linear))
            picked = torch.randperm(len(out), generator=generator)[:rows].to(out.device)
            targets[name] = picked, out[picked]

        handles.append(teacher.get_submodule(name).register_forward_hook(keep))
    try:
        with evaluation(teacher), batch_statistics(teacher):
            teacher(samples)
    finally:
        for handle in handles:
            handle.remove()
    for name, (picked, target) in targets.items():
        layer = student.get_submodule(name)
        found = _tail_inputs(layer, _input_of(student, layer, samples))
        if found is not None:
            _solve(tail_of(layer), found[picked].double(), target.double(), ridge)


def _input_of(model: nn.Module, layer: nn.Module, samples: Tensor) -> Tensor:
    caught: list[Tensor] = []

    def stop(_: nn.Module, args: Inputs) -> None:
        caught.append(args[0])
        raise _Reached

    handle = layer.register_forward_pre_hook(stop)
    try:
        with evaluation(model), batch_statistics(model):
            model(samples)
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]


def _tail_inputs(layer: nn.Module, x: Tensor) -> Tensor | None:
    """What the last factor of a layer multiplies, one row per output pixel; None if not expressible."""
    linear = isinstance(layer.core, nn.Linear)
    if (first := getattr(layer, "first", None)) is not None:
        x = first(x)
    core = layer.core
    if getattr(layer, "last", None) is not None:
        return _rows(core(x), linear)
    if linear:
        return _rows(x, True)
    if core.padding_mode != "zeros" or isinstance(core.padding, str):
        return None
    patches = F.unfold(x, core.kernel_size, core.dilation, core.padding, core.stride)
    return patches.movedim(1, -1).flatten(0, -2)


def _solve(
    tail: nn.Module,
    inputs: Tensor,  # (rows, D)
    targets: Tensor,  # (rows, K)
    ridge: float,
) -> None:
    old = tail.weight.flatten(1).double()
    mean, goal = inputs.mean(0), targets.mean(0)
    if tail.bias is None:
        mean, goal = torch.zeros_like(mean), torch.zeros_like(goal)
    centred = inputs - mean
    gram = centred.T @ centred
    pull = ridge * gram.diagonal().mean()
    gram.diagonal().add_(pull)
    solution, info = torch.linalg.solve_ex(gram, centred.T @ (targets - goal) + pull * old.T)
    if int(info) or not bool(solution.isfinite().all()):  # a layer that sees constant input
        return
    tail.weight.copy_(solution.T.reshape(tail.weight.shape))
    if tail.bias is not None:
        tail.bias.copy_(goal - solution.T @ mean)
