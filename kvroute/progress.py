"""Progress bars for long work: shown on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvroute.errors import InvalidInputError


@contextmanager
def progress_bar(what: str, total: int, *, show: bool | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, with the time that is left. Yields a function that is told how much more is done.

    Args:
        what: the label.
        total: units of work.
        show: True or False; by default only if standard error is a terminal.
    """
    if total < 0:
        raise InvalidInputError(f"A progress bar can't have a total of {total}.")
    if show is False or (show is None and not sys.stderr.isatty()):
        yield lambda _done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Work comes in chunks of minutes: the speed is taken over hours, else the time that is left could not be told.
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=6 * 3600) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
