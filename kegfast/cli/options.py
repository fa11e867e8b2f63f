"""Options that several commands share, and what they stand for."""

import argparse
import importlib
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kegfast._util import check
from kegfast._util.imports import module_and_name
from kegfast.cli.config import OPTIONS, default_out

if TYPE_CHECKING:  # the commands' own imports are heavy, and --help should not wait for them
    import torch
    from torch import nn

    from kegfast.data import DataInfo, Samples
    from kegfast.training.loop import MetricsLog

MODELS = ("lenet5", "resnet14", "mlp")
METRICS = "metrics.jsonl"
NOT_THE_RUN = {"command", "config", "out", "resume", "verbose", "device"}
"""Options that may differ when a run is resumed."""


def positive(text: str) -> int:
    """An int of at least 1, as an option's type."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def seed(text: str) -> int:
    """A seed, as an option's type."""
    return check.seed("seed", int(text))


positive.__name__, seed.__name__ = "positive int", "64-bit int"  # what argparse calls them


def number(text: str) -> float:
    """A finite number, as an option's type."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def add_model(parser: argparse.ArgumentParser, weights: str | None = "required") -> None:
    """--model and --weights."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"{', '.join(MODELS)}, or package.module:factory, called without arguments",
    )
    if weights:
        parser.add_argument(
            "--weights", type=Path, required=weights == "required", metavar="FILE",
            help="safetensors, a torch state dict, or a checkpoint; never executed",
        )  # fmt: skip


def add_data(parser: argparse.ArgumentParser, what: str, *, required: bool = False) -> None:
    """--data and --root."""
    parser.add_argument("--data", required=required, metavar="NAME", help=what)
    parser.add_argument(
        "--root", type=Path, metavar="FOLDER", help="folder of data sets; without it OpenML is asked"
    )


def add_samples(parser: argparse.ArgumentParser) -> None:
    """--data or what one must know of it: --sample-shape, --num-classes, --mean, --std."""
    add_data(
        parser, "data set whose shape, classes and normalization the model expects; or give the next four"
    )
    parser.add_argument("--sample-shape", type=int, nargs="+", metavar="N", help="such as 3 32 32")
    parser.add_argument("--num-classes", type=int, metavar="N", help="number of logits")
    for name in ("--mean", "--std"):
        parser.add_argument(
            name, type=number, nargs="+", default=[], metavar="X",
            help="of the images' normalization, per channel, for pixels in [0, 1]",
        )  # fmt: skip


def sample_info(args: argparse.Namespace) -> "DataInfo":
    """The samples that --data or --sample-shape, --num-classes, --mean and --std describe."""
    from kegfast import data

    if args.data is not None:
        return data.describe(args.data)
    if args.sample_shape is None or args.num_classes is None:
        raise ValueError("data must be given, or sample-shape and num-classes in its place")
    if args.num_classes < 2:
        raise ValueError(f"num-classes must be 2 or more, got {args.num_classes}")
    if min(args.std, default=1.0) <= 0:
        raise ValueError(f"std must be above 0, got {min(args.std)}")
    if len(args.mean) != len(args.std) or len(args.mean) not in (0, args.sample_shape[0]):
        raise ValueError(f"mean and std must have {args.sample_shape[0]} values each, one per channel")
    shape = check.sizes("sample-shape", args.sample_shape)
    return data.DataInfo("the options", args.num_classes, shape, tuple(args.mean), tuple(args.std))


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """--evaluate."""
    parser.add_argument(
        "--evaluate", action=argparse.BooleanOptionalAction, default=False,
        help="accuracy on the test set of --data, before and after",
    )  # fmt: skip


def test_set(args: argparse.Namespace) -> "Samples":
    """The test set of --data."""
    from kegfast import data

    if args.data is None:
        raise ValueError("evaluate needs --data")
    return data.load(args.data, args.root).test


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument(
        "--device", default="auto", metavar="NAME",
        help="cpu, cuda, cuda:1, ...; auto, the default, takes cuda where it is",
    )  # fmt: skip


def add_compute(parser: argparse.ArgumentParser) -> None:
    """--device and --amp."""
    add_device(parser)
    add_amp(parser)


def add_amp(parser: argparse.ArgumentParser, default: bool | None = False, when: str = "off") -> None:
    """--amp, alone or as --amp bf16, and --no-amp."""
    parser.add_argument(
        "--amp", nargs="?", type=_amp, const=True, default=default, metavar="bf16",
        help=f"compute in bfloat16 where safe, or --no-amp (default: {when})",
    )  # fmt: skip
    parser.add_argument("--no-amp", action="store_false", dest="amp", help=argparse.SUPPRESS)


def _amp(text: str) -> bool:
    if text != "bf16":
        raise argparse.ArgumentTypeError(f"must be bf16 or left out, got {text!r}")
    return True


