"""What the students of the paper's tables are taught with, by the name of the method."""

import time
from dataclasses import replace
from pathlib import Path
from zlib import crc32

from torch import Tensor, nn

from kegfast._util.check import expected
from kegfast._util.files import read_tensors, save_tensors
from kegfast.data import DataInfo
from kegfast.data.splits import Samples
from kegfast.distillation import GaussianNoise, InMemory, Pool, UniformNoise
from kegfast.distillation.sources import Source, drawn
from kegfast.experiments.ledger import Ledger
from kegfast.experiments.paper import Config, Paper
from kegfast.extraction import RECIPES, Generators, extract
from kegfast.extraction.parallel import own_path
from kegfast.extraction.procedural import DeadLeaves
from kegfast.recovery.pixels import Pixels
from kegfast.recovery.samples import MadeSamples, amounts, drawing
from kegfast.recovery.subject import examine
from kegfast.training.loop import mix
from kegfast.training.processes import place

FEWER = 5
"""The paper's noise has so many times fewer samples: one generator's."""
PROBES = ("uniform", "gaussian", "procedural", "kegnet")
"""Sources on which the agreement of a student is reported that was taught with another."""
MADE_OF = {"kegfast": ("procedural", "gaussian")}
"""Sources that a recipe draws from, and on which its students' agreement says little."""


