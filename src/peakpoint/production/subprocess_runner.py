"""Work in a process apart: whatever becomes of it, this process goes on, and knows what became of it.

The other process gets one line, and says lines on a pipe of its own, so that what foreign code prints confuses nobody.
It ends when this one does, however this one ends.
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

_BOOT = (
    "import importlib, json, sys; path, entry, ends = json.loads(sys.argv[1]); sys.path[:] = path; "
    "importlib.import_module(entry).main(ends)"
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
    """Have ``entry.main(ends)`` called in a fresh interpreter, and wait for its end.

    It has this process's working directory and ``sys.path``, and nothing on its standard input. What it has printed
    before it says a line is given out before that line is, and nothing that it has printed after.

    Args:
        entry: a module of which ``main`` makes an ``Ends`` of what it gets.
        job: one line.
        timeout: seconds that it may take; None when it may take for ever.
        said: called with each line; returns True when that was the last.
        printed: called with what it prints to standard output and standard error.

    Returns:
        None when it has said its last line; otherwise how it ended, in words.

    Raises:
        Error: no process can be started.
    """
    given, job_end = os.pipe()
    line_end, told = os.pipe()
    text_end, text = os.pipe()
    path = [one or os.getcwd() for one in sys.path]  # noqa: PTH109 - strings, as sys.path has them
    mark = secrets.token_hex(16)
    arguments = json.dumps([path, entry, [given, told, text, mark]])
    command = [sys.executable, "-P", "-u", "-X", "faulthandler", "-c", _BOOT, arguments]
    try:
        process = subprocess.Popen(  # noqa: S603 - this interpreter
            command,
            stdin=subprocess.DEVNULL,
            stdout=text,
            stderr=text,
            pass_fds=(given, told, text),
            start_new_session=True,
        )
    except OSError as error:
        for one in (job_end, line_end, text_end):
            os.close(one)
        raise Error(f"no process can be started with {sys.executable}: {error}") from error
    finally:
        for one in (given, told, text):
            os.close(one)
    try:
        with contextlib.suppress(BrokenPipeError):  # it has died; below we learn of what
            os.write(job_end, job + b"\n")
        return _watch(process, _Heard(line_end, text_end, mark.encode(), said, printed), timeout)
    finally:
        kill(process)
        for one in (job_end, line_end, text_end):
            os.close(one)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End the leader of a session, and what it has started; wait a little, since a hanging disk can keep it alive."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)


@dataclass(slots=True)
class _Heard:
    """What came through the two pipes, put in order again."""

    lines: int
    text: int
    mark: bytes
    said: Callable[[bytes], bool]
    printed: Callable[[bytes], None]
    done: bool = False
    _line: bytearray = field(default_factory=bytearray)
    _text: bytes = b""

    def take(self, lines: bytes, text: bytes) -> None:
        """Give out complete lines, each after what was printed before it: up to a mark, which is there first."""
        self._text += text
        self._line += lines
        complete: list[bytearray] = []
        if b"\n" in lines:
            *complete, self._line = self._line.split(b"\n")
        for line in complete:
            before, _, self._text = self._text.partition(self.mark)
            self.printed(before)
            self.done = self.said(bytes(line)) or self.done
        if self.mark not in self._text:
            self._text = self._text[-_BLOCK:]  # of a flood the end

    def end(self) -> None:
        """It says no more."""
        self.printed(self._text.replace(self.mark, b""))


def _watch(process: subprocess.Popen[bytes], heard: _Heard, timeout: float | None) -> str | None:
    until = None if timeout is None else time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for one in (heard.lines, heard.text):
            os.set_blocking(one, False)
            selector.register(one, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None  # before the last look: whatever it wrote is there by then
            selector.select(0 if ended else _TURN)
            lines = _drained(heard.lines, selector)  # first: the mark of a line is in the other pipe before it
            heard.take(lines, _drained(heard.text, selector))
            if heard.done:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE)
                return None
            over = until is not None and time.monotonic() > until
            if ended or over:
                heard.end()
                return _end(process.returncode) if ended else f"it took longer than {timeout:g} s, and was stopped"
            if not selector.get_map():
                time.sleep(_TURN)  # it has closed everything, and still runs


def _drained(fd: int, selector: selectors.BaseSelector) -> bytes:
    """What a pipe holds now; it is watched no longer when all its writers are gone."""
    found = b""
    if fd not in selector.get_map():
        return found
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


class Ends:
    """The pipes to the process that has started this one.

    Args:
        ends: what ``main`` got.
    """

    def __init__(self, ends: list[Any]) -> None:
        self._given, self._told, self._text, mark = ends
        self._mark: bytes = mark.encode()
        self._pid = os.getpid()

    def job(self) -> bytes:
        """The line that was given; from now on this process ends with the one that gave it."""
        source = os.fdopen(self._given, "rb", buffering=0)
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

    def say(self, line: bytes) -> None:
        """Say one line, after what was printed."""
        if os.getpid() != self._pid:
            os._exit(1)  # foreign code has forked, and let the other one go on: one of them is enough
        for stream in (sys.stdout, sys.stderr):
            # what is there was put there by foreign code, or closed by it
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        _write(self._text, self._mark)
        _write(self._told, line + b"\n")


def _write(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
