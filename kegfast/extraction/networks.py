"""The networks that KegNet trains around a frozen classifier: generators and decoders, stacked."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kegfast.extraction.stacked import StackedNorm, StackedStart, stacked_mlp, unfold

Range = tuple[float | Sequence[float], float | Sequence[float]]

_DOUBLE: dict[str, Any] = {"kernel_size": 4, "stride": 2, "padding": 1}  # doubles a map's height and width
NORM_EPS = 1e-5  # keeps a constant image finite; far below any real image's variance


class StandardOutput(nn.Module):
    """tanh, then every sample shifted and scaled to mean 0 and deviation 1 (the paper's output)."""

    def forward(self, x: Tensor) -> Tensor:  # (G, N, C, H, W)
        x = x.float().tanh()
        dims = (2, 3, 4)
        variance = x.var(dims, correction=0, keepdim=True)
        return (x - x.mean(dims, keepdim=True)) * torch.rsqrt(variance + NORM_EPS)


class RangeOutput(nn.Module):
    """A sigmoid stretched to the values that the teacher's inputs take, per channel.

    Args:
        low: The smallest input value: a number, or one per channel.
        high: The largest.
        channels: The number of channels.
    """

    def __init__(self, low: float | Sequence[float], high: float | Sequence[float], channels: int):
        super().__init__()
        bounds = [torch.as_tensor(v, dtype=torch.float32).expand(channels) for v in (low, high)]
        self.low: Tensor
        self.span: Tensor
        self.register_buffer("low", bounds[0].reshape(-1, 1, 1).clone(), persistent=False)
        self.register_buffer("span", (bounds[1] - bounds[0]).reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (G, N, C, H, W)
        return self.low + self.span * x.float().sigmoid()


class ImageGenerator(nn.Module):
    """Labels and noise to images (KegNet, appendix): two dense layers, four transposed convolutions.

    classes + noise -> 256 -> 128 channels on a map of an eighth of the image's size, then
    64 (same size), 16, 4 and `channels`, the size doubled thrice and cropped. At 32x32 the first
    transposed convolution makes a 4x4 map of a 1x1 one.

    Args:
        copies: The number of independent generators.
        num_classes: The size of a label vector.
        noise_size: The size of a noise vector.
        sample_shape: (channels, height, width).
        output: What turns the last map into samples.
    """

    def __init__(
        self,
        copies: int,
        num_classes: int,
        noise_size: int,
        sample_shape: Sequence[int],
        output: nn.Module,
    ):
        super().__init__()
        channels, *self.size = sample_shape
        self.copies = copies
        sizes = [num_classes + noise_size, 256, 128]
        last = [StackedNorm(copies, 128), nn.ELU()]
        self.dense = nn.Sequential(*stacked_mlp(copies, sizes, nn.ELU), *last)
        start = StackedStart(copies, 128, 64, [math.ceil(n / 8) for n in self.size])
        layers: list[nn.Module] = [start, nn.BatchNorm2d(copies * 64), nn.ELU()]
        for n_in, n_out in ((64, 16), (16, 4)):
            layers += [
                nn.ConvTranspose2d(copies * n_in, copies * n_out, groups=copies, bias=False, **_DOUBLE),
                nn.BatchNorm2d(copies * n_out),
                nn.ELU(),
            ]
        layers.append(nn.ConvTranspose2d(copies * 4, copies * channels, groups=copies, **_DOUBLE))
        self.maps = nn.Sequential(*layers)
        self.output = output

    def forward(
        self,
        labels: Tensor,  # (G, N, classes)
        noise: Tensor,  # (G, N, noise_size)
    ) -> Tensor:  # (G, N, C, H, W)
        x = self.maps(self.dense(torch.cat([labels, noise], dim=-1)))[:, :, : self.size[0], : self.size[1]]
        return self.output(unfold(x, self.copies))


class TableGenerator(nn.Module):
    """Labels and noise to standardized rows: a perceptron whose output has mean 0 and deviation 1.

    Args:
        copies: The number of independent generators.
        num_classes: The size of a label vector.
        noise_size: The size of a noise vector.
        sample_shape: (features,), or any other shape that is not an image's.
        width: The hidden size.
    """

    def __init__(
        self,
        copies: int,
        num_classes: int,
        noise_size: int,
        sample_shape: Sequence[int],
        width: int = 128,
    ):
        super().__init__()
        self.shape = tuple(sample_shape)
        features = math.prod(self.shape)
        self.body = nn.Sequential(
            *stacked_mlp(copies, [num_classes + noise_size, width, width, features], nn.ELU),
            StackedNorm(copies, features, affine=False),
        )

    def forward(
        self,
        labels: Tensor,  # (G, N, classes)
        noise: Tensor,  # (G, N, noise_size)
    ) -> Tensor:  # (G, N, *shape)
        rows = self.body(torch.cat([labels, noise], dim=-1)).float()
        return rows.unflatten(-1, self.shape)


class Decoder(nn.Module):
    """Recovers the noise that a sample was made from (KegNet, Section 4): a perceptron per copy.

    Args:
        copies: The number of independent decoders.
        sample_shape: The shape of one sample.
        noise_size: The size of a noise vector.
    """

    def __init__(self, copies: int, sample_shape: Sequence[int], noise_size: int):
        super().__init__()
        features = math.prod(sample_shape)
        self.body = stacked_mlp(copies, [features, 256, 128, noise_size], nn.ELU)

    def forward(self, samples: Tensor) -> Tensor:  # (G, N, ...) -> (G, N, noise_size)
        return self.body(samples.flatten(2)).float()


def make_generator(
    copies: int,
    num_classes: int,
    noise_size: int,
    sample_shape: Sequence[int],
    input_range: Range | None,
) -> nn.Module:
    """An `ImageGenerator` for (channels, height, width), a `TableGenerator` for any other shape."""
    if len(sample_shape) != 3:
        return TableGenerator(copies, num_classes, noise_size, sample_shape)
    output = RangeOutput(*input_range, sample_shape[0]) if input_range else StandardOutput()
    return ImageGenerator(copies, num_classes, noise_size, sample_shape, output)
