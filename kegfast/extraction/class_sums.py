"""Rows of a table that lie where a classifier's classes do: sums of noise that it puts into one class.

Of a row drawn from noise hardly anything is known but the class that the classifier sees in it. The mean of
many rows of one class is known better: it points where the class lies. A sum of a few keeps the spread of the
noise beside that mean, and how few decides between the two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kegfast._util import check
from kegfast._util.check import expected
from kegfast.extraction.teacher import FrozenTeacher

TERMS = (1, 2, 4)
"""Rows in a sum: noise, and what lies ever closer to the mean of a class."""
BANK = 8
"""Rows of noise that are drawn and put into classes for each row given out."""


class ClassSums:
    """A source of rows (x_1 + ... + x_K) / sqrt(K), the x of one class, as many of every class.

    Dividing by sqrt(K) keeps the variance within the class and multiplies the mean by sqrt(K). What is given
    out is scaled to the variance 1 that normalized data have. Classes that the teacher sees in no row are
    left out.

    Args:
        teacher: Rows (n, *sample_shape) to logits; a private copy is used.
        num_classes: How many logits.
        noise: A source of noise; see `kegfast.distillation.sources`.
        terms: Numbers K of rows in a sum, drawn uniformly.

    Raises:
        TypeError, ValueError: An argument is wrong, or the teacher does not fit the noise.
    """

    def __init__(self, teacher: nn.Module, num_classes: int, noise: object, terms: Sequence[int] = TERMS):
        if not (hasattr(noise, "sample") and hasattr(noise, "sample_shape")):
            raise TypeError(expected("noise", "a source of one sample_shape", noise))
        if (
            not isinstance(terms, tuple | list)
            or not terms
            or not all(isinstance(k, int) and k >= 1 for k in terms)
        ):
            raise ValueError(expected("terms", "positive ints", terms))
        self.teacher = FrozenTeacher(teacher, watch=False)
        self.teacher.check(num_classes, noise.sample_shape, self.teacher.device)
        self.num_classes, self.noise, self.terms = num_classes, noise, tuple(terms)

    @torch.no_grad()
    def sample(self, n: int) -> tuple[Tensor, None]:
        """Draw `n` rows, (n, *sample_shape) float32, without labels."""
        check.count("n", n)
        rows = self.noise.sample(max(BANK * n, BANK * self.num_classes))[0].to(self.teacher.device)
        found = self.teacher(rows)[0].argmax(1)
        rows = rows[found.argsort()]
        counts = found.bincount(minlength=self.num_classes)
        starts = counts.cumsum(0) - counts
        seen = counts.nonzero().flatten()
        label = seen[torch.randint(len(seen), (n,), device=rows.device)]
        terms = torch.tensor(self.terms, device=rows.device)
        terms = terms[torch.randint(len(terms), (n,), device=rows.device)]
        sums = torch.zeros_like(rows[:n])
        for k in range(max(self.terms)):
            index = starts[label] + (torch.rand(n, device=rows.device) * counts[label]).long()
            sums += torch.where(_column(terms > k, sums), rows[index], 0.0)
        sums /= _column(terms, sums).sqrt()
        return sums / sums.square().mean().sqrt(), None


def _column(values: Tensor, rows: Tensor) -> Tensor:  # (n,) -> (n, 1, ...), as many dimensions as rows
    return values.view(-1, *[1] * (rows.ndim - 1))
