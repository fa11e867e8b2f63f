"""Hinton, Vinyals and Dean (2015), section 3, on MNIST: `kegfast reproduce hinton`.

Errors of a thousand-unit teacher, of a smaller student trained alone and distilled; of students whose
transfer set lacks the 3s, or holds 7s and 8s alone; and of a student of five teachers.
"""

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import kegfast
from kegfast.data.catalog import ENTRIES, load_entry
from kegfast.data.splits import DataInfo, Splits
from kegfast.distillation import Ensemble, InMemory
from kegfast.experiments.ledger import Ledger, spread
from kegfast.loop import mix
from kegfast.training import train

log = logging.getLogger(__name__)

CLASSES = 10


@dataclass(frozen=True)
class Config:
    """What the results depend on.

    Attributes:
        seeds: One run of everything per seed.
        teacher_units: Width of the teacher's two hidden layers, as in the paper.
        student_units: The student's, as in the paper.
        dropout: The teacher's, on its hidden layers.
        jitter: Pixels by which the teacher's images move.
        teacher_epochs: Passes of the teacher over the training set.
        student_epochs: Passes of each student; all have the same number of steps.
        batch_size: Of all runs.
        temperature: The paper's for 300 units and more.
        alpha: Weight of the soft targets against the labels.
        ensemble: Teachers of the last student; 1 leaves it out.
        amp: Train in bfloat16 where that is safe.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    teacher_units: int = 1200
    student_units: int = 800
    dropout: float = 0.5
    jitter: int = 2
    teacher_epochs: int = 60
    student_epochs: int = 40
    batch_size: int = 128
    temperature: float = 20.0
    alpha: float = 0.9
    ensemble: int = 5
    amp: bool = False


def run(
    output: str | Path, root: str | Path | None = None, config: Config = Config(), progress: bool = False
) -> dict:
    """Run what is missing of the experiment.

    Args:
        output: A folder for results.json and, while a model trains, its checkpoint. A
            stopped run continues from there.
        root: The folder with `mnist/`; OpenML's copy when None.
        config: What to run.
        progress: Show bars on a terminal.

    Returns:
        Test errors out of 10,000 as mean and spread over the seeds, by name.
    """
    entry = ENTRIES["mnist"]
    info = entry.info
    flat = DataInfo(info.name, info.num_classes, (1, 28, 28), info.mean, info.std)
    splits = load_entry(replace(entry, info=flat), None if root is None else Path(root))
    output = Path(output)
    ledger = Ledger(output / "results.json", asdict(config))
    runs = [_Run(config, seed, splits, output, ledger, progress).all() for seed in config.seeds]
    return {name: spread([found[name] for found in runs]) for name in runs[0]}


class _Run:
    """All cells of one seed; models that another cell needs are kept as files."""

    def __init__(
        self, config: Config, seed: int, splits: Splits, output: Path, ledger: Ledger, progress: bool
    ):
        self.config, self.seed, self.splits, self.output = config, seed, splits, output
        self.ledger, self.progress = ledger, progress
        self.steps = config.student_epochs * (len(splits.train) // config.batch_size)

    def all(self) -> dict[str, float]:
        teacher = self._teacher(0)
        cells = {
            "teacher": lambda: self._errors(teacher),
            "student alone": lambda: self._errors(self._distil(teacher, "alone", alpha=0.0)),
            "distilled": lambda: self._errors(self._distil(teacher, "distilled")),
        }
        found = {name: self._cell(name, compute) for name, compute in cells.items()}
        for name, kept in (("without 3", [0, 1, 2, 4, 5, 6, 7, 8, 9]), ("7 and 8 only", [7, 8])):
            part = self._cell(name, lambda name=name, kept=kept: self._missing(teacher, name, kept))
            found |= {f"{name}: {key}": value for key, value in part.items()}
        if self.config.ensemble > 1:
            found |= self._ensemble()
        return found

    def _cell(self, name: str, compute):
        log.info("seed %d: %s", self.seed, name)
        return self.ledger.cell(f"seed {self.seed}: {name}", compute)

    def _teacher(self, member: int) -> nn.Module:
        config = self.config
        seed = mix(self.seed, member)
        model = _network(config.teacher_units, seed, config.dropout)
        train(
            model,
            self.splits.train,
            epochs=config.teacher_epochs,
            batch_size=config.batch_size,
            lr=1e-3,
            weight_decay=0.0,
            shift=config.jitter,
            amp=config.amp,
            seed=seed,
            checkpoint=self.output / f"seed{self.seed}-teacher{member}.pt",
            resume=True,
            progress=self.progress,
        )
        return model

    def _distil(
        self, teacher: nn.Module, name: str, kept: list[int] | None = None, alpha: float | None = None
    ) -> nn.Module:
        """A student; all of them begin alike and make the same number of steps."""
        config = self.config
        student = _network(config.student_units, mix(self.seed, 100))
        samples, labels = self.splits.train.tensors
        if kept is not None:
            chosen = torch.isin(labels, torch.tensor(kept))
            samples, labels = samples[chosen], labels[chosen]
        kegfast.distill(
            student,
            teacher,
            InMemory(samples, labels),
            steps=self.steps,
            batch_size=config.batch_size,
            temperature=config.temperature,
            alpha=config.alpha if alpha is None else alpha,
            amp=config.amp,
            seed=self.seed,
            checkpoint=self.output / f"seed{self.seed}-{name.replace(' ', '-')}.pt",
            resume=True,
            progress=self.progress,
            label=name,
        )
        return student

    def _missing(self, teacher: nn.Module, name: str, kept: list[int]) -> dict[str, float]:
        """Errors of a student that never saw some classes, before and after moving their biases.

        The paper shifts the biases of what was shown too often or never by what serves the test set
        best; here the shift makes these classes as frequent among the unlabelled validation images as
        the teacher finds them.
        """
        student = self._distil(teacher, name, kept)
        absent = [k for k in range(CLASSES) if k not in kept]
        moved = min(kept, absent, key=len)
        images = self.splits.val.tensors[0]
        shift = _balance(_logits(student, images), _logits(teacher, images), moved)
        logits, labels = _logits(student, self.splits.test.tensors[0]), self.splits.test.tensors[1]
        found = {"errors": _wrong(logits, labels)}
        logits = logits + shift * _columns(moved)
        mine = torch.isin(labels, torch.tensor(moved))
        right = float((logits.argmax(dim=1) == labels)[mine].float().mean())
        return {
            **found,
            "errors after the shift": _wrong(logits, labels),
            "percent right of the moved classes": 100 * right,
            "shift": shift,
        }

    def _ensemble(self) -> dict[str, float]:
        members = [self._teacher(member) for member in range(self.config.ensemble)]
        together = Ensemble(members, temperature=self.config.temperature)
        return {
            "ensemble": self._cell("ensemble", lambda: self._errors(together)),
            "distilled from the ensemble": self._cell(
                "distilled from the ensemble", lambda: self._errors(self._distil(together, "ensemble"))
            ),
        }

    def _errors(self, model: nn.Module) -> int:
        samples, labels = self.splits.test.tensors
        return _wrong(_logits(model, samples), labels)


def _network(units: int, seed: int, dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, units),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(units, units),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(units, CLASSES),
        )


def _logits(model: nn.Module, samples: Tensor) -> Tensor:
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(part) for part in samples.split(1000)])


def _wrong(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(dim=1) != labels).sum())


def _balance(student: Tensor, teacher: Tensor, classes: list[int]) -> float:
    """The bias that lets the student choose these classes as often as the teacher does."""
    columns = _columns(classes)
    often = int(torch.isin(teacher.argmax(dim=1), torch.tensor(classes)).sum())
    low, high = -50.0, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        chosen = (student + middle * columns).argmax(dim=1)
        if int(torch.isin(chosen, torch.tensor(classes)).sum()) < often:
            low = middle
        else:
            high = middle
    return high


def _columns(classes: list[int]) -> Tensor:  # (C,)
    """1 for these classes, 0 for the others."""
    return torch.zeros(CLASSES).index_fill_(0, torch.tensor(classes), 1.0)
