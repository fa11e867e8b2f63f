"""Three factors of one weight, and the weight that they stand for."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Side = int | None  # a rank, None for a side without a factor


class Factors(NamedTuple):
    """weight = last core first; a side without a factor is None, and the core spans its channels."""

    first: Tensor | None  # (R1, C)
    core: Tensor  # (R2, R1, kh, kw), or (R2, R1) of a matrix
    last: Tensor | None  # (K, R2)

    @property
    def rank(self) -> tuple[Side, Side]:
        """(in_rank, out_rank), None for a side without a factor."""
        return (
            None if self.first is None else self.first.shape[0],
            None if self.last is None else self.last.shape[1],
        )

    def to(self, like: Tensor) -> "Factors":
        """The factors on the device and in the dtype of `like`."""
        return self.each(lambda part: part.to(like))

    def each(self, function: Callable[[Tensor], Tensor]) -> "Factors":
        """The same sides, with a function of every factor in its place."""
        first, core, last = self
        return Factors(
            None if first is None else function(first),
            function(core),
            None if last is None else function(last),
        )


def reconstruct(factors: Factors) -> Tensor:  # (K, C, kh, kw) or (K, C)
    """The weight that the factors stand for."""
    weight = factors.core
    if factors.first is not None:
        weight = torch.einsum("kr...,rc->kc...", weight, factors.first)
    if factors.last is not None:
        weight = torch.einsum("kr,rc...->kc...", factors.last, weight)
    return weight
