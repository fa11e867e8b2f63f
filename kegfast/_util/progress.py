"""A progress bar with the current values and the time left; silent where nobody watches, or without rich."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

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
