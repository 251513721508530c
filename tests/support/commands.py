"""The command line as its users meet it, without the seconds that a new interpreter takes."""

import contextlib
import io
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
