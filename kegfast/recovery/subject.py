"""What is known about the classifier that is to become small."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.logits import are_probabilities
from kegfast._util.modules import evaluation
from kegfast.compression.norms import has_norms
from kegfast.training.loop import seeded

PROBES = 8
"""Samples of noise that a model is first shown."""


class Logarithm(nn.Module):
    """A model's probabilities as logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        probabilities: Tensor = self.model(x)
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


@dataclass(frozen=True)
class Subject:
    """A trained classifier.

    Attributes:
        model: in eval mode; its outputs are logits, log-probabilities or probabilities.
        sample_shape: of one input, without the batch.
        num_classes: how many outputs.
        probabilities: whether they are probabilities: there is a softmax inside.
    """

    model: nn.Module
    sample_shape: tuple[int, ...]
    num_classes: int
    probabilities: bool

    @property
    def kind(self) -> Literal["image", "row", "other"]:
        """What a sample is, as far as its shape tells: (C, H, W), (F,) or neither."""
        dimensions = len(self.sample_shape)
        return "image" if dimensions == 3 else "row" if dimensions == 1 else "other"

    @property
    def numbers(self) -> int:
        """Numbers of a sample."""
        return torch.Size(self.sample_shape).numel()

    @cached_property
    def has_norms(self) -> bool:
        """Whether the model remembers statistics of its data."""
        return has_norms(self.model)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def digest(self) -> str:
        """Of the model's weights and buffers, by their names."""
        digest = blake2b(digest_size=16)
        for name, tensor in self.model.state_dict().items():
            if isinstance(tensor, Tensor):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def logits(self, model: nn.Module) -> nn.Module:
        """This model, or one made of it, as a module that gives logits."""
        return Logarithm(model) if self.probabilities else model

    @cached_property
    def teacher(self) -> nn.Module:
        """The model as a module that gives logits."""
        return self.logits(self.model)


def examine(model: nn.Module, sample_shape: Sequence[int], num_classes: int | None = None) -> Subject:
    """Runs the model once, on noise.

    Args:
        model: a trained classifier.
        sample_shape: of one input.
        num_classes: how many outputs are expected; None takes what comes.

    Raises:
        TypeError, ValueError: `model` is no classifier of one tensor of logits or probabilities, it does not
            take samples of that shape, or an argument is no such thing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    shape = check.sizes("sample_shape", sample_shape)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if like.dtype != torch.float32:
        raise TypeError(expected("model", "of float32 weights, as model.float() makes it", like.dtype))
    with seeded(0):
        noise = torch.randn(PROBES, *shape).to(like)
    with torch.no_grad(), evaluation(model):
        try:
            output = model(noise)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            reason = " ".join(str(error).split())
            what = f"a shape that the model takes, without the batch ({reason})"
            raise ValueError(expected("sample_shape", what, shape)) from error
    found = _classes(output)
    if num_classes is not None and check.count("num_classes", num_classes, least=2) != found:
        raise ValueError(expected("num_classes", f"{found}, the model's outputs,", num_classes))
    return Subject(model, shape, found, are_probabilities(output))


def _classes(output: Any) -> int:
    """How many classes the outputs of a model on `PROBES` samples tell apart."""
    what = f"a classifier that returns one tensor of logits (N, classes), here ({PROBES}, classes)"
    if not isinstance(output, Tensor):
        hint = ": wrap it in a module that returns its logits"
        raise TypeError(expected("model", what + hint, output))
    if output.dim() != 2 or len(output) != PROBES or not output.is_floating_point():
        raise ValueError(expected("model", what, output))
    if output.shape[1] < 2:
        raise ValueError(expected("model", "a classifier of two classes or more", output))
    if not bool(output.isfinite().all()):
        raise ValueError("model must give finite logits, got NaN or infinity for Gaussian noise")
    return output.shape[1]
