"""Work in a process apart: whatever becomes of it, this process goes on, and knows what became of it.

The other process gets one line, and says lines on a pipe of its own, so that what foreign code prints confuses nobody.
It ends when this one does, however this one ends.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_BOOT = (
    "import importlib, json, sys; path, entry, given, told = json.loads(sys.argv[1]); sys.path[:] = path; "
    "importlib.import_module(entry).main(given, told)"
)
_TURN = 0.2  # seconds between looks at whether it still runs
_GRACE = 5.0  # seconds to leave in good order in, after it has said that it is done
_BLOCK = 1 << 16


def run_apart(
    entry: str,
    job: bytes,
    *,
    timeout: float | None,
    said: Callable[[bytes], bool],
    printed: Callable[[bytes], None],
) -> str | None:
    """Have ``entry.main(given, told)`` called in a fresh interpreter, and wait for its end.

    It has this process's working directory and ``sys.path``, and nothing on its standard input. What it has printed
    before it says a line is given out before that line is.

    Args:
        entry: a module of which ``main`` gets two file descriptors: one to read the job from, one to write lines to.
        job: one line.
        timeout: seconds that it may take; None when it may take for ever.
        said: called with each line; returns True when that was the last.
        printed: called with what it prints to standard output and standard error.

    Returns:
        None when it has said its last line; otherwise how it ended, in words.
    """
    given, job_end = os.pipe()
    line_end, told = os.pipe()
    text_end, text = os.pipe()
    path = [one or os.getcwd() for one in sys.path]  # noqa: PTH109 - strings, as sys.path has them
    arguments = json.dumps([path, entry, given, told])
    command = [sys.executable, "-P", "-u", "-X", "faulthandler", "-c", _BOOT, arguments]
    try:
        process = subprocess.Popen(  # noqa: S603 - this interpreter
            command,
            stdin=subprocess.DEVNULL,
            stdout=text,
            stderr=text,
            pass_fds=(given, told),
            start_new_session=True,
        )
    finally:
        for one in (given, told, text):
            os.close(one)
    try:
        with contextlib.suppress(BrokenPipeError):  # it has died; below we learn of what
            os.write(job_end, job + b"\n")
        return _watch(process, _Lines(line_end, said), text_end, printed, timeout)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # it, and what it has started
        process.wait()
        for one in (job_end, line_end, text_end):
            os.close(one)


class _Lines:
    """Lines from a pipe that does not block."""

    def __init__(self, fd: int, said: Callable[[bytes], bool]) -> None:
        self.fd = fd
        self.done = False
        self._said = said
        self._rest = b""

    def take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self.done = self._said(line) or self.done


def _watch(
    process: subprocess.Popen[bytes],
    lines: _Lines,
    text: int,
    printed: Callable[[bytes], None],
    timeout: float | None,
) -> str | None:
    until = None if timeout is None else time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for one in (lines.fd, text):
            os.set_blocking(one, False)
            selector.register(one, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None  # before the last look: whatever it wrote is there by then
            ready = {key.fd for key, _ in selector.select(0 if ended else _TURN)}
            # what it said first: what it had printed before that is in the other pipe by now
            heard = b"" if lines.fd not in ready else _drained(lines.fd, selector)
            if text in selector.get_map():
                printed(_drained(text, selector))
            lines.take(heard)
            if lines.done:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE)
                return None
            if ended:
                return _end(process.returncode)
            if until is not None and time.monotonic() > until:
                return f"it took longer than {timeout:g} s, and was stopped"
            if not selector.get_map():
                time.sleep(_TURN)  # it has closed everything, and still runs


def _drained(fd: int, selector: selectors.BaseSelector) -> bytes:
    """What a pipe holds now; it is watched no longer when all its writers are gone."""
    found = b""
    with contextlib.suppress(BlockingIOError):
        while len(found) < _BLOCK * 64:
            block = os.read(fd, _BLOCK)
            if not block:
                selector.unregister(fd)
                break
            found += block
    return found


def _end(code: int) -> str:
    if code >= 0:
        return f"the process ended by itself, with exit code {code},"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    hint = ", as when memory runs out" if -code == signal.SIGKILL else ""
    return f"the process died with signal {-code} ({name}){hint}"


# --- in the other process -----------------------------------------------------------------------------------------


def read_job(given: int) -> bytes:
    """The line that it was given; from now on this process ends with the one that gave it."""
    source = os.fdopen(given, "rb", buffering=0)
    line = b""
    while not line.endswith(b"\n"):
        block = source.read(_BLOCK)
        if not block:
            break
        line += block

    def watch() -> None:
        source.read(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="peakpoint-parent", daemon=True).start()
    return line


def say(told: int, line: bytes) -> None:
    """Say one line, after what was printed."""
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    data = memoryview(line + b"\n")
    while data:
        data = data[os.write(told, data) :]


def _flush(stream: Any) -> None:
    # what is there was put there by foreign code, or closed by it
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stream.flush()
