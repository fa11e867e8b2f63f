"""Run one benchmark of the source tree and write its results as JSON."""

import argparse
import subprocess
import sys
from pathlib import Path

import kegfast
from kegfast._util.check import expected

TREE = Path(kegfast.__file__).resolve().parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="operator or run, such as diversity, tucker2 or models")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="options", help="options of that benchmark")


def run(args: argparse.Namespace) -> None:
    names = sorted(path.stem.removeprefix("bench_") for path in TREE.glob("benchmarks/bench_*.py"))
    if not names:
        raise ValueError(f"benchmarks ship with the source tree, not with an installed package ({TREE})")
    if args.name not in names:
        raise ValueError(expected("name", f"one of {', '.join(names)}", args.name))
    command = [sys.executable, "-m", f"benchmarks.bench_{args.name}", *args.rest]
    code = subprocess.run(command, cwd=TREE, check=False).returncode
    if code:
        sys.exit(code)
