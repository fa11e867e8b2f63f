"""The experiments of KegNet (Yoo et al., NeurIPS 2019): teachers, students and what was published."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypedDict

from torch import nn

from kegfast._util.check import expected
from kegfast.experiments.epochs import Epochs
from kegfast.models import MLP, LeNet5, ResNet14
from kegfast.recovery.subject import Subject
from kegfast.recovery.teaching import STRUCTURED as IMAGES
from kegfast.recovery.teaching import lessons

Ranks = Mapping[str, tuple[int, int]]

METHODS = ("tucker-only", "uniform", "gaussian", "procedural", "kegnet", "kegfast", "oracle")
"""What a compressed student is taught with: nothing, noise, dead leaves, the published generators, the
default recipe, real unlabeled training samples. The default recipe teaches with artificial images of several
kinds, for tables with sums of Gaussian rows of one class, and by budget solves the factors on them first."""
PUBLISHED = ("tucker-only", "uniform", "gaussian", "kegnet")
"""Those of the paper."""


@dataclass(frozen=True)
class Student:
    """One student of the paper.

    Attributes:
        ranks: (in_rank, out_rank) by layer name or pattern.
        published: accuracy in percent by method, as far as it is known here.
    """

    ranks: Ranks
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """What a result depends on besides the data set, the student, the method and the seed.

    Attributes:
        pool: different samples that a student sees, whatever the method.
        steps: its optimizer steps.
        batch_size: samples of a step.
        temperature: of the KL divergence from the teacher.
        generator_steps: steps of the generators, all of them at once.
        generator_batch: samples per generator and step.
        probe: held-out samples per source that students are judged by.
        protocol: "equal", or "paper": as the authors' program does it, see `Published`; `steps` are then the
            most, and noise has five times fewer samples. A data set's budget of that name is `PROTOCOLS`'.
        amp: compute in bfloat16 where torch's autocast deems it safe.
    """

    pool: int
    steps: int
    batch_size: int = 128
    temperature: float = 1.0
    generator_steps: int = 1_000
    generator_batch: int = 64
    probe: int = 2_000
    protocol: Literal["equal", "paper"] = "equal"
    amp: bool = False

    def identity(self) -> dict[str, Any]:
        """What results depend on; options at their default are left out, as in files from before them."""
        later = {"protocol": "equal", "amp": False}
        return {name: v for name, v in asdict(self).items() if name not in later or v != later[name]}


PROTOCOLS: dict[str, dict[str, int]] = {
    "equal": {},
    "paper": {
        "pool": 32_000, "steps": 200_000, "batch_size": 64,
        "generator_steps": 20_000, "generator_batch": 256,
    },
}  # fmt: skip
"""Budgets by protocol: the data set's own, or the published one: 5 generators times 6,400 samples, seen in
400 epochs of 500 steps."""


@dataclass(frozen=True)
class Published:
    """What the authors' program does otherwise for one data set than for another.

    The rest is the same for all: generators of one-hot labels, trained against a teacher in train mode;
    students in train mode, taught at a constant rate with samples that are drawn once and not shuffled.

    Attributes:
        beta: weight of the generators' diversity term; the decoder's is 1.
        generator_lr: the generators' learning rate.
        lr: that of students, with the generators' samples.
        noise_lr: the same, with noise.
    """

    beta: float
    generator_lr: float
    lr: float = 1e-4
    noise_lr: float = 1e-4

    def epochs(self, method: str) -> Epochs:
        """How students are taught with the samples of a method: there are as many steps of either at most."""
        if method == "kegnet":
            return Epochs(self.lr, most=400)
        return Epochs(self.noise_lr, most=1_000)


@dataclass(frozen=True)
class Schedule:
    """How a student is taught: one leg of Adam and a cosine per learning rate, the steps shared equally.

    The end of every leg, and the start, are candidates for the choice without data.

    Attributes:
        rates: the learning rate at the start of each leg.
        batchnorm: the mode of the student's BatchNorm layers; see `kegfast.distill`.
        hints: whether blocks are taught the teacher's features too; see `kegfast.recovery.teaching`.
        loss: its text where there are no hints; see `kegfast.distillation.objective`.
        steps: in place of a table's.
    """

    rates: tuple[float, ...]
    batchnorm: Literal["train", "eval"]
    hints: bool = False
    loss: str = "soft_target"
    steps: int | None = None


STRUCTURED = Schedule((IMAGES.rate,), IMAGES.batchnorm)
"""For samples that look like images: a student cannot learn too much from them."""
HINTED = replace(STRUCTURED, hints=True)
"""The same where BatchNorm tells what they shall look like."""
NOISE = Schedule((1e-5, 1e-4, 1e-3), "eval")
"""For noise and KegNet's samples, from which a student drifts away when it learns fast."""


class Training(TypedDict, total=False):
    """Arguments of `kegfast.training.train`."""

    steps: int
    epochs: float
    shift: int


