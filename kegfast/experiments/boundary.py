"""Losses with little data, and decision boundaries (Heo et al. 2019), on MNIST: `kegfast reproduce boundary`.

A LeNet5 of half the width learns from a hundredth and a tenth of the training set, alone and by each loss
from a LeNet5 that saw all of it. Two students of all data, by soft targets and by boundary samples, are
compared by how alike their boundaries are to the teacher's.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kegfast
from kegfast import data
from kegfast.distillation import Term, boundary, fitnets
from kegfast.experiments.ledger import Ledger, spread
from kegfast.loop import mix
from kegfast.models import LeNet5
from kegfast.training import evaluate, train

log = logging.getLogger(__name__)

LOSSES: dict[str, str | list[Term]] = {
    "alone": "hard_label",
    "soft_target": "hard_label+soft_target",
    "logit_regression": "hard_label+logit_regression",
    "noisy_logits": "hard_label+noisy_logits",
    # On the last embedding, as in the paper: on the logits the angles drive this student into one point.
    "rkd": "hard_label+rkd_distance@fc1:25+rkd_angle@fc1:50",
    "hint": "hard_label+soft_target",  # after a stage on conv2's features
    "boundary": [
        Term("hard_label"),
        # The paper's distillation terms lack soft_target's factor T^2.
        Term("soft_target", lambda done: boundary.soft_weight(done) / boundary.TEMPERATURE**2),
        Term("boundary", boundary.boundary_weight),
    ],
}
"""What each student minimises; all of them see the labels."""

HINT_LAYERS = "conv2"


@dataclass(frozen=True)
class Config:
    """What the results depend on.

    Attributes:
        seeds: One run of everything per seed.
        shares: Parts of the training set that students see.
        teacher_epochs: Passes of the teacher over the whole set.
        steps: Of each student, whatever its share; a hint's stage has a third of them on top.
        batch_size: Of all runs.
        lr: First learning rate of Adam.
        compared: Test samples whose perturbations are compared.
        methods: Keys of `LOSSES`.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    shares: tuple[float, ...] = (0.01, 0.1)
    teacher_epochs: int = 10
    steps: int = 3000
    batch_size: int = 128
    lr: float = 1e-3
    compared: int = 1000
    methods: tuple[str, ...] = tuple(LOSSES)


