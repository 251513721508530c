"""A thread that works off what it is given, in order."""

import threading
from collections.abc import Callable
from queue import Queue
from types import TracebackType
from typing import Self


class Worker:
    """One thread beside the caller's, for the length of a ``with`` block.

    Unlike a pool of ``concurrent.futures`` it also works while the interpreter ends; where no thread can be started any
    more, from Python 3.12 on, the caller does the work.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._queue: Queue[Callable[[], object] | None] = Queue()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = start_thread(self._run, name)

    def do(self, work: Callable[[], object]) -> None:
        """Have ``work`` called after everything that was queued before."""
        if self._thread is None:
            work()
        else:
            self._queue.put(work)

    def wait(self) -> None:
        """Return when everything that was queued is done; raises the first error."""
        self._queue.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                if self._error is None:
                    work()
            except BaseException as error:  # noqa: BLE001 - the end of a thread: whoever waits raises it
                self._error = error
            finally:
                del work  # an idle thread keeps nothing alive
                self._queue.task_done()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()


def start_thread(work: Callable[[], object], name: str) -> threading.Thread | None:
    """Start a thread; None where the interpreter ends and starts none any more."""
    thread = threading.Thread(target=work, name=name)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread
