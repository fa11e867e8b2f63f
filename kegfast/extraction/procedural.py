"""Images that no data made: dead leaves, shapes that fall onto one another.

Shapes of random place, size and grey that cover each other give edges, corners and flat regions much as
photographs have them (the dead-leaves model: Lee, Mumford and Huang 2001). Baradad et al., Learning to See
by Looking at Noise, NeurIPS 2021, train representations on such images alone.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from kegfast.check import expected

MOST = 8
"""The most leaves on an image."""
CHUNK = 512
"""Images made at a time: they stay in the cache while leaves fall onto them."""


class DeadLeaves:
    """A source of images of 1 to 8 rectangles and ellipses on a plain ground, half of them blurred.

    The images come as a classifier wants them: pixels in [0, 1], less `mean`, over `std`. With `levels`
    "matched" greys are drawn from the Beta distribution that has this very mean and deviation:
    what a normalisation tells about images whose pixels nobody may see.

    Args:
        sample_shape: (channels, height, width).
        mean: Of each channel, or of all, in (0, 1): the normalisation that the teacher expects.
        std: The same for the deviation, above 0.
        levels: How greys are drawn: "matched", or "uniform" in [0, 1].
        device: Where the images are made.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.25,
        levels: Literal["matched", "uniform"] = "matched",
        device: torch.device | str | None = None,
    ):
        self.sample_shape = tuple(sample_shape)
        if len(self.sample_shape) != 3 or min(self.sample_shape) < 1:
            raise ValueError(expected("sample_shape", "(channels, height, width)", sample_shape))
        if levels not in ("matched", "uniform"):
            raise ValueError(expected("levels", "'matched' or 'uniform'", levels))
        channels = self.sample_shape[0]
        self.mean = _per_channel("mean", mean, channels).to(device)
        self.std = _per_channel("std", std, channels).to(device)
        self.levels = torch.distributions.Beta(*_levels(self.mean, self.std, levels))

    def sample(self, n: int) -> tuple[Tensor, None]:
        """Draw `n` images, (n, C, H, W) float32, without labels."""
        if not isinstance(n, int) or n < 1:
            raise ValueError(expected("n", "a positive int", n))
        return torch.cat([self._make(min(CHUNK, n - start)) for start in range(0, n, CHUNK)]), None

    def _make(self, n: int) -> Tensor:
        device = self.mean.device
        colours = self.levels.sample((n, MOST + 1))[..., None, None]  # (n, MOST + 1, C, 1, 1)
        x, y = (self._offsets(n, size) for size in self.sample_shape[:0:-1])  # (n, MOST, size)
        covered = x[:, :, None, :] + y[:, :, :, None] < 1  # (n, MOST, H, W)
        leaves = torch.randint(1, MOST + 1, (n, 1, 1), device=device)
        images = colours[:, 0].expand(n, *self.sample_shape)
        for k in range(MOST):
            falls = (covered[:, k] & (leaves > k))[:, None]
            images = torch.where(falls, colours[:, k + 1], images)
        soft = torch.rand(n, 1, 1, 1, device=device) < 0.5
        images = torch.where(soft, _blur(images), images)
        return (images - self.mean[:, None, None]) / self.std[:, None, None]