@dataclass(frozen=True)
class Paper:
    """One data set of the paper.

    Attributes:
        dataset: the name that `kegfast.data.load` takes.
        model: the teacher's architecture.
        build: makes an untrained teacher.
        students: by number.
        config: the budget of every student and method.
        teacher: the published teacher's accuracy.
        beta: weight of the generators' diversity term.
        published: the same as published, and more; see `Published`.
        generator_lr: the generators' learning rate.
        training: arguments of `kegfast.training.train` for a teacher that is trained here.
        shared: the layers before the first that any of its students compresses, from the input on.
    """

    dataset: str
    model: str
    build: Callable[[], nn.Module]
    students: Mapping[int, Student]
    config: Config
    teacher: float
    beta: float
    published: Published
    generator_lr: float = 1e-3
    training: Training = field(default_factory=Training)
    shared: tuple[str, ...] = ()

    @property
    def tabular(self) -> bool:
        """Whether the samples are rows of a table."""
        return self.model == "MLP"


def schedule(subject: Subject, method: str, ranks: str = "paper") -> Schedule:
    """How students of a network are taught with the samples of a method."""
    if subject.kind == "image" and method in ("uniform", "gaussian", "kegnet"):
        return NOISE
    plan = lessons(subject)[0]
    if not plan.hints:
        return Schedule((plan.rate,), plan.batchnorm)
    if ranks == "paper":  # so few ranks of a few layers leave much to be learnt
        return HINTED
    return Schedule((plan.rate,), plan.batchnorm, hints=True, steps=plan.steps)


def _kegnet(
    ranks: Ranks, tucker: float, uniform: float | None, gaussian: float | None, kegnet: float
) -> Student:
    published = {"tucker-only": tucker, "uniform": uniform, "gaussian": gaussian, "kegnet": kegnet}
    return Student(ranks, {method: value for method, value in published.items() if value is not None})


_CONV1 = {"layers3.0.conv1": (8, 11), "layers3.1.conv1": (15, 15)}
_CONV2 = {"layers3.0.conv2": (24, 10), "layers3.1.conv2": (21, 18)}
_BEFORE = ("conv1", "norm1", "layers1", "layers2")
_SVHN1 = {"layers3.0.conv1": (2, 2), "layers3.1.conv1": (10, 9)}
_SVHN2 = {"layers3.0.conv2": (8, 7), "layers3.1.conv2": (21, 10)}


def _table(
    dataset: str,
    features: int,
    classes: int,
    rank: int,
    steps: int,
    teacher: float,
    *published: float,
    pool: int = 32_768,
) -> Paper:
    tucker, gaussian, kegnet = published
    return Paper(
        dataset, "MLP", lambda: MLP(features, classes),
        {1: _kegnet({"*": (rank, rank)}, tucker, None, gaussian, kegnet)},
        Config(pool=pool, steps=steps, generator_steps=600),
        teacher, beta=10.0, published=Published(0.0, 1e-4), training={"steps": 8_000},
    )  # fmt: skip


PAPERS = {
    paper.dataset: paper
    for paper in (
        Paper(
            "mnist", "LeNet5", LeNet5,
            {
                1: _kegnet({"conv3": (7, 11)}, 85.18, 95.48, 95.45, 96.32),
                2: _kegnet({"conv2": (3, 4), "conv3": (7, 11)}, 67.35, 88.27, 87.70, 90.89),
                3: _kegnet({"conv2": (3, 4), "conv3": (5, 8)}, 50.01, 69.89, 71.76, 89.94),
            },
            Config(pool=65_536, steps=2_000, generator_steps=600),
            98.90, beta=0.0, published=Published(0.0, 1e-3, 1e-5, 1e-6), training={"epochs": 5, "shift": 2},
        ),
        Paper(
            "fashion-mnist", "ResNet14", ResNet14,
            {
                1: _kegnet(_CONV1, 65.09, None, None, 85.23),
                2: _kegnet(_CONV2, 75.80, None, None, 87.80),
                3: _kegnet(_CONV1 | _CONV2, 46.55, None, None, 79.95),
            },
            Config(pool=8_192, steps=800, generator_steps=400, probe=500),
            92.50, beta=10.0, published=Published(10.0, 1e-2), generator_lr=1e-2,
            training={"epochs": 8, "shift": 2},
            shared=_BEFORE,
        ),
        Paper(
            "svhn", "ResNet14", lambda: ResNet14(in_channels=3),
            {
                1: _kegnet(_SVHN1, 19.31, None, None, 69.89),
                2: _kegnet(_SVHN2, 11.02, None, None, 87.26),
                3: _kegnet(_SVHN1 | _SVHN2, 11.07, None, None, 63.40),
            },
            Config(pool=32_768, steps=1_500, generator_steps=500),
            93.23, beta=1.0, published=Published(1.0, 1e-2), generator_lr=1e-2,
            training={"epochs": 8, "shift": 2},
            shared=_BEFORE,
        ),
        _table("pendigits", 16, 10, 5, 3_000, 96.56, 26.44, 78.22, 82.62),
        _table("letter", 16, 26, 10, 6_000, 95.63, 31.40, 76.80, 77.73, pool=65_536),
        _table("shuttle", 9, 7, 5, 1_000, 99.83, 75.49, 94.00, 94.21),
    )
}  # fmt: skip


def paper(dataset: str) -> Paper:
    """The experiment on one data set.

    Raises:
        ValueError: the paper has none of that name.
    """
    if dataset not in PAPERS:
        raise ValueError(expected("dataset", f"one of {', '.join(PAPERS)}", dataset))
    return PAPERS[dataset]
