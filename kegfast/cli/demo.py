"""Run the whole chain on real digits, from a teacher to small students: minutes on two cores."""

import argparse

from kegfast._util.extras import extra
from kegfast.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_data(parser, "data set of 32x32 images (default digits, which needs no download)")
    parser.add_argument("--teacher-steps", type=int, metavar="N", help="training steps of the teacher")
    parser.add_argument("--generators", type=int, metavar="N", help="how many generators")
    parser.add_argument("--generator-steps", type=int, metavar="N", help="training steps of the generators")
    parser.add_argument("--student-steps", type=int, metavar="N", help="distillation steps of each student")
    options.add_amp(parser, None, "where it is fast")
    options.add_device(parser)
    options.add_run(parser, "demo")


def run(args: argparse.Namespace) -> None:
    with extra("cli"):
        from rich.console import Console
        from rich.table import Table

    from kegfast.experiments.demo import DemoConfig, run_demo
    from kegfast.experiments.demo_report import demo_table, write_demo_report

    names = ("seed", "amp", "teacher_steps", "generators", "generator_steps", "student_steps")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = DemoConfig(dataset=args.data or "digits", **given)
    device = options.pick_device(args.device)
    results = run_demo(config, args.out, resume=args.resume, progress=True, device=device, root=args.root)
    header, rows = demo_table(results)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    print(f"report in {write_demo_report(args.out)}")
