"""Run code in another process: whatever becomes of it, this process goes on, and knows what became of it.

The other process gets one line, and sends lines on a pipe of its own, so that what foreign code prints does not mix
with them. It ends when this one does, however this one ends.

This is not ``multiprocessing``, whose spawned processes run the main script of the user again (twice, where it has no
``if __name__ == "__main__"``), end with 255 and no error where no interpreter can be started, and leave a second
process, the resource tracker, with whoever has started them.
"""

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peakpoint.errors import Error

_BOOT = (  # without looks for garbage among what is imported, which take a quarter of the time that torch takes
    "import gc, importlib, json, sys; path, entry, ends = json.loads(sys.argv[1]); sys.path[:] = path; gc.disable(); "
    "module = importlib.import_module(entry); gc.freeze(); gc.enable(); module.main(ends)"
)
_POLL = 0.2  # seconds between looks at whether it still runs
_GRACE = 5.0  # seconds to end in, after the last line or a kill
_BLOCK = 1 << 16


def run_apart(
    entry: str,
    job: bytes,
    *,
    timeout: float | None,
    on_line: Callable[[bytes], bool],
    on_output: Callable[[bytes], None],
) -> str | None:
    """Have ``entry.main(ends)`` called in a fresh interpreter, and wait for its end.

    It has this process's working directory and ``sys.path``, and nothing on its standard input. What it has printed
    before it sends a line is given out before that line, and nothing that it has printed after.

    Args:
        entry: a module of which ``main`` makes an ``Ends`` of its argument.
        job: one line.
        timeout: seconds that it may take; None for no limit.
        on_line: called with each line; returns True when that was the last.
        on_output: called with what it prints to standard output and standard error.

    Returns:
        None when it has sent its last line; otherwise how it ended, in words.

    Raises:
        Error: no process can be started.
    """
    job_read, job_write = os.pipe()
    line_read, line_write = os.pipe()
    text_read, text_write = os.pipe()
    mark = secrets.token_hex(16)
    try:
        process = _start(entry, job_read, line_write, text_write, mark)
        try:
            with contextlib.suppress(BrokenPipeError):  # it has died; below we learn of what
                _write(job_write, job + b"\n")
            return _watch(process, _PipeReader(line_read, text_read, mark.encode(), on_line, on_output), timeout)
        finally:
            kill(process)
    finally:
        for descriptor in (job_write, line_read, text_read):
            os.close(descriptor)


def _start(entry: str, job_read: int, line_write: int, text_write: int, mark: str) -> subprocess.Popen[bytes]:
    """Start the interpreter; its ends of the pipes are closed here."""
    ends = (job_read, line_write, text_write)
    path = [directory or os.getcwd() for directory in sys.path]  # noqa: PTH109 - strings, as sys.path has them
    arguments = json.dumps([path, entry, [*ends, mark]])
    try:
        return subprocess.Popen(  # noqa: S603 - this interpreter
            [sys.executable, "-P", "-u", "-X", "faulthandler", "-c", _BOOT, arguments],
            stdin=subprocess.DEVNULL,
            stdout=text_write,
            stderr=text_write,
            pass_fds=ends,
            start_new_session=True,
        )
    except OSError as error:
        raise Error(f"no process can be started with {sys.executable}: {error}") from error
    finally:
        for descriptor in ends:
            os.close(descriptor)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End the leader of a session and all that it has started; do not wait for ever, a hanging disk can keep it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)


@dataclass(slots=True)
class _PipeReader:
    """Reads lines and printed text from two pipes, and puts them in order again."""

    line_read: int
    text_read: int
    mark: bytes
    on_line: Callable[[bytes], bool]
    on_output: Callable[[bytes], None]
    done: bool = False
    _lines: bytearray = field(default_factory=bytearray)
    _text: bytes = b""

    def take(self, lines: bytes, text: bytes) -> None:
        """Give out complete lines, each after what was printed before it: up to a mark, which comes first."""
        self._text += text
        self._lines += lines
        complete: list[bytearray] = []
        if b"\n" in lines:
            *complete, self._lines = self._lines.split(b"\n")
        for line in complete:
            printed, _, self._text = self._text.partition(self.mark)
            self.on_output(printed)
            self.done = self.on_line(bytes(line)) or self.done
        if self.mark not in self._text:
            self._text = self._text[-_BLOCK:]  # of a flood the end

    def end(self) -> None:
        """Give out the rest of what was printed."""
        self.on_output(self._text.replace(self.mark, b""))


def _watch(process: subprocess.Popen[bytes], reader: _PipeReader, timeout: float | None) -> str | None:
    deadline = None if timeout is None else time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for descriptor in (reader.line_read, reader.text_read):
            os.set_blocking(descriptor, False)
            selector.register(descriptor, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None  # before the last look: whatever it wrote has arrived by then
            selector.select(0 if ended else _POLL)
            lines = _drained(reader.line_read, selector)  # first: the mark of a line is in the other pipe before it
            reader.take(lines, _drained(reader.text_read, selector))
            if reader.done:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE)
                return None
            late = deadline is not None and time.monotonic() > deadline
            if ended or late:
                reader.end()
                return _end(process.returncode) if ended else f"it took longer than {timeout:g} s, and was stopped"
            if not selector.get_map():
                time.sleep(_POLL)  # it has closed everything, and still runs


def _drained(descriptor: int, selector: selectors.BaseSelector) -> bytes:
    """What a pipe holds now; it is watched no longer when all its writers are gone."""
    data = b""
    if descriptor not in selector.get_map():
        return data
    with contextlib.suppress(BlockingIOError):
        while len(data) < _BLOCK * 64:
            block = os.read(descriptor, _BLOCK)
            if not block:
                selector.unregister(descriptor)
                break
            data += block
    return data


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


class Ends:
    """The pipes to the process that has started this one, from the argument of ``main``."""

    def __init__(self, ends: list[Any]) -> None:
        self._job, self._lines, self._text, mark = ends
        self._mark: bytes = mark.encode()
        self._pid = os.getpid()

    def job(self) -> bytes:
        """Read the line that was given; from now on this process ends with the one that gave it."""
        source = os.fdopen(self._job, "rb", buffering=0)
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

    def send(self, line: bytes) -> None:
        """Send one line, after what was printed."""
        if os.getpid() != self._pid:
            os._exit(1)  # foreign code has forked and let both go on: one sender is enough
        for stream in (sys.stdout, sys.stderr):
            # foreign code may have replaced the stream, or closed it
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        _write(self._text, self._mark)
        _write(self._lines, line + b"\n")


def _write(fd: int, data: bytes) -> None:
    unwritten = memoryview(data)
    while unwritten:
        unwritten = unwritten[os.write(fd, unwritten) :]
