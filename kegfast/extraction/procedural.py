"""Images that no data made: dead leaves, shapes that fall onto one another; blobs; either of them bent.

Shapes of random place, size and gray that cover each other give edges, corners and flat regions much as
photographs have them (the dead-leaves model: Lee, Mumford and Huang 2001). Baradad et al., Learning to See
by Looking at Noise, NeurIPS 2021, train representations on such images alone.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kegfast._util import check
from kegfast._util.check import expected

MOST = 8
"""The most leaves on an image, unless asked for more."""
HALF = (0.03, 0.5)
"""Half a leaf's side or axis, as a share of the image's: log-uniform, alike at every scale."""
FLAT = 0.05
"""Images whose pixels deviate by less, normalized, are drawn anew: they show nothing."""
REDRAWS = 16
"""How often; grays close to black or white alone leave flat images in the end."""
CHUNK = 64
"""Images made at a time: they stay in the cache while leaves fall onto them."""
CELLS = (3, 4, 6, 8, 12)
"""Random numbers along a side of the smooth noise that blobs are cut from."""
LEVEL = (0.7, 0.3)
"""Mean and deviation of the height, in deviations of the noise, that blobs lie above."""
REACH, BENDS = 0.25, 4
"""How far a bent image's pixels come from, as a share of its side; at how many points a side it is drawn."""


class Painted(ABC):
    """A source of images of few grays, half of them blurred.

    The images come as a classifier wants them: pixels in [0, 1], less `mean`, over `std`. With `levels`
    "matched" grays are drawn from the Beta distribution that has this very mean and deviation:
    what a normalization tells about images whose pixels nobody may see. Images of one gray are drawn anew.

    Args:
        sample_shape: (channels, height, width).
        mean: Of each channel, or of all, in (0, 1): the normalization that the teacher expects.
        std: The same for the deviation, above 0.
        levels: How grays are drawn: "matched", or "uniform" in [0, 1].
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
        """`n` images at once."""
        images = self._paint(n, *self.sample_shape)
        soft = torch.rand(n, 1, 1, 1, device=images.device) < 0.5
        images = torch.where(soft, _blur(images), images)
        return (images - self.mean[:, None, None]) / self.std[:, None, None]

    @abstractmethod
    def _paint(self, n: int, channels: int, height: int, width: int) -> Tensor:
        """`n` sharp images of pixels in [0, 1]."""

    def _grays(self, n: int, count: int) -> Tensor:  # (n, count, C, 1, 1)
        return self.levels.sample((n, count))[..., None, None]


class DeadLeaves(Painted):
    """Images of 1 to `most` rectangles and ellipses on a plain ground; further arguments as of `Painted`.

    Args:
        most: The most leaves on an image.
    """

    def __init__(self, *args: Any, most: int = MOST, **options: Any):
        super().__init__(*args, **options)
        self.most = check.count("most", most)

    def _paint(self, n: int, channels: int, height: int, width: int) -> Tensor:
        """Leaf k falls onto all images that have more than k leaves."""
        device = self.mean.device
        gray = self._grays(n, self.most + 1)
        covered = _leaves(n, height, width, device, self.most)  # (n, most, 1, H, W)
        count = torch.randint(1, self.most + 1, (n, 1, 1, 1), device=device)
        images = gray[:, 0].expand(n, channels, height, width)
        for k in range(self.most):
            images = torch.where(covered[:, k] & (count > k), gray[:, k + 1], images)
        return images


class Blobs(Painted):
    """Images of two grays: the hills of smooth noise on a ground, whose gray is the more usual of the two."""

    def _paint(self, n: int, channels: int, height: int, width: int) -> Tensor:
        device = self.mean.device
        parts = []
        for i, cells in enumerate(CELLS):
            noise = torch.randn(len(range(i, n, len(CELLS))), 1, cells, cells, device=device)
            parts.append(F.interpolate(noise, size=(height, width), mode="bicubic"))
        noise = torch.cat(parts)
        noise = noise / noise.std((1, 2, 3), keepdim=True).clamp_(min=1e-6)
        level = LEVEL[0] + LEVEL[1] * torch.randn(n, 1, 1, 1, device=device)
        gray = self._grays(n, 2)
        unusual = (gray - self.mean[:, None, None]).abs().mean(2)  # (n, 2, 1, 1)
        first = (unusual[:, 0] <= unusual[:, 1])[:, None]
        ground, hill = torch.where(first, gray[:, 0], gray[:, 1]), torch.where(first, gray[:, 1], gray[:, 0])
        return torch.where(noise > level, hill, ground)


def bent(
    images: Tensor,  # (N, C, H, W)
) -> Tensor:
    """Images whose pixels come from somewhere near them, neighbors from neighbors: straight lines bend.

    Each image has a field of offsets, bicubic between 4 x 4 normal draws, and its own strength, from none
    to a deviation of a quarter of the image's side. Borders are repeated.
    """
    n = len(images)
    offsets = torch.randn(n, 2, BENDS, BENDS, device=images.device)
    offsets *= 2 * REACH * torch.rand(n, 1, 1, 1, device=images.device)  # an image's side is 2 in a grid
    offsets = F.interpolate(offsets, size=images.shape[2:], mode="bicubic").permute(0, 2, 3, 1)
    still = torch.eye(2, 3, device=images.device).expand(n, 2, 3)
    grid = F.affine_grid(still, list(images.shape), align_corners=False) + offsets
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _leaves(
    n: int, height: int, width: int, device: torch.device, most: int = MOST
) -> Tensor:  # (n, most, 1, H, W) bool
    """The pixels under each leaf: a rectangle or an ellipse at any angle."""

    x, y, angle, half_u, half_v, kind = torch.rand(6, n, most, 1, 1, 1, device=device)
    half_u, half_v = (HALF[0] * (HALF[1] / HALF[0]) ** share for share in (half_u, half_v))
    x = (torch.arange(width, device=device) + 0.5) / width - x  # (n, most, 1, 1, W)
    y = (torch.arange(height, device=device)[:, None] + 0.5) / height - y  # (n, most, 1, H, 1)
    cos, sin = (math.pi * angle).cos(), (math.pi * angle).sin()
    u = (cos / half_u * x + sin / half_u * y).square()  # the leaf's own axes, squared
    v = (cos / half_v * y - sin / half_v * x).square()
    return torch.where(kind < 0.5, torch.maximum(u, v), u + v) < 1


def _blur(images: Tensor) -> Tensor:  # (n, C, H, W)
    """Each pixel's mean with its neighbors, weights 1 2 1 both ways; borders are repeated."""
    for dim in (-2, -1):
        size = images.shape[dim]
        before = torch.arange(-1, size - 1, device=images.device).clamp_(min=0)
        after = torch.arange(1, size + 1, device=images.device).clamp_(max=size - 1)
        sides = images.index_select(dim, before) + images.index_select(dim, after)
        images = 0.5 * images + 0.25 * sides
    return images


def _levels(mean: Tensor, std: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Alpha and beta of the Beta distribution that grays follow; (1, 1) is the uniform one."""
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
