"""Checkpointers that were not closed: their saves become durable all the same.

The interpreter waits for the thread of a save before it ends. What remains is to write a failed save once more, to say
so if that fails again, and to release the run: at the end of the interpreter, or as soon as nothing refers to the
checkpointer any more. ``os._exit`` and signals that kill skip all of it, as a power cut would.
"""

import atexit
import os
import weakref
from collections.abc import Callable
from typing import Any

from peakpoint.errors import Error
from peakpoint.store.threads import start_thread
from peakpoint.training.outcome import print_note

_open: weakref.WeakSet[Any] = weakref.WeakSet()
# a forked child has neither the threads nor the lock: its parent closes
os.register_at_fork(after_in_child=_open.clear)


def watch(checkpointer: Any) -> None:
    """Close a checkpointer at the end of the interpreter, if it is still open then."""
    _open.add(checkpointer)


def close_soon(run: str, close: Callable[[], None]) -> None:
    """Close a checkpointer that nothing refers to, in a thread: garbage collection must not wait for a disk."""
    if start_thread(lambda: _close(run, close), f"peakpoint-close-{run}") is None:
        _close(run, close)


@atexit.register
def _close_all() -> None:
    for checkpointer in list(_open):
        _close(checkpointer.run, checkpointer._close_unfinished)  # noqa: SLF001 - not for users


def _close(run: str, close: Callable[[], None]) -> None:
    try:
        close()
    except (Error, Warning) as error:
        print_note(
            f"run {run!r} ended without close(); the exit code of this process does not show this error: {error}"
        )
