"""Factors and biases solved anew: each layer answers for what the ranks took away before it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kegfast._util.inputs import Arguments, Inputs, call, copied, only_input
from kegfast._util.modules import evaluation
from kegfast.compression.norms import batch_statistics
from kegfast.compression.surgery import as_dense, factored_layers
from kegfast.compression.traffic import rows_of
from kegfast.decomposition.decompose import Metric
from kegfast.nn.build import FactoredLayer
from kegfast.nn.factors import Dense


@torch.no_grad()
def refit(
    student: nn.Module,
    teacher: nn.Module,
    samples: Inputs,
    metrics: Mapping[str, Metric] | None = None,
    *,
    rows: int = 1 << 14,
    ridge: tuple[float, float] = (1e-3, 0.1),
) -> None:
    """Solves each factored layer's last factors and bias anew, from the first layer to the last, in one pass.

    Least squares, in closed form: the layer sees what the student's earlier layers now send it, and
    answers as close as it can to what the teacher's layer sent (cf. Zhang et al. 2016, asymmetric
    reconstruction). So each layer also undoes errors of those before it. Where a metric tells what errors of
    the outputs cost, the last two factors are solved at once, as the best product of their rank (reduced-rank
    regression, Izenman 1975); else the last alone. A layer that runs several times is solved before its first
    call.

    Args:
        student: changed in place.
        teacher: the original, with dense layers under the same names.
        samples: n inputs.
        metrics: of layers, by name; see `sensitivity.metrics`.
        rows: at most so many pixels (rows of a Linear) enter each regression.
        ridge: pull towards the factors as they are, or the teacher's weight where all factors are solved,
            relative to the mean square of the inputs: of one factor, and of two, which fit more by chance.
    """
    targets: dict[str, tuple[Tensor, Tensor]] = {}
    generator = torch.Generator().manual_seed(0)

    def keep(name: str, module: nn.Module, args: Arguments, out: Tensor) -> None:
        if name not in targets:
            out = rows_of(out, isinstance(module, nn.Linear))
            picked = torch.randperm(len(out), generator=generator)[:rows].to(out.device)
            targets[name] = picked, out[picked]

    def solve(name: str, layer: FactoredLayer, args: Arguments, kwargs: Mapping[str, Any]) -> None:
        if name not in targets:
            return
        picked, target = targets.pop(name)
        metric = (metrics or {}).get(name)
        before, solved = _split(layer, alone=metric is None)
        x = only_input(args, kwargs)
        for part in before:
            x = part(x)
        dense = as_dense(teacher.get_submodule(name))
        prior = _product(solved) if before else dense.weight.flatten(1).double()
        _solve(solved, _inputs(solved[0], x, picked), target.double(), prior, metric, ridge[len(solved) - 1])

    names = [name for name, _ in factored_layers(student)]
    handles = [teacher.get_submodule(n).register_forward_hook(partial(keep, n)) for n in names]
    handles += [
        student.get_submodule(n).register_forward_pre_hook(partial(solve, n), with_kwargs=True) for n in names
    ]
    try:
        for model in (teacher, student):
            with evaluation(model), batch_statistics(model):
                call(model, copied(samples))
    finally:
        for handle in handles:
            handle.remove()


def _split(layer: FactoredLayer, alone: bool) -> tuple[list[Dense], list[Dense]]:
    """The parts of a layer that stay, and those to be solved: the last one or, if that is a matrix, two."""
    parts = [*layer._parts]
    weight = parts[-1].weight
    count = 1 if alone or weight[0, 0].numel() > 1 or weight.shape[1] > len(weight) else 2
    return parts[:-count], parts[-count:]


def _product(parts: list[Dense]) -> Tensor:  # (K, D)
    weights = [part.weight.flatten(1).double() for part in parts]
    return weights[0] if len(weights) == 1 else weights[1] @ weights[0]


def _inputs(part: Dense, x: Tensor, picked: Tensor) -> Tensor:  # (rows, D)
    """What a part's weight multiplies, flattened, for the picked rows of its output."""
    if isinstance(part, nn.Linear):
        return rows_of(x, True)[picked].double()
    x = x if x.dim() == 4 else x[None]
    x = F.pad(x, _pads(part), "constant" if part.padding_mode == "zeros" else part.padding_mode)
    spans = [d * (k - 1) + 1 for d, k in zip(part.dilation, part.kernel_size, strict=True)]
    height, width = ((n - span) // s + 1 for n, span, s in zip(x.shape[2:], spans, part.stride, strict=True))
    image, pixel = picked // (height * width), picked % (height * width)
    taps = [
        place[:, None] * s + d * torch.arange(k, device=x.device)
        for place, s, d, k in zip(
            (pixel // width, pixel % width), part.stride, part.dilation, part.kernel_size, strict=True
        )
    ]
    found = x.permute(0, 2, 3, 1)[image[:, None, None], taps[0][:, :, None], taps[1][:, None, :]]
    return found.permute(0, 3, 1, 2).flatten(1).double()


def _pads(conv: nn.Conv2d) -> list[int]:
    """Left, right, top and bottom; "same" pads the odd pixel behind."""
    if isinstance(conv.padding, str):
        same = conv.padding == "same"
        both = [d * (k - 1) * same for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    else:
        both = [2 * side for side in conv.padding]
    (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in both)
    return [left, right, top, bottom]


def _solve(
    parts: list[Dense],
    inputs: Tensor,  # (rows, D)
    targets: Tensor,  # (rows, K)
    prior: Tensor,  # (K, D)
    metric: Metric | None,
    ridge: float,
) -> None:
    tail = parts[-1]
    mean, goal = inputs.mean(0), targets.mean(0)
    if tail.bias is None:
        mean, goal = torch.zeros_like(mean), torch.zeros_like(goal)
    centered = inputs - mean
    gram = centered.T @ centered
    pull = ridge * gram.diagonal().mean()
    gram.diagonal().add_(pull)
    solution, info = torch.linalg.solve_ex(gram, centered.T @ (targets - goal) + pull * prior.T)
    if int(info) or not bool(solution.isfinite().all()):  # a layer that sees constant input
        return
    weights = [solution.T]
    if len(parts) == 2 and metric is not None:
        weights = _best_product(solution.T, gram, metric, tail.weight.shape[1])
    for part, weight in zip(parts, weights, strict=True):
        part.weight.copy_(weight.reshape(part.weight.shape))
    if tail.bias is not None:
        tail.bias.copy_(goal - _product(parts) @ mean)


def _best_product(
    weight: Tensor,  # (K, D)
    gram: Tensor,  # (D, D) of the inputs
    metric: Metric,
    rank: int,
) -> list[Tensor]:  # (rank, D), (K, rank)
    """The two factors of that rank whose product's outputs cost least beside those of the weight."""
    root, inverse = (part.double() for part in metric.roots[1])
    white = root.T @ weight
    outputs = white @ gram @ white.T
    leading = torch.linalg.eigh((outputs + outputs.T) / 2).eigenvectors[:, -rank:]
    head, tail = leading.T @ white, inverse.T @ leading
    size = (head.norm(dim=1) / tail.norm(dim=0)).clamp_min(1e-12).sqrt()  # neither is badly scaled
    return [head / size[:, None], tail * size]
