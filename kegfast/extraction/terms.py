"""The terms of the objective that a generator is trained on, each with its source.

A term maps a `Generated` to one value per generator. The objective is the weighted sum over terms and
generators: generators share no parameter, so each one's gradient is that of its own terms alone. A term
of weight 0 is never evaluated.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from kegfast.extraction.moments import NormMoments, running_statistics
from kegfast.extraction.teacher import FrozenTeacher
from kegfast.functional import diversity_loss


@dataclass
class Generated:
    """What one step of G generators made of N noise vectors each."""

    labels: Tensor  # (G, N, classes), rows sum to 1
    noise: Tensor  # (G, N, noise_size)
    samples: Tensor  # (G, N, *sample_shape)
    logits: Tensor  # (G, N, classes), the teacher's
    decode: Callable[[Tensor], Tensor]  # samples -> (G, N, noise_size)
    norms: list[NormMoments] = field(default_factory=list)  # of the teacher's BatchNorm layers


class GeneratorTerm(Protocol):
    """One term: a name for the log, a weight, and its value per generator."""

    name: str
    weight: float

    def __call__(self, batch: Generated) -> Tensor: ...  # (G,)


@dataclass
class Classification:
    """Cross-entropy between the labels asked for and the teacher's answer (KegNet, Equation 4)."""

    weight: float = 1.0
    name: str = "classification"

    def __call__(self, batch: Generated) -> Tensor:  # (G,)
        return -(batch.labels * batch.logits.float().log_softmax(-1)).sum(-1).mean(-1)


@dataclass
class Reconstruction:
    """Mean squared error of the decoder's guess of the noise (KegNet, Equation 5)."""

    weight: float = 1.0
    name: str = "reconstruction"

    def __call__(self, batch: Generated) -> Tensor:  # (G,)
        return (batch.noise - batch.decode(batch.samples)).square().mean((1, 2))


@dataclass
class Diversity:
    """exp(-mean pairwise distance), noise-weighted (KegNet, Equation 6): see `diversity_loss`."""

    weight: float = 1.0
    name: str = "diversity"

    def __call__(self, batch: Generated) -> Tensor:  # (G,)
        pairs = zip(batch.noise.unbind(), batch.samples.unbind(), strict=True)
        return torch.stack([diversity_loss(noise, samples) for noise, samples in pairs])


@dataclass
class BatchNormStatistics:
    """Distance of batch moments to those the teacher's BatchNorm layers saw (DeepInversion).

    Yin et al., Dreaming to Distill, CVPR 2020, Equation 4: the sum over layers of
    |mean - running_mean|_2 + |var - running_var|_2. Here in units of each channel's own deviation and
    variance: as written, layers with variances of hundreds outweigh the classification a hundred times,
    and samples get no class. Zero for a teacher without BatchNorm layers.
    """

    weight: float = 0.1
    name: str = "batch_norm"

    def __call__(self, batch: Generated) -> Tensor:  # (G,)
        total = batch.noise.new_zeros(batch.noise.shape[0])
        for layer, mean, variance in batch.norms:
            known_mean, known_variance = running_statistics(layer)
            unit = known_variance + layer.eps
            total = total + _norm((mean - known_mean) / unit.sqrt())
            total = total + _norm((variance - known_variance) / unit)
        return total


def _norm(x: Tensor) -> Tensor:  # (G, C) -> (G,), with a finite gradient at 0
    return (x.square().sum(1) + 1e-12).sqrt()


@dataclass
class TotalVariation:
    """Mean absolute difference of neighboring pixels: a prior for smooth images.

    Rudin, Osher, Fatemi, Physica D 1992, in the anisotropic form; on samples that are no images, 0.
    """

    weight: float = 1.0
    name: str = "total_variation"

    def __call__(self, batch: Generated) -> Tensor:  # (G,)
        x = batch.samples
        if x.dim() != 5:
            return x.new_zeros(x.shape[0])
        rows, columns = x.diff(dim=-2), x.diff(dim=-1)
        return rows.abs().flatten(1).mean(1) + columns.abs().flatten(1).mean(1)


@dataclass
class ClassBalance:
    """Negative entropy of the mean answer: lowest where the teacher sees all classes equally often.

    Chen et al., Data-Free Learning of Student Networks (DAFL), ICCV 2019, Section 3: information entropy.
    """

    weight: float = 1.0
    name: str = "class_balance"

    def __call__(self, batch: Generated) -> Tensor:  # (G,)
        share = batch.logits.float().softmax(-1).mean(1)
        return torch.special.xlogy(share, share).sum(-1)


class Disagreement:
    """-log(1 + mean |student - teacher|) of the logits: draws samples that a student still answers otherwise.

    Fang et al., Data-Free Adversarial Distillation (DFAD), 2019: the adversarial loss of the generator.

    Args:
        student: A model with the teacher's logits; a frozen copy in eval mode is used.
        weight: Of the term.
    """

    name = "disagreement"

    def __init__(self, student: nn.Module, weight: float = 1.0):
        self.student, self.weight = FrozenTeacher(student, watch=False), weight

    def __call__(self, batch: Generated) -> Tensor:  # (G,)
        answers = self.student(batch.samples.flatten(0, 1))[0].unflatten(0, batch.logits.shape[:2])
        return -(answers.float() - batch.logits.float()).abs().mean((1, 2)).log1p()
