"""The one way to the terminal: nothing that is printed controls it, and all of it fits its encoding.

Texts of users (names, reasons, messages of their code) may hold anything. Whoever prints uses ``say``, ``complain``,
``print_json``, or a console of ``render.console``; whoever puts such a text into markup uses ``render.literal``.
"""

import codecs
import contextlib
import io
import json
import os
import re
import sys
from typing import TextIO

from peakpoint.errors import printable_lines

_NOT_ASCII = re.compile(r"[^\n -~]+")
_LOOK_ALIKES = {"…": "...", "±": "+-", **dict(zip("▁▂▃▄▅▆▇█", "_.:-=+*#", strict=True))}


def _look_alikes(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding cannot write: by what looks like it, or by its number."""
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    return "".join(_LOOK_ALIKES.get(character) or ascii(character)[1:-1] for character in characters), error.end


codecs.register_error("peakpoint-look-alikes", _look_alikes)


def prepare() -> None:
    """Let the standard streams print what their encoding lacks as something else."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="peakpoint-look-alikes")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is open, and a terminal."""
    return stream is not None and stream.isatty()


def _write(stream: TextIO | None, text: str) -> None:
    if stream is not None:  # None: closed by whoever started the process
        stream.write(text + "\n")
        stream.flush()


def say(text: str) -> None:
    """Print lines on standard output."""
    _write(sys.stdout, printable_lines(text))


def complain(problem: object, prefix: str = "peakpoint: ") -> None:
    """Print a problem on standard error, if that can be written."""
    with contextlib.suppress(OSError):
        _write(sys.stderr, printable_lines(f"{prefix}{problem}"))


def print_json(text: str) -> None:
    """Print a text in JSON; in strings of it, what is not ASCII is escaped."""
    _write(sys.stdout, _NOT_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text))


def discard_unwritten() -> None:
    """Give up what a stream cannot write, so that Python does not try it again at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
