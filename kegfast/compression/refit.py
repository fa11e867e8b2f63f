"""Last factors and biases solved anew: each layer answers for what the ranks took away before it."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kegfast.compression.norms import batch_statistics
from kegfast.compression.surgery import factored_layers, tail_of
from kegfast.compression.traffic import Inputs, evaluation, rows_of


@torch.no_grad()
def refit(
    student: nn.Module, teacher: nn.Module, samples: Tensor, *, rows: int = 1 << 14, ridge: float = 1e-3
) -> None:
    """Solves each factored layer's last factor and bias anew, from the first layer to the last, in one pass.

    Least squares, in closed form: the layer sees what the student's earlier layers now send it, and
    answers as close as it can to what the teacher's layer sent (cf. Zhang et al. 2016, asymmetric
    reconstruction). So each layer also undoes errors of those before it. A layer that runs several times
    is solved before its first call.

    Args:
        student: changed in place.
        teacher: the original, with dense layers under the same names.
        samples: (n, ...) inputs.
        rows: at most so many pixels (rows of a Linear) enter each regression.
        ridge: pull towards the factor as it is, relative to the mean square of its inputs.
    """
    targets: dict[str, tuple[Tensor, Tensor]] = {}
    generator = torch.Generator().manual_seed(0)

    def keep(name: str, module: nn.Module, args: Inputs, out: Tensor) -> None:
        if name not in targets:
            out = rows_of(out, isinstance(module, nn.Linear))
            picked = torch.randperm(len(out), generator=generator)[:rows].to(out.device)
            targets[name] = picked, out[picked]

    def solve(name: str, layer: nn.Module, args: Inputs) -> None:
        picked, target = targets.pop(name, (None, None))
        if picked is not None and (found := _tail_inputs(layer, args[0])) is not None:
            _solve(tail_of(layer), found[picked].double(), target.double(), ridge)

    names = [name for name, _ in factored_layers(student)]
    handles = [teacher.get_submodule(n).register_forward_hook(partial(keep, n)) for n in names]
    handles += [student.get_submodule(n).register_forward_pre_hook(partial(solve, n)) for n in names]
    try:
        for model in (teacher, student):
            with evaluation(model), batch_statistics(model):
                model(samples)
    finally:
        for handle in handles:
            handle.remove()


def _tail_inputs(layer: nn.Module, x: Tensor) -> Tensor | None:
    """What the last factor of a layer multiplies, one row per output pixel; None if not expressible."""
    linear = isinstance(layer.core, nn.Linear)
    if (first := getattr(layer, "first", None)) is not None:
        x = first(x)
    core = layer.core
    if getattr(layer, "last", None) is not None:
        return rows_of(core(x), linear)
    if linear:
        return rows_of(x, True)
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
