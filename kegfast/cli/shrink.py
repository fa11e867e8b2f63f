"""From a trained classifier to a small one that answers alike, in one step, with or without data."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kegfast.cli import options, sources
from kegfast.cli.compress import parse_budget

if TYPE_CHECKING:
    import torch

    from kegfast.data import DataInfo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_samples(parser)
    parser.add_argument(
        "--input-range", type=options.number, nargs=2, metavar="X",
        help="lowest and highest value of an input image, in place of --mean and --std; without either the "
        "usual normalizations are tried",
    )  # fmt: skip
    parser.add_argument(
        "--ratio", type=options.number, metavar="X", help="how many times fewer parameters (default 4)"
    )
    parser.add_argument(
        "--budget", metavar="KIND=SHARE", help="params, flops, memory or latency to keep, in place of --ratio"
    )
    parser.add_argument(
        "--source", nargs="+", metavar="SOURCE",
        help="samples in place of artificial ones, or real ones of --data, without labels, mixed into them: "
        + sources.HELP,
    )  # fmt: skip
    parser.add_argument("--seconds", type=options.number, metavar="N", help="an aim for the whole run")
    options.add_evaluate(parser)
    options.add_device(parser)
    options.add_run(parser, "shrink")
    parser.add_argument(
        "-o", "--student", type=Path, metavar="FILE",
        help="write the student there too, not only to student.safetensors in --out",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from kegfast import recovery, training
    from kegfast._util.files import read_json, write_json

    device = options.pick_device(args.device)
    info = _info(args)
    model = options.load_model(args.model, args.weights, info).to(device)
    test = options.test_set(args) if args.evaluate else None
    data, source = _given(args, info, device)
    with options.Run(args) as folder:
        student, report = recovery.shrink(
            model, info.sample_shape, ratio=args.ratio, budget=parse_budget(args.budget),
            mean=info.mean or None, std=info.std or None,
            input_range=None if args.input_range is None else tuple(args.input_range),
            num_classes=info.num_classes or None, data=data, source=source, seconds=args.seconds,
            seed=args.seed, out=folder.folder, resume=args.resume, progress=True,
        )  # fmt: skip
        if args.student is not None:
            options.save_model(student, args.student, args.model)
        Console().print(report.to_markdown(), markup=False, soft_wrap=True)
        if test is not None:
            path = folder.folder / "results.json"
            accuracy = [training.evaluate(m, test) for m in (model, student)]
            write_json(path, read_json(path) | {"accuracy": accuracy})
            print("test accuracy {:.2f} % before, {:.2f} % after".format(*accuracy))
        print(f"student in {args.student or folder.folder / 'student.safetensors'}")
        print(f"report in {folder.folder / 'report.html'}")


def _info(args: argparse.Namespace) -> "DataInfo":
    """What is known of the samples; the classes, 0 where nobody says, are the model's outputs."""
    from kegfast import data
    from kegfast._util import check

    if args.data is not None or args.num_classes is not None:
        return options.sample_info(args)
    if args.sample_shape is None:
        raise ValueError("data must be given, or sample-shape in its place")
    shape = check.sizes("sample-shape", args.sample_shape)
    return data.DataInfo("the options", 0, shape, tuple(args.mean), tuple(args.std))


def _given(args: argparse.Namespace, info: "DataInfo", device: "torch.device") -> tuple[Any, Any]:
    """Real samples, and a source in place of artificial ones; None for what --source does not name."""
    names = args.source or []
    real = sources.make_source(["real"], info, args, device).samples if "real" in names else None
    others = [name for name in names if name != "real"]
    return real, sources.make_source(others, info, args, device) if others else None
