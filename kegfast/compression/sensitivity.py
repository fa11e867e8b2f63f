"""What an error of each layer's weight does to the model's output."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kegfast._util.inputs import Arguments, Inputs, call, copied, count, only_input, split, tensors_in
from kegfast._util.modules import evaluation
from kegfast.compression.norms import batch_statistics
from kegfast.compression.surgery import Site
from kegfast.compression.traffic import rows_of, tensors_of
from kegfast.decomposition.decompose import Metric

CHUNK = 64
"""Samples that run at once wherever BatchNorm's own statistics are not in play."""


def metrics(
    model: nn.Module, sites: Sequence[Site], samples: Inputs, *, noise: bool, draws: int = 8
) -> dict[str, Metric]:
    """What an error of each layer's weight does to the model's output (a Kronecker-factored Hessian).

    The squared change of the outputs, to first order and with neighboring pixels taken as
    independent (cf. Martens and Grosse 2015), is tr(G dW A dW^T): A the covariance of the layer's
    input channels, G the second moments of the gradients of random projections of the output. The
    mean is left out of A, since BatchNorm or the bias can take up a constant.

    Args:
        model: the teacher, unchanged.
        sites: layers to look at.
        samples: n inputs.
        noise: whether BatchNorm should use the samples' own statistics, as noise needs.
        draws: random projections of the output.

    Returns:
        A metric for every site that ran, all in the same unit.
    """
    gathered: dict[str, list[Tensor]] = {}
    handles = []
    for site in sites:

        def forward(
            module: nn.Module, args: Arguments, kwargs: Mapping[str, Any], out: Tensor, name: str = site.name
        ) -> Tensor:
            linear = isinstance(module, nn.Linear)
            rows = rows_of(only_input(args, kwargs).detach(), linear).float()
            zero = rows.new_zeros(())
            sums = gathered.setdefault(name, [zero, zero, zero, zero])
            sums[0] = sums[0] + rows.T @ rows
            sums[1] = sums[1] + rows.sum(0)
            sums[2] = sums[2] + len(rows)

            def backward(gradient: Tensor) -> None:
                gradient = rows_of(gradient, linear).float()
                sums[3] = sums[3] + gradient.T @ gradient

            if not out.requires_grad:  # a first layer; where inputs are numbers of words nothing else would
                out = out.detach().requires_grad_().clone()
            if out.requires_grad:
                out.register_hook(backward)
            return out

        handles.append(site.module.register_forward_hook(forward, with_kwargs=True))
    rng = torch.Generator(device=tensors_in(samples)[0].device).manual_seed(0)
    chunks = [samples] if noise else split(samples, CHUNK)
    frozen = copy.copy(list(model.parameters()))
    required = [parameter.requires_grad for parameter in frozen]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with evaluation(model), torch.enable_grad():
            for chunk in chunks:
                with batch_statistics(model) if noise else nullcontext():
                    outputs = [out for out in tensors_of(call(model, copied(chunk))) if out.requires_grad]
                for draw in range(draws):
                    directions = [torch.randn(o.shape, generator=rng, device=o.device) for o in outputs]
                    torch.autograd.backward(
                        outputs,
                        [v.to(o) for v, o in zip(directions, outputs, strict=True)],
                        retain_graph=draw < draws - 1,
                    )
    finally:
        for handle in handles:
            handle.remove()
        for parameter, grad in zip(frozen, required, strict=True):
            parameter.requires_grad_(grad)
    found = {}
    for name, (square, total, rows, gradients) in gathered.items():
        mean = total / rows
        output = gradients / (draws * count(samples))
        if output.dim() == 2:
            found[name] = Metric(square / rows - mean[:, None] * mean, output)
    return found
