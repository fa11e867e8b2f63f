"""What the students of the paper's tables are taught with, by the name of the method."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn

from kegfast._util.files import read_tensors, save_tensors
from kegfast.compression.matching import match_statistics
from kegfast.data import DataInfo
from kegfast.data.splits import Samples
from kegfast.distillation import Augmented, GaussianNoise, InMemory, Mixture, Pool, UniformNoise
from kegfast.distillation.sources import Source
from kegfast.experiments.ledger import Ledger
from kegfast.experiments.paper import Config, Paper
from kegfast.extraction import RECIPES, Generators, extract
from kegfast.extraction.class_sums import ClassSums
from kegfast.extraction.familiar import Familiar
from kegfast.extraction.parallel import own_path
from kegfast.extraction.procedural import Blobs, DeadLeaves, bent
from kegfast.training import random_shift
from kegfast.training.loop import mix
from kegfast.training.processes import place

FEWER = 5
"""The paper's noise has so many times fewer samples: one generator's."""
PROBES = ("uniform", "gaussian", "procedural", "kegnet")
"""Sources on which the agreement of a student is reported that was taught with another."""
MADE_OF = {"kegfast": ("procedural", "gaussian")}
"""Sources that a recipe draws from, and on which its students' agreement says little."""
MANY = 16
"""The most leaves on an image of the family that has many."""
MATCHED = 512
"""Dead leaves that are changed until a teacher's BatchNorm finds them familiar, and shown in many places."""
JUDGED = 256
"""Others that are changed so; they judge the students of a teacher with BatchNorm."""
SHIFT = 2
"""By how many pixels at most, and as often mirrored as not: leaves fall anywhere."""


class Sources:
    """The sources of one data set, teacher and seed; what must be trained is, when it is first asked for.

    Args:
        paper: the data set's experiment.
        info: its samples' shape and normalisation.
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
        self._probes: dict[str, Tensor] = {}
        self._judge: Tensor | None = None

    def pool(self, method: str) -> tuple[Pool, float]:
        """The samples of a method, and the CPU seconds that making them took, training included."""
        source = self.source(method)  # training, if any, keeps its own time
        start = time.process_time()
        with _seeded(self.seed, method):
            pool = Pool(source, self._size(method))
        return pool, time.process_time() - start + self._training_seconds(method)

    def _size(self, method: str) -> int:
        fewer = self.config.protocol == "paper" and method in ("uniform", "gaussian")
        return max(1, self.config.pool // FEWER) if fewer else self.config.pool

    def probes(self, method: str) -> dict[str, Tensor]:
        """Held-out samples of the sources that `method` does not draw from."""
        own = MADE_OF.get(method, (method,))
        names = [name for name in PROBES if name not in own and self.has(name)]
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
            with _seeded(self.seed, "judge"):
                if self.has_norms:
                    self._judge = self._match(min(JUDGED, self.config.probe))
                else:
                    self._judge = self._familiar().sample(self.config.probe)[0]
        return self._judge

    def _familiar(self) -> Source:
        if self.paper.tabular:
            return self.source("kegfast")
        return Familiar(self.source("procedural"), self.teacher, self.info.num_classes)

    def draw(self, method: str, n: int) -> Tensor:
        """`n` samples of a method that are in no pool."""
        source = self.source(method)
        with _seeded(self.seed, f"{method} held out"):
            return source.sample(n)[0]

    def calibration(self, n: int) -> Tensor:
        """What the default recipe solves factors on: `n` samples, matched ones as they were matched."""
        return self.matched()[:n] if self.has_norms else self.draw("kegfast", n)

    def has(self, method: str) -> bool:
        """Whether there is such a source: no dead leaves for tables, no oracle without data."""
        if method == "procedural":
            return not self.paper.tabular
        return method != "oracle" or self.train is not None

    def source(self, method: str) -> Source:
        """The source of a method; noise has the mean 0 and the variance 1 of normalised data."""
        shape = self.info.sample_shape
        if method == "uniform":
            return UniformNoise(shape, -(3**0.5), 3**0.5)
        if method == "gaussian":
            return GaussianNoise(shape)
        if method == "procedural":
            return DeadLeaves(shape, self.info.mean, self.info.std)
        if method == "oracle":
            return InMemory(self.train.tensors[0])
        if method == "kegfast" and self.paper.tabular:
            return ClassSums(self.teacher, self.info.num_classes, GaussianNoise(shape))
        if method == "kegfast":
            if self.has_norms:
                return Augmented(InMemory(self.matched()), _moved)
            return Mixture(list(self.kinds().values()))
        generators = self.generators()
        generators.labels = "soft" if self.config.protocol == "paper" else "one-hot"
        return generators

    def kinds(self) -> dict[str, Source]:
        """The kinds of artificial images that the default recipe mixes in equal shares for a network without
        BatchNorm: each leaves a student free where another holds it."""
        kind = self.info.sample_shape, self.info.mean, self.info.std
        return {
            "many leaves": DeadLeaves(*kind, most=MANY),
            "bent leaves": Augmented(DeadLeaves(*kind), bent),
            "blobs": Blobs(*kind),
            "leaves moved towards classes": self._familiar(),
        }

    def generators(self) -> Generators:
        """The paper's generators, trained where there are none yet."""
        path = self.output / f"generators-{self.seed}.safetensors"
        if path.exists():
            return Generators.load(path)
        start = time.process_time()
        checkpoint = path.with_suffix(".pt")
        recipe = replace(
            RECIPES["paper"],
            learning_rate=self.paper.generator_lr,
            beta=self.paper.beta,
            steps=self.config.generator_steps,
            batch_size=self.config.generator_batch,
        )
        made = extract(
            self.teacher,
            num_classes=self.info.num_classes,
            sample_shape=self.info.sample_shape,
            recipe=recipe,
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

    @property
    def has_norms(self) -> bool:
        """Whether the teacher remembers statistics of its data."""
        return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in self.teacher.modules())

    def matched(self) -> Tensor:
        """Dead leaves with the teacher's BatchNorm statistics, made where there are none yet."""
        path = self.output / f"matched-{self.seed}.safetensors"
        if path.exists():
            return read_tensors(path)[0]["samples"]
        start = time.process_time()
        with _seeded(self.seed, "matched"):
            made = self._match(MATCHED)
        seconds = time.process_time() - start
        self.ledger.cell(self._training("kegfast"), lambda: {"seconds": seconds})
        save_tensors(path, {"samples": made})
        return made

    def _match(self, n: int) -> Tensor:
        left, parts = self.source("procedural").sample(n)[0], []
        while len(left):
            parts.append(match_statistics(self.teacher, left))
            left = left[len(parts[-1]) :]
        return torch.cat(parts)

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
        return f"matched/{self.seed}" if method == "kegfast" and self.has_norms else None

    def _training_seconds(self, method: str) -> float:
        key = self._training(method)
        return self.ledger.cells[key]["seconds"] if key in self.ledger.cells else 0.0


def _moved(images: Tensor) -> Tensor:  # (N, C, H, W)
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return random_shift(torch.where(mirrored, images.flip(3), images), SHIFT)


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """Draw from torch's generator as (seed, name) has it; give it back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, crc32(name.encode())))
        yield
