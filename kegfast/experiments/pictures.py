"""Pictures of what generators make: by label and noise, and from one label to another."""

import torch
from torch import Tensor

from kegfast.extraction import Generators
from kegfast.extraction.generators import one_hot

WALK = (0, 5)
"""Labels that a latent walk leads from and to, as in the paper's figures."""


def grid(generators: Generators, draw: torch.Generator, columns: int = 4) -> Tensor:
    """A row per label; the generators side by side, each with a column per noise vector.

    Returns:
        (classes, copies * columns, C, H, W).
    """
    classes, copies = generators.num_classes, generators.copies
    noise = torch.randn(1, columns, generators.noise_size, generator=draw)
    labels = torch.arange(classes).repeat_interleave(columns)
    images = _made(generators, one_hot(labels, classes), noise.repeat(1, classes, 1))
    images = images.unflatten(1, (classes, columns)).transpose(0, 1)  # (classes, copies, columns, ...)
    return images.reshape(classes, copies * columns, *images.shape[3:])


def walk(generators: Generators, draw: torch.Generator, columns: int = 11) -> Tensor:
    """From label 0 to label 5, or to the last before: a row per generator, one noise vector.

    Returns:
        (copies, columns, C, H, W).
    """
    classes = generators.num_classes
    start, end = one_hot(torch.tensor(WALK).clamp(max=classes - 1), classes)
    share = torch.linspace(0, 1, columns)[:, None]
    noise = torch.randn(1, 1, generators.noise_size, generator=draw).expand(1, columns, -1)
    return _made(generators, start * (1 - share) + end * share, noise)


def _made(generators: Generators, labels: Tensor, noise: Tensor) -> Tensor:
    """Every generator's samples for label vectors (n, classes) and noise (1, n, noise_size)."""
    copies = generators.copies
    return generators.generate(labels.expand(copies, -1, -1), noise.expand(copies, -1, -1)).cpu()
