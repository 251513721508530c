"""The command line as its users meet it, without the seconds that a new interpreter takes."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import warnings
from unittest import mock

from click.testing import CliRunner

from peakpoint.cli.main import cli, run


def in_process(*arguments):
    """What ``peakpoint`` with these arguments prints, and its exit code: the whole of its entry point, in here."""
    command = ["peakpoint", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        warnings.catch_warnings(),
    ):
        warnings.resetwarnings()  # as in a new interpreter: shown, and not raised
        try:
            run()
        except SystemExit as end:
            code = 0 if end.code is None else end.code
        else:
            code = 0
    return subprocess.CompletedProcess(command, code, stdout.getvalue(), stderr.getvalue())


RUN = "from peakpoint.cli.main import run; run()"


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


def command(*arguments, code=0):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def on_terminal(width, *arguments, answer="", code=0):
    """The lines that a terminal of this width shows, without colours, when somebody has typed an answer."""
    outer, inner = pty.openpty()
    environment = os.environ | {"COLUMNS": str(width), "TERM": "xterm"}
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    with subprocess.Popen(command, stdin=inner, stdout=inner, stderr=subprocess.DEVNULL, env=environment) as process:
        os.close(inner)
        os.write(outer, answer.encode())
        shown = b""
        with contextlib.suppress(OSError):  # the other side is closed
            while more := os.read(outer, 65536):
                shown += more
        os.close(outer)
    assert process.returncode == code
    return [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", shown.decode()).splitlines()]
