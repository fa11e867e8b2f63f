"""The main job from end to end on data that ships with scikit-learn: minutes on two cores.

A teacher is trained, knowledge is extracted from it, three students are cut from it, and each is taught with
samples from every source: none, noise, generators, and, as the bound, real unlabeled data. All of these get
the same schedule and the same number of samples. `kegfast.shrink` makes students of the same sizes its own
way, without data.
"""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kegfast import data
from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.files import load_weights, save_tensors, write_json
from kegfast._util.modules import channels_last
from kegfast._util.timing import interleaved
from kegfast.compression import compress, load, save
from kegfast.distillation import GaussianNoise, InMemory, Pool, UniformNoise, distill
from kegfast.experiments.demo_images import save_images
from kegfast.experiments.ledger import Ledger
from kegfast.extraction import RECIPES, Generators, extract
from kegfast.models import ResNet14
from kegfast.recovery.front import recovery
from kegfast.training import evaluate, train
from kegfast.training.loop import MetricsLog, mix, seeded

SOURCES = ("tucker", "uniform", "gaussian", "kegnet", "shrink", "real")
"""What a student is taught with: nothing, noise, generated samples, `shrink`'s, real unlabeled ones."""
TITLES = {
    "tucker": "Tucker only",
    "uniform": "+ uniform noise",
    "gaussian": "+ Gaussian noise",
    "kegnet": "+ KegNet",
    "shrink": "kegfast.shrink, no data",
    "real": "+ real data (oracle)",
}

_BATCHNORM: Mapping[str, Literal["train", "eval"]] = {
    "uniform": "eval",
    "gaussian": "eval",
    "kegnet": "train",
    "real": "train",
}


@dataclass(frozen=True)
class DemoConfig:
    """Everything that the demo's numbers depend on.

    Attributes:
        dataset: A data set of 32x32 images by its name in `kegfast.data`.
        seed: Of all parameters and draws.
        amp: bfloat16 autocast in training; None: where the CPU or GPU computes in it.
        teacher_steps, teacher_batch, teacher_lr: The teacher's training.
        generators, generator_steps, generator_batch, generator_lr: Extraction; the batch is each
            generator's.
        batch_norm: Weight of the teacher's BatchNorm statistics in extraction.
        layers: The convolutions that are decomposed.
        ranks: Per student, the share of channels that its Tucker-2 ranks keep.
        trained: Parameters that students train: the decomposed layers and what follows them.
        pool: Different samples per source.
        student_steps, student_batch, student_lr, temperature: Distillation.
        batchnorm: Per source, whether students re-estimate BatchNorm statistics ("train") or keep the
            teacher's ("eval"): what suits it best, for noise is so unlike data that it needs the latter.
        share: Of `shrink`'s usual samples and steps.
        latency_batch, latency_rounds: Samples per timed call, and timed calls per model.
    """

    dataset: str = "digits"
    seed: int = 0
    amp: bool | None = None
    teacher_steps: int = 150
    teacher_batch: int = 64
    teacher_lr: float = 3e-3
    generators: int = 3
    generator_steps: int = 80
    generator_batch: int = 64
    generator_lr: float = 2e-3
    batch_norm: float = 0.1
    layers: str = "layers3*"
    ranks: tuple[float, ...] = (0.5, 0.3, 0.12)
    trained: tuple[str, ...] = ("layers3*", "linear*")
    pool: int = 6400
    student_steps: int = 80
    student_batch: int = 64
    student_lr: float = 5e-4
    temperature: float = 1.0
    batchnorm: Mapping[str, Literal["train", "eval"]] = field(default_factory=lambda: dict(_BATCHNORM))
    share: float = 0.06
    latency_batch: int = 64
    latency_rounds: int = 15

    def __post_init__(self) -> None:
        """Refuses what would only fail minutes later."""
        for name, value in vars(self).items():
            if name.endswith(("_steps", "_batch", "_rounds")) or name in ("generators", "pool"):
                check.count(name, value)


