"""Progress on standard error, on a terminal only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import Progress

from peakpoint.cli.render import console, printable

_SLOW = 20  # runs to read that are worth a bar


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar; call the yielded function with each further amount."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with Progress(console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


@contextmanager
def run_bar() -> Iterator[Callable[[int, int], None]]:
    """Show a bar once there are many runs to read; call the yielded function with how many were read, of how many."""
    if not sys.stderr.isatty():
        yield lambda _read, _total: None
        return
    with Progress(console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading runs", total=None, visible=False)
        yield lambda read, total: bar.update(task, completed=read, total=total, visible=total > _SLOW)


@contextmanager
def status_line(start: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done; call the yielded function with each next step."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with console(stderr=True).status(start) as status:
        yield lambda step: status.update(printable(step))
