"""Trained generators: a source of labeled artificial samples that can be saved and loaded."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.files import parse_json, read_tensors, save_tensors
from kegfast.extraction.networks import Range, make_generator
from kegfast.extraction.recipe import Labels, check_labels

FORMAT = "kegfast.generators.1"
CHUNK = 1024  # samples per generator and pass: bounds the memory of a large pool


class Generators:
    """`copies` generators with what it takes to feed them; a source for `kegfast.distill`.

    Args:
        copies: The number of independent generators.
        num_classes: The number of classes that labels are drawn from.
        sample_shape: The shape of one sample.
        noise_size: The size of a noise vector.
        input_range: Smallest and largest value of an image, each a number or one per channel; None
            gives every image mean 0 and deviation 1.
        labels: What `sample` asks for: "one-hot", one class, or "soft", a number in [0, 1) per class.

    Raises:
        TypeError, ValueError: An argument is none of these.
    """

    def __init__(
        self,
        copies: int,
        num_classes: int,
        sample_shape: Sequence[int],
        noise_size: int = 10,
        input_range: Range | None = None,
        labels: Labels = "one-hot",
    ):
        check_labels(labels)
        check.counts(copies=copies, noise_size=noise_size)
        check_samples(num_classes, sample_shape, input_range)
        self.copies = copies
        self.num_classes = num_classes
        self.sample_shape = tuple(sample_shape)
        self.noise_size = noise_size
        self.input_range = input_range
        self.labels = labels
        self.network = make_generator(copies, num_classes, noise_size, sample_shape, input_range)
        self.history: list[dict[str, float]] = []

    def __len__(self) -> int:
        return self.copies

    @property
    def device(self) -> torch.device:
        """Where samples are made."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> "Generators":
        """Moves the networks."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,  # (copies, N) int64, or (copies, N, classes)
        noise: Tensor,  # (copies, N, noise_size)
    ) -> Tensor:  # (copies, N, *sample_shape)
        """Every generator's samples for the labels and noise given to it.

        Args:
            labels: A class for each sample, (copies, N) int64, or a vector of them, (copies, N, classes).
            noise: (copies, N, noise_size).

        Raises:
            ValueError: Labels or noise are of another shape, or no classes.
        """
        self._check(labels, noise)
        self.network.eval()
        if labels.dim() == 2:
            labels = one_hot(labels, self.num_classes)
        chunks = zip(labels.split(CHUNK, dim=1), noise.split(CHUNK, dim=1), strict=True)
        return torch.cat([self.network(y, z) for y, z in chunks], dim=1)

    def _check(self, labels: Tensor, noise: Tensor) -> None:
        shape = (self.copies, *noise.shape[1:2]) if isinstance(noise, Tensor) else ()
        if len(shape) < 2 or noise.shape != (*shape, self.noise_size):
            raise ValueError(expected("noise", f"({self.copies}, N, {self.noise_size})", noise))
        what = f"classes {shape} below {self.num_classes}, or {(*shape, self.num_classes)}"
        if not isinstance(labels, Tensor) or labels.shape not in (shape, (*shape, self.num_classes)):
            raise ValueError(expected("labels", what, labels))
        if labels.dim() == 2 and labels.is_cpu and labels.numel():  # elsewhere it would wait for the device
            low, high = labels.aminmax()
            if low < 0 or high >= self.num_classes:
                raise ValueError(expected("labels", what, f"{low} to {high}"))

    def sample(self, n: int, *, shuffle: bool = True) -> tuple[Tensor, Tensor]:
        """Draws n samples, equally many from each generator.

        Every generator gets labels and noise of its own, from torch's global generator.

        Args:
            n: The number of samples.
            shuffle: Whether they are in random order; otherwise one generator's follow another's.

        Returns:
            Samples (n, *sample_shape) float32 and the labels asked for, (n,) int64; of soft ones the
            largest.
        """
        each = math.ceil(check.count("n", n) / self.copies)
        labels = draw_labels((self.copies, each), self.num_classes, self.labels, self.device)
        noise = torch.randn(self.copies, each, self.noise_size, device=self.device)
        samples = self.generate(labels, noise)
        samples, classes = samples.flatten(0, 1), labels.argmax(-1).flatten()
        if not shuffle:
            return samples[:n], classes[:n]
        order = torch.randperm(self.copies * each, device=self.device)[:n]
        return samples[order], classes[order]

    def save(self, path: Path | str) -> None:
        """Writes parameters and configuration to one safetensors file, atomically."""
        config = {
            "copies": self.copies,
            "num_classes": self.num_classes,
            "sample_shape": self.sample_shape,
            "noise_size": self.noise_size,
            "input_range": self.input_range,
            "labels": self.labels,
        }
        metadata = {"format": FORMAT, "config": json.dumps(config)}
        save_tensors(path, self.network.state_dict(), metadata)

    @classmethod
    def load(cls, path: Path | str) -> "Generators":
        """Reads what `save` wrote, on the CPU.

        Raises:
            OSError: The file cannot be opened.
            ValueError: It is not a file of generators, or holds values that are not finite.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(expected(str(path), f"a file of format {FORMAT}", metadata.get("format")))
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            raise ValueError(f"{path}: expected finite parameters, got NaN or infinite ones")
        try:
            config = parse_json(metadata["config"], path)
            with torch.device("meta"):  # sizes that are not the file's take no memory
                empty = make_generator(
                    config["copies"],
                    config["num_classes"],
                    config["noise_size"],
                    config["sample_shape"],
                    None,
                )
                empty.load_state_dict(tensors, assign=True)
            loaded = cls(**config)
            loaded.network.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: expected parameters that fit their configuration: {error}") from error
        loaded.network.eval()
        return loaded


def check_samples(num_classes: int, sample_shape: Sequence[int], input_range: Range | None) -> None:
    """Raises TypeError or ValueError unless generators can make such samples of so many classes."""
    check.count("num_classes", num_classes, 2)
    shape = check.sizes("sample_shape", sample_shape)
    if input_range is None:
        return
    if len(shape) != 3:
        raise ValueError(expected("input_range", "None for samples that are no images", input_range))
    try:
        low, high = (torch.as_tensor(v, dtype=torch.float64).expand(shape[0]) for v in input_range)
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"(low, high), numbers or {shape[0]} per channel"
        raise ValueError(expected("input_range", what, input_range)) from error
    if not bool(((low < high) & low.isfinite() & high.isfinite()).all()):
        raise ValueError(expected("input_range", "finite with low < high", input_range))


def draw_labels(
    size: Sequence[int], num_classes: int, labels: Labels, device: torch.device
) -> Tensor:  # (*size, num_classes)
    """Label vectors from torch's global generator: classes drawn uniformly, or numbers in [0, 1)."""
    if labels == "soft":
        return torch.rand(*size, num_classes, device=device)
    return one_hot(torch.randint(num_classes, tuple(size), device=device), num_classes)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Labels (...) int64 to float vectors (..., num_classes)."""
    classes = torch.arange(num_classes, device=labels.device)  # F.one_hot reads the labels' range
    return (labels[..., None] == classes).float()
