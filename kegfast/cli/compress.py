"""Make a trained model small: its convolutions and linear layers become low-rank ones."""

import argparse
from pathlib import Path
from typing import Any

from kegfast._util import check
from kegfast._util.extras import extra
from kegfast.cli import options, sources
from kegfast.cli.config import default_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_samples(parser)
    parser.add_argument(
        "--rank", nargs="+", metavar="RULE",
        help="evbmf, energy=0.9, a share such as 0.5, ranks in,out such as 8,11, or PATTERN=RULE for layers "
        "by name (default evbmf); with --budget, PATTERN=RULE settles those layers, one rule limits all",
    )  # fmt: skip
    parser.add_argument(
        "--budget", metavar="KIND=SHARE",
        help="params, flops, memory or latency to keep, over all layers that --rank leaves open: params=0.4",
    )  # fmt: skip
    parser.add_argument("--include", nargs="+", metavar="PATTERN", help="only these layers: layers3.*.conv1")
    parser.add_argument("--exclude", nargs="+", metavar="PATTERN", help="not these layers")
    parser.add_argument(
        "--example",
        metavar="N,C,H,W",
        help="shape of an input: measure; without a budget of params, flops or memory never get slower",
    )  # fmt: skip
    parser.add_argument("--calibrate", nargs="+", metavar="SOURCE", help=sources.HELP)
    parser.add_argument(
        "--samples", type=int, default=256, metavar="N", help="samples to calibrate with (default 256)"
    )
    parser.add_argument("--round-to", type=int, metavar="N", help="make ranks multiples of this")
    options.add_evaluate(parser)
    parser.add_argument(
        "--seed", type=options.seed, default=0, metavar="N", help="seed of what is drawn (default 0)"
    )
    options.add_device(parser)
    out = default_out("compress") / "student.safetensors"
    parser.add_argument(
        "-o", "--out", type=Path, default=out, metavar="FILE",
        help=f"the student; its report becomes a .json and a .html beside it (default {out})",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    import torch

    with extra("cli"):
        from rich.console import Console

    from kegfast import compression, training
    from kegfast._util.files import write_json
    from kegfast._util.html import Page

    budget = parse_budget(args.budget)
    if args.example is None and (kinds := {"flops", "memory", "latency"}.intersection(budget or ())):
        raise ValueError(f"example must be given with a budget of {kinds.pop()}: --example N,C,H,W")
    device = options.pick_device(args.device)
    described = args.data is not None or args.sample_shape is not None
    info = options.sample_info(args) if described else None
    model = options.load_model(args.model, args.weights, info).to(device)
    if info is not None:
        options.check_fit(model, info)
    test = options.test_set(args) if args.evaluate else None
    torch.manual_seed(args.seed)
    student, report = compression.compress(
        model, parse_ranks(args.rank), include=args.include, exclude=args.exclude,
        budget=budget, example_input=_example(args.example, model),
        calibration=_calibration(args, info, device), samples=args.samples, round_to=args.round_to,
    )  # fmt: skip
    options.save_model(student, args.out, args.model)
    results = report.to_dict()
    console = Console()
    console.print(report if console.is_terminal else report.to_markdown(), markup=False, soft_wrap=True)
    if test is not None:
        results["accuracy"] = [training.evaluate(m, test) for m in (model, student)]
        print("test accuracy {:.2f} % before, {:.2f} % after".format(*results["accuracy"]))
    write_json(args.out.with_suffix(".json"), results)
    page = Page(f"kegfast compress: {args.model or args.weights.name}", f"student in {args.out}")
    report.add_to(page)
    page.write(args.out.with_suffix(".html"))
    print(f"student in {args.out}")


def parse_ranks(rules: list[str] | None) -> Any:
    """What --rank says, as `kegfast.compress` takes it."""
    if rules is None:
        return None
    if len(rules) == 1 and ("=" not in rules[0] or rules[0].startswith("energy=")):
        return _rule(rules[0])
    pairs = [rule.partition("=") for rule in rules]
    wrong = [name for name, equals, rule in pairs if not (name and equals and rule)]
    if wrong:
        raise ValueError(f"rank must be one rule, or PATTERN=RULE for each pattern, got {wrong[0]!r}")
    return {name: _rule(rule) for name, _, rule in pairs}


def parse_budget(text: str | None) -> dict[str, float] | None:
    """What --budget says, as `kegfast.compress` takes it."""
    if text is None:
        return None
    kind, _, share = text.partition("=")
    try:
        return {kind: float(share)}
    except ValueError as error:
        raise ValueError(f"budget must be KIND=SHARE such as params=0.4, got {text!r}") from error


def _rule(text: str) -> Any:
    try:
        if "," in text:
            return tuple(None if side == "-" else int(side) for side in text.split(","))
        return float(text)
    except ValueError:
        return text  # a rule's name, which compress checks


def _example(text: str | None, model: Any) -> Any:
    import torch

    if text is None:
        return None
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        shape = check.sizes("example", [int(n) for n in text.split(",")])
        return torch.randn(shape, device=like.device, dtype=like.dtype)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"example must be a shape such as 1,3,224,224, got {text!r}") from error


def _calibration(args: argparse.Namespace, info: Any, device: Any) -> Any:
    if args.calibrate is None:
        return None
    if info is None:
        raise ValueError("calibrate needs --data, or --sample-shape and --num-classes")
    return sources.make_source(args.calibrate, info, args, device)
