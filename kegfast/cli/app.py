"""From arguments to a command, and from its errors to one line and an exit code."""

import argparse
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from typing import NoReturn

from kegfast._util.extras import MissingExtra
from kegfast.cli import bench, compress, demo, distill, evaluate, extract, info, reproduce, shrink, train
from kegfast.cli.config import with_defaults
from kegfast.cli.memory import keep_freed_memory
from kegfast.version import __version__

COMMANDS = {
    "info": info,
    "shrink": shrink,
    "train": train,
    "extract": extract,
    "compress": compress,
    "distill": distill,
    "evaluate": evaluate,
    "demo": demo,
    "reproduce": reproduce,
    "bench": bench,
}

PARALLEL = ("extract", "distill", "reproduce")
"""Commands that several processes share: generators are spread, students are trained by all."""
USAGE_ERROR = 2
INTERRUPTED = 130
"""What shells report for a program that Ctrl-C ended."""

BAD_INPUT = (ValueError, TypeError, OSError, FloatingPointError, MissingExtra)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments, by default the process's.

    Returns:
        0; 2 after bad input or a file that cannot be read or written, said in one line on stderr; 130
        after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = make_parser().parse_args(with_defaults(argv))
    except BAD_INPUT as error:
        return _complain("kegfast", error)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    _log_to_stderr(args.verbose)
    try:
        with warnings.catch_warnings():
            if not args.verbose:
                warnings.simplefilter("ignore")  # other libraries': errors here are one line
            _run(args)
    except BAD_INPUT as error:
        logging.getLogger(__name__).debug("", exc_info=error)
        return _complain(f"kegfast {args.command}", error)
    except SystemExit as stop:  # a benchmark's, which has said why
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        print(f"kegfast {args.command}: {stop or 'interrupted'}{_advice(args, argv)}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _run(args: argparse.Namespace) -> None:
    """The command; under torchrun as one of several processes, of which the first speaks."""
    keep_freed_memory()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        COMMANDS[args.command].run(args)
        return
    if args.command not in PARALLEL:
        raise ValueError(f"torchrun works with {', '.join(PARALLEL)}, not with {args.command}")
    from kegfast.training.processes import joined

    with joined() as rank, ExitStack() as stack:
        if rank:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        COMMANDS[args.command].run(args)


def make_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = _Parser(prog="kegfast", description="Compress a trained network without its training data.")
    parser.add_argument("--version", action="version", version=f"kegfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or name).splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        command.add_argument("-v", "--verbose", action="count", default=0, help="log what is done (-vv: all)")
        command.add_argument("--config", metavar="FILE", help="TOML file with values for these options")
        module.add_arguments(command)
    return parser


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _advice(args: argparse.Namespace, argv: list[str]) -> str:
    """How to go on after Ctrl-C."""
    if "resume" not in args:
        return ""
    return f"; go on with: kegfast {shlex.join(argv if '--resume' in argv else [*argv, '--resume'])}"


def _complain(program: str, error: BaseException) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    text = " ".join(text.split()) or type(error).__name__
    print(f"{program}: {text}", file=sys.stderr)
    return USAGE_ERROR


def _log_to_stderr(verbose: int) -> None:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="%(name)s: %(message)s", force=True)