class Sources:
    """The sources of one data set, teacher and seed; what must be trained is, when it is first asked for.

    Args:
        paper: the data set's experiment.
        info: its samples' shape and normalization.
        teacher: in eval mode.
        train: real samples for the oracle, or None where there are none.
        output: folder for the generators.
        ledger: keeps the generators' CPU seconds and curves.
        config: budgets.
        seed: of all draws.
        progress: show bars on a terminal.
    """

    def __init__(
        self,
        paper: Paper,
        info: DataInfo,
        teacher: nn.Module,
        train: Samples | None,
        output: Path,
        ledger: Ledger,
        config: Config,
        seed: int,
        progress: bool = False,
    ):
        self.paper, self.info, self.teacher, self.train = paper, info, teacher, train
        self.output, self.ledger, self.config = output, ledger, config
        self.seed, self.progress = seed, progress
        self.subject = examine(teacher, info.sample_shape, info.num_classes)
        pixels = Pixels(info.mean, info.std, f"of {info.name}") if info.mean else None
        usual = amounts(self.subject)
        counts = replace(usual, pool=config.pool, judged=min(usual.judged, config.probe))
        self.artificial = MadeSamples(self.subject, pixels, seed, counts=counts)
        self._probes: dict[str, Tensor] = {}
        self._judge: Tensor | None = None

    @property
    def as_published(self) -> bool:
        """Whether the authors' program is followed."""
        return self.config.protocol == "paper"

    def pool(self, method: str) -> tuple[InMemory, float]:
        """The samples of a method, and the CPU seconds that making them took, training included."""
        source = self.source(method)  # training, if any, keeps its own time
        start = time.process_time()
        with drawing(self.seed, method):
            if self.as_published and isinstance(source, Generators):
                pool = InMemory(source.sample(self._size(method), shuffle=False)[0])
            else:
                pool = Pool(source, self._size(method))
        return pool, time.process_time() - start + self._training_seconds(method)

    def _size(self, method: str) -> int:
        fewer = self.as_published and method in ("uniform", "gaussian")
        return max(1, self.config.pool // FEWER) if fewer else self.config.pool

    def probes(self, method: str) -> dict[str, Tensor]:
        """Held-out samples of the sources that `method` does not draw from.

        Generators of the published budget take hours, and are trained only for their own students.
        """
        own = MADE_OF.get(method, (method,))
        known = PROBES[:-1] if self.as_published else PROBES
        names = [name for name in known if name not in own and self.has(name)]
        for name in names:
            if name not in self._probes:
                self._probes[name] = self.draw(name, self.config.probe)
        return {name: self._probes[name] for name in names}

    def judge(self) -> Tensor:
        """Held-out samples that the teacher takes for its classes in turn; any student is judged by them.

        What it answers to noise or dead leaves falls mostly into a few classes, and a student that has
        forgotten the others may be the closest there.
        """
        if self._judge is None:
            self._judge = self.artificial.judge()
        return self._judge

    def draw(self, method: str, n: int) -> Tensor:
        """`n` samples of a method that are in no pool."""
        source = self.source(method)
        with drawing(self.seed, f"{method} held out"):
            return drawn(source, n)

    def calibration(self) -> Tensor:
        """What the default recipe solves factors on."""
        if self.artificial.is_matched:
            self.matched()
        return self.artificial.calibration()

    def has(self, method: str) -> bool:
        """Whether there is such a source: no dead leaves for tables, no oracle without data."""
        if method == "procedural":
            return not self.paper.tabular
        return method != "oracle" or self.train is not None

    def source(self, method: str) -> Source:
        """The source of a method; noise has the mean 0 and the variance 1 of normalized data."""
        shape = self.info.sample_shape
        if method == "uniform":
            return UniformNoise(shape, -(3**0.5), 3**0.5)
        if method == "gaussian":
            return GaussianNoise(shape)
        if method == "procedural":
            return DeadLeaves(shape, self.info.mean, self.info.std)
        if method == "oracle":
            if self.train is None:
                raise ValueError(expected("method", "one that needs no data", method))
            return InMemory(self.train.tensors[0])
        if method == "kegfast":
            if self.artificial.is_matched:
                self.matched()
            return self.artificial.source()
        return self.generators()

    def generators(self) -> Generators:
        """The paper's generators, trained where there are none yet."""
        path = self._generators_file
        if self.trained:
            return Generators.load(path)
        start = time.process_time()
        checkpoint = path.with_suffix(".pt")
        own = self.paper.published if self.as_published else self.paper
        recipe = replace(
            RECIPES["paper"],
            lr=own.generator_lr,
            beta=own.beta,
            steps=self.config.generator_steps,
            batch_size=self.config.generator_batch,
        )
        made = extract(
            self.teacher,
            num_classes=self.info.num_classes,
            sample_shape=self.info.sample_shape,
            recipe=recipe,
            faithful=self.as_published,
            seed=mix(self.seed, crc32(b"generators")),
            amp=self.config.amp,
            checkpoint=checkpoint,
            resume=True,
            progress=self.progress,
            label="generators",
        )
        seconds = time.process_time() - start
        self.ledger.cell(self.key, lambda: {"seconds": seconds, "history": made.history})
        made.save(path)
        own_path(checkpoint, *place()).unlink(missing_ok=True)
        return made

    def matched(self) -> Tensor:
        """Samples with the teacher's BatchNorm statistics, made where there are none yet."""
        path = self.output / f"matched-{self.seed}.safetensors"
        if "matched" not in self.artificial.kept and path.exists():
            self.artificial.keep({"matched": read_tensors(path)[0]["samples"]})
        if "matched" in self.artificial.kept:
            return self.artificial.matched("matched")
        start = time.process_time()
        made = self.artificial.matched("matched")
        seconds = time.process_time() - start
        self.ledger.cell(self._matched, lambda: {"seconds": seconds})
        save_tensors(path, {"samples": made})
        return made

    @property
    def _generators_file(self) -> Path:
        return self.output / f"generators-{self.seed}.safetensors"

    @property
    def trained(self) -> bool:
        """Whether there are generators."""
        return self._generators_file.exists()

    @property
    def key(self) -> str:
        """The generators' cell in the ledger."""
        return f"generators/{self.seed}"

    def made(self, method: str) -> bool:
        """Whether drawing from a source costs no more than the draw."""
        key = self._training(method)
        return key is None or key in self.ledger.cells

    def _training(self, method: str) -> str | None:
        """The cell of what must be trained before a method has samples."""
        if method == "kegnet":
            return self.key
        return self._matched if method == "kegfast" and self.artificial.is_matched else None

    @property
    def _matched(self) -> str:
        return f"matched/{self.seed}"

    def _training_seconds(self, method: str) -> float:
        key = self._training(method)
        return self.ledger.cells[key]["seconds"] if key in self.ledger.cells else 0.0
