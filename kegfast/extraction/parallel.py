"""Generators spread over the processes of torch.distributed (torchrun): each trains some, all get all."""

from collections.abc import Mapping
from pathlib import Path
from typing import overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kegfast._util.files import as_path


def share(copies: int, rank: int, world: int) -> slice:
    """The generators of one rank: consecutive ones, as equal in number as can be."""
    return slice(copies * rank // world, copies * (rank + 1) // world)


@overload
def own_path(path: str | Path, rank: int, world: int) -> Path: ...


@overload
def own_path(path: str | Path | None, rank: int, world: int) -> Path | None: ...


def own_path(path: str | Path | None, rank: int, world: int) -> Path | None:
    """The file of one rank."""
    if path is None:
        return None
    path = as_path("checkpoint", path)
    return path if world == 1 else path.with_name(f"{path.name}.{rank}")


@torch.no_grad()
def take(part: nn.Module, stack: nn.Module, own: slice, copies: int) -> None:
    """Copies networks `own` of a stack of `copies` into a smaller stack."""
    ours = part.state_dict()
    for name, whole in stack.state_dict().items():
        ours[name].copy_(whole if whole.dim() == 0 else whole[_rows(whole, own, copies)])


@torch.no_grad()
def gather(stack: nn.Module, part: nn.Module | None, copies: int, rank: int, world: int) -> None:
    """Fills a stack on every rank with the networks that the ranks hold; None where a rank holds none."""
    ours = {} if part is None else part.state_dict()
    for name, whole in stack.state_dict().items():
        for source in range(world):
            own = share(copies, source, world)
            if own.start == own.stop:
                continue
            place = whole if whole.dim() == 0 else whole[_rows(whole, own, copies)]
            sent = ours[name].contiguous() if source == rank else torch.empty_like(place).contiguous()
            dist.broadcast(sent, source)
            place.copy_(sent)


def mean_history(history: list[dict[str, float]], size: int, world: int) -> list[dict[str, float]]:
    """The history of all generators: each rank's values weighted by how many it trained."""
    parts: list[tuple[int, list[dict[str, float]]] | None] = [None] * world
    dist.all_gather_object(parts, (size, history))
    trained = [part for part in parts if part is not None and part[0]]
    total = sum(n for n, _ in trained)
    return [
        _mean([n / total for n, _ in trained], entries)
        for entries in zip(*(e for _, e in trained), strict=True)
    ]


def _mean(weights: list[float], entries: tuple[Mapping[str, float], ...]) -> dict[str, float]:
    names = [name for name in entries[0] if name != "step"]
    pairs = list(zip(weights, entries, strict=True))
    return {"step": entries[0]["step"]} | {name: sum(w * e[name] for w, e in pairs) for name in names}


def _rows(whole: Tensor, own: slice, copies: int) -> slice:
    each = len(whole) // copies
    return slice(own.start * each, own.stop * each)
