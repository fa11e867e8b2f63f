"""The images of the demo's report: what the generators make, beside what is real."""

from pathlib import Path

import torch
from torch import Tensor

from kegfast._util.files import save_tensors
from kegfast.data import Splits
from kegfast.extraction import Generators
from kegfast.training.loop import mix, seeded


def save_images(path: Path, generators: Generators, splits: Splits, seed: int, columns: int = 8) -> None:
    """Writes the images of the report as tensors of one safetensors file.

    "grid" (generators, classes, columns, C, H, W): rows share a label, columns a noise vector.
    "generated_mean" and "real_mean" (classes, C, H, W): means over 100 generated and all real samples.
    """
    classes, copies, device = generators.num_classes, generators.copies, generators.device
    with seeded(mix(seed, 100)):
        noise = torch.randn(copies, 1, columns, generators.noise_size, device=device)
        many = torch.randn(copies, classes * 100 // copies, generators.noise_size, device=device)
    labels = torch.arange(classes, device=device).repeat_interleave(columns).expand(copies, -1)
    grid = generators.generate(labels, noise.expand(-1, classes, -1, -1).flatten(1, 2))
    drawn = torch.arange(many.shape[1], device=device).remainder(classes).expand(copies, -1)
    samples = generators.generate(drawn, many)
    real, real_labels = splits.train.tensors
    tensors = {
        "grid": grid.unflatten(1, (classes, columns)),
        "generated_mean": _class_means(samples.flatten(0, 1), drawn.flatten(), classes),
        "real_mean": _class_means(real, real_labels, classes),
    }
    save_tensors(path, tensors)


def _class_means(samples: Tensor, labels: Tensor, classes: int) -> Tensor:
    return torch.stack([samples[labels == k].mean(0) for k in range(classes)])
