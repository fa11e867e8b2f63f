"""The front door: `shrink` checks its arguments, runs the recovery and leaves its folder."""

import inspect
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from kegfast import compression
from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.files import as_path, write_json
from kegfast._util.modules import evaluation
from kegfast._util.progress import progress_bar
from kegfast.recovery.data import take_data, take_source
from kegfast.recovery.pace import Pace, cut, paced, usual
from kegfast.recovery.pipeline import CHECKPOINTS, METRICS, PLAN, SAMPLES, UNITS, Budget, Recovery
from kegfast.recovery.pixels import Pixels, find_pixels
from kegfast.recovery.report import ShrinkReport
from kegfast.recovery.subject import Subject, examine

STUDENT, RESULTS, REPORT = "student.safetensors", "results.json", "report.html"
"""What a run leaves in its folder beside its log and what it continues from."""


def shrink(
    model: nn.Module,
    sample_shape: Sequence[int],
    *,
    ratio: float | None = None,
    budget: Mapping[str, float] | int | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    input_range: tuple[float, float] | None = None,
    num_classes: int | None = None,
    data: Any = None,
    source: Any = None,
    seconds: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> tuple[nn.Module, ShrinkReport]:
    """From a trained classifier to a small one that answers alike, with or without data.

    Samples are made by what the network is: images of several kinds; with BatchNorm, dead leaves that are
    changed until its statistics fit; rows of noise that fall into one class, summed. Ranks are spent by a
    budget over all layers, factors are solved on the samples, the student is taught by the network's answers
    to them, and kept as it was before where held-out samples do not find it surely better afterwards.

    Args:
        model: a trained classifier that takes one tensor and returns one of logits, log-probabilities or
            probabilities (N, classes); unchanged, on the device where the work shall be done.
        sample_shape: of one input, without the batch: (C, H, W) of images, (F,) of rows.
        ratio: how many times fewer parameters, above 1; 4 where there is no `budget` either.
        budget: in place of `ratio`, as `kegfast.compress` takes it: {"flops": 0.5}, or a number of
            parameters.
        mean, std: of the images' normalization, for pixels in [0, 1]: numbers, or one for each channel.
            Without them (and `input_range`) the usual ones are tried, and the one that suits the network best
            is taken; the report names it.
        input_range: in place of `mean` and `std`, (lowest, highest) value of an input image.
        num_classes: checked against the network's outputs where given.
        data: unlabeled samples, as many or few as there are: a tensor, a Dataset or a DataLoader. They are
            mixed in; a quarter of them, from 64 samples on, judges. Those that are unlike what BatchNorm
            remembers are left aside.
        source: in place of artificial samples, an object whose `sample(n)` gives such as the network takes.
        seconds: an aim for the whole run; samples and steps are cut to it by how long the network takes here.
        seed: of all draws.
        out: folder for student.safetensors, report.html, results.json, metrics.jsonl and what `resume` needs;
            None leaves nothing.
        resume: continue the run in `out`, to the same student; what is done is not done again.
        progress: show a bar on a terminal.

    Returns:
        The student, in eval mode, and the report.

    Raises:
        TypeError, ValueError: an argument is wrong, the model is no such classifier, the ratio cannot be
            reached, or `data` or `source` do not fit; said before anything is computed that takes long.
    """
    if out is not None:
        import_module("kegfast._util.html")  # what the page needs and is not installed is said now
    with recovery(
        model,
        sample_shape,
        ratio=ratio,
        budget=budget,
        mean=mean,
        std=std,
        input_range=input_range,
        num_classes=num_classes,
        data=data,
        source=source,
        seconds=seconds,
        seed=seed,
        out=out,
        resume=resume,
        progress=progress,
    ) as run:
        student = run.student()
        run.illustrate()
        if out is not None:
            compression.save(student, run.folder / STUDENT)
            write_json(run.folder / RESULTS, run.report.to_dict())
            run.report.write(run.folder / REPORT)
    return student, run.report


@contextmanager
def recovery(
    model: nn.Module, sample_shape: Sequence[int], *, share: float = 1.0, **options: Any
) -> Iterator[Recovery]:
    """The run that `shrink` makes of its arguments, checked; the model is in eval mode meanwhile.

    Args:
        share: of the usual samples and steps.
        model, sample_shape, **options: `shrink`'s, with its defaults.
    """
    bound = inspect.signature(shrink).bind(model, sample_shape, **options)
    bound.apply_defaults()
    given = SimpleNamespace(**bound.arguments)
    check.seed("seed", given.seed)
    if given.seconds is not None:
        check.number("seconds", given.seconds, above=0)
    if given.resume and given.out is None:
        raise ValueError("resume needs out, the folder of the run, got None")
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(evaluation(model))
        subject = examine(model, sample_shape, given.num_classes)
        pixels = _pixels(subject, given.mean, given.std, given.input_range)
        own = None if given.source is None else take_source(subject, pixels, given.source)
        real = None if given.data is None else take_data(subject, pixels, given.data)
        spent = Budget(subject, given.ratio, given.budget)
        folder = _folder(stack, given.out, given.resume)
        run = {
            "model": subject.digest,
            "budget": spent.budget if isinstance(spent.budget, int) else dict(spent.budget),
            "normalization": None if pixels is None else [list(pixels.mean), list(pixels.std)],
            "data": 0 if real is None else len(real.taught) + len(real.held),
            "source": given.source is not None,
            "seed": given.seed,
        }
        pace = _pace(subject, folder, given.seconds, share, run)
        bar = stack.enter_context(progress_bar("shrink", UNITS, enabled=given.progress))
        yield Recovery(subject, pixels, spent, own, real, pace, given.seed, folder, bar)


def _pixels(subject: Subject, mean: Any, std: Any, input_range: Any) -> Pixels | None:
    if subject.kind == "image":
        return find_pixels(subject, mean, std, input_range)
    for name, value in (("mean", mean), ("std", std), ("input_range", input_range)):
        if value is not None:
            raise ValueError(expected(name, f"left out for samples {subject.sample_shape}, no images", value))
    return None


def _pace(
    subject: Subject, folder: Path, seconds: float | None, share: float, run: Mapping[str, Any]
) -> Pace:
    """How much of everything: timed once for a run, and kept for its resumption."""
    path = folder / PLAN
    if path.exists():
        return Pace.read(path, run)
    pace = usual(subject) if share == 1 else cut(usual(subject), share)
    if seconds is not None:
        pace = paced(subject, pace, seconds)
    pace.write(path, run)
    return pace


def _folder(stack: ExitStack, out: str | Path | None, resume: bool) -> Path:
    """The folder of the run: a temporary one without `out`, and without what an earlier run left."""
    if out is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory()))
    folder = as_path("out", out)
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        for name in (STUDENT, SAMPLES, PLAN, CHECKPOINTS.format("*"), RESULTS, METRICS, REPORT):
            for path in folder.glob(name):
                path.unlink()
    return folder