def add_run(parser: argparse.ArgumentParser, command: str) -> None:
    """--seed, --out and --resume."""
    default = default_out(command)
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="seed of everything random (default 0)"
    )
    parser.add_argument(
        "--out", type=Path, default=default, metavar="FOLDER",
        help=f"folder for the results (default {default})",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=False,
        help="continue the run in --out, with its options",
    )  # fmt: skip


def pick_device(name: str) -> "torch.device":
    """The device that --device names."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return check.device("device", name)


def build_model(name: str | None, info: "DataInfo | None") -> "nn.Module":
    """The model that --model names; the own ones fit themselves to the data.

    Raises:
        ValueError: there is no such model, or its factory fails.
    """
    if name is None:
        raise ValueError(f"model must be given: {', '.join(MODELS)} or package.module:factory")
    if ":" in name:
        return _call_factory(name)
    from kegfast import models

    if name not in MODELS:
        raise ValueError(f"model must be {', '.join(MODELS)} or package.module:factory, got {name!r}")
    shape, classes = (info.sample_shape, info.num_classes) if info else ((1, 32, 32), 10)
    if name == "mlp":
        if len(shape) != 1:
            raise ValueError(f"model mlp takes rows of a table, got samples of shape {shape}")
        return models.MLP(shape[0], classes)
    return {"lenet5": models.LeNet5, "resnet14": models.ResNet14}[name](shape[0], classes)


def load_model(name: str | None, weights: Path, info: "DataInfo | None") -> "nn.Module":
    """The model of --weights, in eval mode; --model may be missing where the file tells its structure itself.

    A file of a student that other code compressed (see `from_state_dict`) gives that student.

    Raises:
        OSError, ValueError: there is no such model, or the file is none of its weights.
    """
    from kegfast._util.files import load_weights, read_state_dict, read_tensors
    from kegfast.compression import from_state_dict, load, saving

    if weights.suffix == ".safetensors" and read_tensors(weights)[1].get("format") == saving.FORMAT:
        return load(weights, None if name is None else build_model(name, info))
    model = build_model(name, info)
    try:
        return load_weights(model, weights).eval()
    except ValueError:
        with suppress(ValueError):
            return from_state_dict(model, read_state_dict(weights)).eval()
        raise


def save_model(model: "nn.Module", path: Path, name: str | None) -> None:
    """Write a model with its structure, so that later commands need no --model where it can be traced."""
    from kegfast.compression import save

    save(model, path, factory=name if name is not None and ":" in name else None)


def check_fit(model: "nn.Module", info: "DataInfo") -> None:
    """Run the model once on a blank sample.

    Raises:
        ValueError: it does not take the data's samples, or does not give one logit per class.
    """
    import torch

    from kegfast._util.modules import evaluation

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.inference_mode(), evaluation(model):
            logits = model(torch.zeros(2, *info.sample_shape, device=device))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model must take samples of shape {info.sample_shape}, those of {info.name}: {reason}"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, info.num_classes):
        raise ValueError(
            f"model must give {info.num_classes} logits, one per class of {info.name}, got "
            f"{check.describe(logits)}"
        )


class Run:
    """The folder of one run: its options, checkpoint, metrics and results.

    As a context: an error before the first step that is logged leaves a new folder as it was, one before the
    first checkpoint an older run's options.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder: Path = args.out
        self.resume: bool = args.resume
        self.options = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
            if name not in NOT_THE_RUN
        }

    def __enter__(self) -> "Run":
        from kegfast._util.files import read_json, write_json

        path = self.folder / OPTIONS
        self._before = path.read_bytes() if path.exists() else None
        self._began = self._last_checkpoint()
        if self.resume and self._before is not None:
            self._compare(read_json(path))
        write_json(path, self.options)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):
            return
        path = self.folder / OPTIONS
        log = self.folder / METRICS
        if self._before is not None:
            if self._last_checkpoint() == self._began:
                path.write_bytes(self._before)
        elif not log.exists() or log.stat().st_size == 0:
            for left in (path, log, self.checkpoint):
                left.unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def metrics(self) -> "MetricsLog":
        from kegfast.training.loop import MetricsLog

        return MetricsLog(self.folder / METRICS)

    def finish(self, results: dict[str, Any]) -> None:
        """Write results.json and say where everything is."""
        from kegfast._util.files import write_json

        write_json(self.folder / "results.json", results)
        print(f"results in {self.folder}")

    def _last_checkpoint(self) -> int | None:
        return self.checkpoint.stat().st_mtime_ns if self.checkpoint.exists() else None

    def _compare(self, before: dict[str, Any]) -> None:
        for name, value in self.options.items():
            if before.get(name) != value:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} was {before.get(name)} in the run to resume, got {value}")


def _call_factory(name: str) -> "nn.Module":
    from torch import nn

    module, attribute = module_and_name("model", name)
    sys.path.insert(0, "")  # like `python -m`, so that a user's file in the current folder is found
    try:
        model = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # the user's own code may fail in any way
        raise ValueError(f"model {name} must be callable without arguments: {error!r}") from error
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name} must give a torch.nn.Module, got {type(model).__name__}")
    return model