class HalfLeNet5(nn.Sequential):
    """LeNet5 with half the channels: 3, 8 and 60, then 42."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act1, self.pool1 = nn.Conv2d(1, 3, 5), nn.ReLU(), nn.MaxPool2d(2)
        self.conv2, self.act2, self.pool2 = nn.Conv2d(3, 8, 5), nn.ReLU(), nn.MaxPool2d(2)
        self.conv3, self.act3, self.flat = nn.Conv2d(8, 60, 5), nn.ReLU(), nn.Flatten()
        self.fc1, self.act4, self.fc2 = nn.Linear(60, 42), nn.ReLU(), nn.Linear(42, 10)


def run(
    output: str | Path, root: str | Path | None = None, config: Config = Config(), progress: bool = False
) -> dict[str, Any]:
    """Run what is missing of the experiment.

    Args:
        output: A folder for results.json and, while a model trains, its checkpoint. A
            stopped run continues from there.
        root: The folder with `mnist/`; OpenML's copy when None.
        config: What to run.
        progress: Show bars on a terminal.

    Returns:
        Test accuracies in percent and the boundaries' measures, as mean and spread over the seeds.
    """
    splits = data.load("mnist", root)
    output = Path(output)
    ledger = Ledger(output / "results.json", asdict(config))
    runs = [_Run(config, seed, splits, output, ledger, progress).all() for seed in config.seeds]
    return {name: spread([found[name] for found in runs]) for name in runs[0]}


class _Run:
    """All cells of one seed."""

    def __init__(
        self,
        config: Config,
        seed: int,
        splits: data.Splits,
        output: Path,
        ledger: Ledger,
        progress: bool,
    ):
        self.config, self.seed, self.splits = config, seed, splits
        self.output, self.ledger, self.progress = output, ledger, progress
        self.teacher = self._teacher()

    def all(self) -> dict[str, float]:
        found = {"teacher": self._cell("teacher", lambda: evaluate(self.teacher, self.splits.test))}
        for share in self.config.shares:
            for method in self.config.methods:
                name = f"{100 * share:g} %, {method}"
                found[name] = self._cell(name, lambda m=method, s=share: self._accuracy(m, s))
        for method in ("soft_target", "boundary"):
            part = self._cell(f"boundaries, {method}", lambda m=method: self._compare(m))
            found |= {f"boundaries, {method}: {key}": value for key, value in part.items()}
        return found

    def _cell(self, name: str, compute: Callable[[], Any]) -> Any:
        log.info("seed %d: %s", self.seed, name)
        return self.ledger.cell(f"seed {self.seed}: {name}", compute)

    def _teacher(self) -> nn.Module:
        teacher = _seeded(LeNet5, mix(self.seed, 0))
        train(
            teacher,
            self.splits.train,
            epochs=self.config.teacher_epochs,
            batch_size=self.config.batch_size,
            seed=self.seed,
            checkpoint=self.output / f"seed{self.seed}-teacher.pt",
            resume=True,
            progress=self.progress,
        )
        return teacher.eval()

    def _accuracy(self, method: str, share: float) -> float:
        return evaluate(self._student(method, share), self.splits.test)

    def _student(self, method: str, share: float) -> nn.Module:
        """A student; all of a seed begin alike."""
        config = self.config
        student = _seeded(HalfLeNet5, mix(self.seed, 1))
        options = {
            "steps": config.steps,
            "batch_size": config.batch_size,
            "lr": config.lr,
            "temperature": boundary.TEMPERATURE,
            "seed": self.seed,
            "checkpoint": self.output / f"seed{self.seed}-{share:g}-{method}.pt",
            "resume": True,
            "progress": self.progress,
            "loss": LOSSES[method],
        }
        samples = _part(self.splits.train, share, self.seed)
        if method == "hint":
            fitnets(
                student, self.teacher, samples, layers=HINT_LAYERS, hint_steps=config.steps // 3, **options
            )
        else:
            kegfast.distill(student, self.teacher, samples, label=method, **options)
        return student.eval()

    def _compare(self, method: str) -> dict[str, float]:
        """Similarities of the vectors to the teacher's and the student's boundary, all data seen."""
        student = self._student(method, 1.0)
        samples, labels = (x[: self.config.compared] for x in self.splits.test.tensors)
        with torch.no_grad():
            right = [model(samples).argmax(dim=1) == labels for model in (self.teacher, student)]
        samples, labels = (x[right[0] & right[1]] for x in (samples, labels))
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            found = boundary.boundary_samples(self.teacher, samples, labels, count=len(samples))
        theirs = found.samples - samples[found.index]
        ours, reached = boundary.perturbations(student, samples[found.index], found.base, found.target)
        both = found.accepted & reached
        return {
            "accuracy": evaluate(student, self.splits.test),
            "percent of bases that crossed": 100 * float(found.accepted.float().mean()),
            "MagSim": float(boundary.magnitude_similarity(theirs[both], ours[both])),
            "AngSim": float(boundary.angle_similarity(theirs[both], ours[both])),
        }


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def _part(dataset: TensorDataset, share: float, seed: int) -> TensorDataset:
    """The same number of samples of every class, drawn by the seed."""
    samples, labels = dataset.tensors
    if share == 1.0:
        return dataset
    generator = torch.Generator().manual_seed(mix(seed, 2))
    order = torch.randperm(len(labels), generator=generator)
    classes = labels.unique()
    each = round(share * len(labels) / len(classes))
    chosen: list[Tensor] = [order[labels[order] == k][:each] for k in classes]
    return TensorDataset(*(x[torch.cat(chosen)] for x in (samples, labels)))
