"""A progress bar with the current values and the time left; silent where nobody watches, or without rich."""

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

log = logging.getLogger(__name__)

PATIENCE = 2.0
"""Seconds after which whoever waits is told for what."""

Update = Callable[[int, Mapping[str, float]], None]
"""Called with the number of steps done and the latest values."""


@contextmanager
def progress_bar(label: str, total: int, *, done: int = 0, enabled: bool = True) -> Iterator[Update]:
    """Show a bar on stderr while the block runs.

    Args:
        label: what is being done.
        total: the number of steps.
        done: steps already done, by an earlier run.
        enabled: False, or a stderr that is no terminal, shows nothing.

    Yields:
        The function to call after steps.
    """
    if not (enabled and sys.stderr.isatty() and find_spec("rich")):
        yield lambda done, values: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, completed=done, values="")

        def update(done: int, values: Mapping[str, float]) -> None:
            text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            bar.update(task, completed=done, values=text)

        yield update


@contextmanager
def slow(what: str) -> Iterator[None]:
    """Names what the block does once it has taken `PATIENCE` seconds, in the log and on a terminal."""

    def say() -> None:
        log.info("%s ...", what)
        if sys.stderr.isatty():
            print(f"{what} ...", file=sys.stderr, flush=True)

    timer = threading.Timer(PATIENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
