"""What a layer costs at each pair of ranks: parameters, FLOPs, bytes or seconds."""

from collections.abc import Sequence
from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from kegfast._util.inputs import Inputs
from kegfast._util.timing import interleaved
from kegfast.compression.budget import Cost, Rank
from kegfast.compression.choice import inputs_like, run_all
from kegfast.compression.surgery import Site
from kegfast.compression.traffic import Traffic
from kegfast.decomposition.factors import Factors
from kegfast.nn.build import build, explicit_padding
from kegfast.nn.factors import Dense

KINDS = ("params", "flops", "latency", "memory")


def parameters(shape: Sequence[int]) -> Cost:
    """Entries of the factors of a (K, C, ...) weight; the bias stays what it is."""
    outputs, inputs, *kernel = shape
    taps = prod(kernel)

    def cost(in_rank: np.ndarray, out_rank: np.ndarray) -> np.ndarray:
        inner, outer = np.where(in_rank, in_rank, inputs), np.where(out_rank, out_rank, outputs)
        entries: np.ndarray = in_rank * inputs + inner * outer * taps + out_rank * outputs
        return entries

    return cost


def factor_parameters(shape: Sequence[int], rank: Rank) -> int:
    """Entries of the factors of one rank pair."""
    return int(parameters(shape)(np.array(rank[0] or 0), np.array(rank[1] or 0)))


def pixels(module: Dense, traffic: Traffic) -> tuple[int, int]:
    """Pixels (rows of a Linear), over batch and calls, at which the first and the later factors run."""
    if isinstance(module, nn.Linear):
        rows = sum(prod(shape[:-1]) for shape in traffic.inputs)
        return rows, rows
    before, after = (_pixels(shapes) for shapes in (traffic.inputs, traffic.outputs))
    early = module.kernel_size == (1, 1) and explicit_padding(module) == (0, 0)
    return (after if early else before), after


def _pixels(shapes: Sequence[Sequence[int]]) -> int:
    """Of images (N, C, H, W) or (C, H, W)."""
    return sum(prod(shape[:-3]) * prod(shape[-2:]) for shape in shapes)


def flops(module: Dense, traffic: Traffic) -> tuple[Cost, int]:
    """Multiplications and additions for one forward pass, and those of the dense layer."""
    outputs, inputs, *kernel = module.weight.shape
    taps = prod(kernel)
    before, after = pixels(module, traffic)

    def cost(in_rank: np.ndarray, out_rank: np.ndarray) -> np.ndarray:
        inner, outer = np.where(in_rank, in_rank, inputs), np.where(out_rank, out_rank, outputs)
        core = inner * outer * taps * after
        work: np.ndarray = 2 * (in_rank * inputs * before + core + out_rank * outputs * after)
        return work

    return cost, 2 * outputs * inputs * taps * after


def memory(module: Dense, traffic: Traffic) -> tuple[Cost, int]:
    """Bytes of the weights and of every activation that the factors write, and those of the dense layer."""
    before, after = pixels(module, traffic)
    size, outputs = module.weight.element_size(), module.weight.shape[0]
    entries = parameters(module.weight.shape)

    def cost(in_rank: np.ndarray, out_rank: np.ndarray) -> np.ndarray:
        written = in_rank * before + out_rank * after + outputs * after
        moved: np.ndarray = size * (entries(in_rank, out_rank) + written)
        return moved

    return cost, size * (module.weight.numel() + outputs * after)


def latency(site: Site, traffic: Traffic, example: Inputs, seconds: float) -> tuple[Cost, float]:
    """Seconds as a straight line in FLOPs through measured ranks, and those of the dense layer."""
    module = site.layer
    work, _ = flops(module, traffic)
    layers, works = {}, []
    for share in (2, 4, 8, 16):
        rank = _share_of(module, share)
        layers[f"1/{share}"] = build(module, _blank(module, rank)).eval()
        works.append(float(work(np.array(rank[0] or 0), np.array(rank[1] or 0))))
    inputs = inputs_like(example, traffic, module.weight)
    calls = {name: partial(run_all, layer, inputs) for name, layer in layers.items()}
    with torch.inference_mode():
        times = interleaved({"dense": partial(run_all, module, inputs), **calls}, seconds=seconds)
    measured = np.array([times[name] for name in layers])
    slope = max(np.polyfit(works, measured, 1)[0], 0.0) if len(set(works)) > 1 else 0.0
    floor = float(np.median(measured - slope * np.array(works)))

    entries = parameters(module.weight.shape)
    spatial = prod(module.weight.shape[2:]) > 1

    def cost(in_rank: np.ndarray, out_rank: np.ndarray) -> np.ndarray:
        seconds = np.maximum(floor + slope * work(in_rank, out_rank), measured.min() * 0.9)
        # Only the kinds of layer that were measured, and none that saves time by growing.
        other = spatial & ((in_rank == 0) | (out_rank == 0))
        larger = entries(in_rank, out_rank) >= module.weight.numel()
        return np.where(other | larger, np.inf, seconds)

    return cost, times["dense"]


def _share_of(module: Dense, share: int) -> Rank:
    outputs, inputs, *kernel = module.weight.shape
    if prod(kernel) == 1:
        return max(1, min(inputs, outputs) // share), None
    return max(1, inputs // share), max(1, outputs // share)


def _blank(module: Dense, rank: Rank) -> Factors:
    outputs, inputs, *kernel = module.weight.shape
    device = module.weight.device

    def new(*shape: int) -> Tensor:
        return (
            torch.zeros(shape, device=device) if device.type == "meta" else torch.randn(shape, device=device)
        )

    first = new(rank[0], inputs) if rank[0] else None
    last = new(outputs, rank[1]) if rank[1] else None
    core = new(rank[1] or outputs, rank[0] or inputs, *kernel)
    return Factors(first, core, last)