def run_demo(
    config: DemoConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = False,
    device: torch.device | str = "cpu",
    root: Path | None = None,
) -> dict[str, Any]:
    """Trains, extracts, compresses, distils and evaluates; leaves everything in a run folder.

    The folder gets config.json, metrics.jsonl, cells.json, teacher.safetensors, generators.safetensors,
    images.safetensors (`save_images`), students/<student>-<source>.safetensors and results.json.

    Args:
        config: What to run.
        out: The run folder, made if missing. Without `resume` an earlier run in it is replaced.
        resume: Whether to continue the run in `out`. Stages that have ended are not run again, one that
            was cut short goes on from its checkpoint; accuracies are those of an uninterrupted run.
        progress: Whether to show bars.
        device: Where to train.
        root: Folder of the data set's files, where it does not come with scikit-learn.

    Returns:
        The contents of results.json: "teacher", "students" (name, rank, parameters, ratio, latency_ms and
        accuracy by source) and "seconds" by stage.

    Raises:
        ValueError: `out` holds a run of another configuration, or `config` does not fit the data.
        OSError: `out` cannot be written.
    """
    return _Demo(config, Path(out), resume, progress, torch.device(device), root).run()


class _Demo:
    def __init__(
        self,
        config: DemoConfig,
        out: Path,
        resume: bool,
        progress: bool,
        device: torch.device,
        root: Path | None,
    ):
        self.config, self.out, self.progress, self.device = config, out, progress, device
        self.amp = _computes_in_bfloat16(device) if config.amp is None else config.amp
        self.splits = data.load(config.dataset, root)
        self.info = self.splits.info
        if len(self.info.sample_shape) != 3:
            raise ValueError(expected("dataset", "one of images", config.dataset))
        if not resume:
            _clear(out)
        self.cells = Ledger(out / "cells.json", asdict(config))
        write_json(out / "config.json", asdict(config))
        self.metrics = MetricsLog(out / "metrics.jsonl")
        self.made: dict[str, Tensor] = {}

    def run(self) -> dict[str, Any]:
        teacher = self.teacher()
        accuracy = self.accuracy("teacher", teacher)
        generators = self.generators(teacher)
        images = self.out / "images.safetensors"
        if not images.exists():
            save_images(images, generators, self.splits, self.config.seed)
        students = self.students(teacher)
        latency = self.cells.cell("latency_ms", lambda: self.latency({"teacher": teacher, **students}))
        pool = cache(lambda source: self.pool(source, generators))
        rows = []
        for (name, student), rank in zip(students.items(), self.config.ranks, strict=True):
            rows.append(
                {
                    "name": name,
                    "rank": rank,
                    "parameters": _parameters(student),
                    "ratio": _parameters(teacher) / _parameters(student),
                    "latency_ms": latency[name],
                    "accuracy": {
                        source: self.taught(name, student, source, pool, teacher) for source in SOURCES
                    },
                }
            )
        results = {
            "dataset": self.config.dataset,
            "seed": self.config.seed,
            "teacher": {
                "accuracy": accuracy,
                "parameters": _parameters(teacher),
                "latency_ms": latency["teacher"],
            },
            "students": rows,
            "seconds": stage_seconds(self.metrics),
        }
        write_json(self.out / "results.json", results)
        return results

    def teacher(self) -> nn.Module:
        with seeded(self.config.seed):
            teacher = ResNet14(self.info.sample_shape[0], self.info.num_classes)
        channels_last(teacher.to(self.device))
        return self.trained(
            "teacher",
            teacher,
            lambda checkpoint, teacher: train(
                teacher,
                self.splits.train,
                steps=self.config.teacher_steps,
                batch_size=self.config.teacher_batch,
                lr=self.config.teacher_lr,
                **self.options(checkpoint),
            ),
        ).eval()

    def generators(self, teacher: nn.Module) -> Generators:
        path = self.out / "generators.safetensors"
        if path.exists():
            return Generators.load(path).to(self.device)
        config = self.config
        checkpoint = path.with_suffix(".pt")
        made = extract(
            teacher,
            num_classes=self.info.num_classes,
            sample_shape=self.info.sample_shape,
            generators=config.generators,
            recipe=RECIPES["kegfast"].but(batch_norm=config.batch_norm),
            steps=config.generator_steps,
            batch_size=config.generator_batch,
            lr=config.generator_lr,
            input_range=self.info.input_range,
            **self.options(checkpoint),
        )
        made.save(path)
        checkpoint.unlink(missing_ok=True)
        return made

    def students(self, teacher: nn.Module) -> dict[str, nn.Module]:
        """The decomposed, untaught students by name; those of the ranks' order."""
        students = {}
        for i, rank in enumerate(self.config.ranks, start=1):
            student, _ = compress(teacher, rank, include=self.config.layers)
            channels_last(student)
            for name, parameter in student.named_parameters():
                kept = any(fnmatchcase(name, pattern) for pattern in self.config.trained)
                parameter.requires_grad_(kept)
            students[f"S{i}"] = self.trained(f"students/S{i}-tucker", student, _leave)
        return students

    def pool(self, source: str, generators: Generators) -> Pool:
        if self.info.input_range is None:
            raise ValueError(expected("dataset", "one of images", self.info.name))
        low, high = self.info.input_range
        shape = self.info.sample_shape
        sources = {
            "uniform": lambda: UniformNoise(shape, min(low), max(high)),
            "gaussian": lambda: GaussianNoise(shape),
            "kegnet": lambda: generators,
            "real": lambda: InMemory(self.splits.train.tensors[0]),
        }
        with seeded(mix(self.config.seed, SOURCES.index(source))):
            return Pool(sources[source](), self.config.pool)

    def taught(
        self,
        name: str,
        student: nn.Module,
        source: str,
        pool: Callable[[str], Pool],
        teacher: nn.Module,
    ) -> float:
        """Test accuracy of a student after it was taught with a source."""
        label = f"students/{name}-{source}"
        if source == "tucker":
            return self.accuracy(label, student)
        if source == "shrink":
            ratio = _parameters(teacher) / _parameters(student)
            return self.accuracy(label, self.shrunk(name, ratio, teacher))
        config = self.config
        student = self.trained(
            label,
            copy.deepcopy(student),
            lambda checkpoint, student: distill(
                student,
                teacher,
                pool(source),
                steps=config.student_steps,
                batch_size=config.student_batch,
                lr=config.student_lr,
                temperature=config.temperature,
                student_batchnorm=config.batchnorm[source],
                label=f"{name} {source}",
                **self.options(checkpoint),
            ),
        )
        return self.accuracy(label, student)

    def shrunk(self, name: str, ratio: float, teacher: nn.Module) -> nn.Module:
        """The student that `shrink` makes without data; those of all ratios see the same samples."""
        path = self.out / f"students/{name}-shrink.safetensors"
        if path.exists():
            return load(path).to(self.device)
        folder, info, start = path.with_suffix(""), self.info, time.monotonic()
        with recovery(
            teacher,
            info.sample_shape,
            ratio=ratio,
            mean=info.mean,
            std=info.std,
            seed=self.config.seed,
            out=folder,
            resume=True,
            share=self.config.share,
            progress=self.progress,
        ) as run:
            run.made.keep(self.made)
            student = run.student()
            self.made = run.made.kept
        save(student, path)
        rmtree(folder)
        self.metrics.write(f"{name} shrink", 1, time.monotonic() - start, {})
        return student

    def options(self, checkpoint: Path) -> dict[str, Any]:
        """What the training of every model is given, besides its own."""
        return {
            "seed": self.config.seed,
            "amp": self.amp,
            "checkpoint": checkpoint,
            "resume": True,
            "metrics": self.metrics,
            "progress": self.progress,
        }

    def trained(self, name: str, model: nn.Module, fit: Callable[[Path, nn.Module], object]) -> nn.Module:
        """The model with the weights that `fit` gives it, or gave it in an earlier run."""
        path = self.out / f"{name}.safetensors"
        if path.exists():
            return load_weights(model, path)
        checkpoint = path.with_suffix(".pt")
        fit(checkpoint, model)
        save_tensors(path, model.state_dict())
        checkpoint.unlink(missing_ok=True)
        return model

    def accuracy(self, label: str, model: nn.Module) -> float:
        return self.cells.cell(label, lambda: evaluate(model, self.splits.test, device=self.device))

    def latency(self, models: Mapping[str, nn.Module]) -> dict[str, float]:
        """Median milliseconds per call, the models taking turns."""
        with seeded(0):
            x = torch.randn(self.config.latency_batch, *self.info.sample_shape).to(self.device)
        calls = {name: partial(model.eval(), x) for name, model in models.items()}
        with torch.inference_mode():
            interleaved(calls, rounds=2)  # the first calls choose kernels and pack weights
            seconds = interleaved(calls, self.config.latency_rounds)
        return {name: 1e3 * value for name, value in seconds.items()}


def stage_seconds(metrics: MetricsLog) -> dict[str, float]:
    """The seconds that each stage took, interruptions left out."""
    return {entry["stage"]: entry["seconds"] for entry in metrics.read()}


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _leave(checkpoint: Path, model: nn.Module) -> None:
    """The training of a student that gets none."""


def _clear(out: Path) -> None:
    """Removes what an earlier run left, and nothing else."""
    for pattern in ("*.safetensors", "*.pt", "cells.json", "metrics.jsonl", "results.json"):
        for path in [*out.glob(pattern), *(out / "students").glob(pattern)]:
            path.unlink()
