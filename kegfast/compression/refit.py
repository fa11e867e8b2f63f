"""Last factors and biases solved anew: each layer answers for what the ranks took away before it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kegfast.compression.norms import batch_statistics
from kegfast.compression.surgery import factored_layers, tail_of
from kegfast.compression.traffic import Inputs, evaluation, rows_of


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
            out = rows_of(out, isinstance(module, nn.Linear))
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
