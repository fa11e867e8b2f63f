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

from kegfast import check
from kegfast.check import expected

MOST = 8
"""The most leaves on an image."""
HALF = (0.03, 0.5)
"""Half a leaf's side or axis, as a share of the image's: log-uniform, alike at every scale."""
FLAT = 0.05
"""Images whose pixels deviate by less, normalised, are drawn anew: they show nothing."""
REDRAWS = 16
"""How often; greys close to black or white alone leave flat images in the end."""
CHUNK = 64
"""Images made at a time: they stay in the cache while leaves fall onto them."""


class DeadLeaves:
    """A source of images of 1 to 8 rectangles and ellipses on a plain ground, half of them blurred.

    The images come as a classifier wants them: pixels in [0, 1], less `mean`, over `std`. With `levels`
    "matched" greys are drawn from the Beta distribution that has this very mean and deviation:
    what a normalisation tells about images whose pixels nobody may see. Images of one grey are drawn anew.

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
        self.sample_shape = check.sizes("sample_shape", sample_shape)
        if len(self.sample_shape) != 3:
            raise ValueError(expected("sample_shape", "(channels, height, width)", sample_shape))
        if levels not in ("matched", "uniform"):
            raise ValueError(expected("levels", "'matched' or 'uniform'", levels))
        channels = self.sample_shape[0]
        self.mean = _per_channel("mean", mean, channels).to(device)
        self.std = _per_channel("std", std, channels).to(device)
        self.levels = torch.distributions.Beta(*_levels(self.mean, self.std, levels))

    def sample(self, n: int) -> tuple[Tensor, None]:
        """Draw `n` images, (n, C, H, W) float32, without labels."""
        images = self._draw(check.count("n", n))
        for _ in range(REDRAWS):
            flat = (images.flatten(2).std(2).amax(1) < FLAT).nonzero().flatten()
            if len(flat) == 0:
                break
            images[flat] = self._draw(len(flat))
        return images, None

    def _draw(self, n: int) -> Tensor:
        return torch.cat([self._make(min(CHUNK, n - start)) for start in range(0, n, CHUNK)])

    def _make(self, n: int) -> Tensor:
        """`n` images at once: leaf k falls onto all images that have more than k leaves."""
        channels, height, width = self.sample_shape
        device = self.mean.device
        grey = self.levels.sample((n, MOST + 1))[..., None, None]  # (n, MOST + 1, C, 1, 1)
        covered = _leaves(n, height, width, device)  # (n, MOST, 1, H, W)
        count = torch.randint(1, MOST + 1, (n, 1, 1, 1), device=device)
        images = grey[:, 0].expand(n, channels, height, width)
        for k in range(MOST):
            images = torch.where(covered[:, k] & (count > k), grey[:, k + 1], images)
        soft = torch.rand(n, 1, 1, 1, device=device) < 0.5
        images = torch.where(soft, _blur(images), images)
        return (images - self.mean[:, None, None]) / self.std[:, None, None]


def _leaves(n: int, height: int, width: int, device: torch.device) -> Tensor:  # (n, MOST, 1, H, W) bool
    """The pixels under each leaf: a rectangle or an ellipse at any angle."""

    x, y, angle, half_u, half_v, kind = torch.rand(6, n, MOST, 1, 1, 1, device=device)
    half_u, half_v = (HALF[0] * (HALF[1] / HALF[0]) ** share for share in (half_u, half_v))
    x = (torch.arange(width, device=device) + 0.5) / width - x  # (n, MOST, 1, 1, W)
    y = (torch.arange(height, device=device)[:, None] + 0.5) / height - y  # (n, MOST, 1, H, 1)
    cos, sin = (math.pi * angle).cos(), (math.pi * angle).sin()
    u = (cos / half_u * x + sin / half_u * y).square()  # the leaf's own axes, squared
    v = (cos / half_v * y - sin / half_v * x).square()
    return torch.where(kind < 0.5, torch.maximum(u, v), u + v) < 1


def _blur(images: Tensor) -> Tensor:  # (n, C, H, W)
    """Each pixel's mean with its neighbours, weights 1 2 1 both ways; borders are repeated."""
    for dim in (-2, -1):
        size = images.shape[dim]
        before = torch.arange(-1, size - 1, device=images.device).clamp_(min=0)
        after = torch.arange(1, size + 1, device=images.device).clamp_(max=size - 1)
        sides = images.index_select(dim, before) + images.index_select(dim, after)
        images = 0.5 * images + 0.25 * sides
    return images


def _levels(mean: Tensor, std: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Alpha and beta of the Beta distribution that greys follow; (1, 1) is the uniform one."""
    if kind == "uniform":
        return torch.ones_like(mean), torch.ones_like(mean)
    variance = mean * (1 - mean)
    size = variance / std.square() - 1  # alpha + beta
    if bool((size <= 0).any()):
        most = variance.sqrt().tolist()
        raise ValueError(expected("std", f"below sqrt(mean (1 - mean)) = {most}", std.tolist()))
    return mean * size, (1 - mean) * size


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> Tensor:  # (channels,)
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32).expand(channels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(expected(name, f"a number or {channels} of them", value)) from error
    top = 1.0 if name == "mean" else math.inf
    if not bool(((tensor > 0) & (tensor < top)).all()):
        raise ValueError(expected(name, f"in (0, {top:g})", value))
    return tensor.clone()
