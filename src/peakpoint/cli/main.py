"""``peakpoint``: every command parses, calls one operation, and renders.

Exit codes are those of the errors (see ``peakpoint.errors``); 0 is success, 2 a bad command line, 130 Ctrl-C.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

import click

from peakpoint._version import __version__
from peakpoint.errors import Error

_MODULES = {
    "audit": ("audit",),
    "show": ("demo", "rm", "show"),
    "diff": ("diff",),
    "exchange": ("export", "import"),
    "plan": ("plan",),
    "production": ("aliases", "history", "promote", "retire", "rollback", "tell"),
    "release": ("release",),
    "report": ("report",),
    "keep": ("explain", "keep", "pin", "record", "unpin"),
    "select": ("ls", "select"),
    "validate": ("validate",),
    "signing": ("sign", "verify"),
    "soup": ("soup",),
    "account": ("card", "changelog"),
    "space": ("archive", "restore", "trash", "undo"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


class _Commands(click.Group):
    """Imports a command when it is asked for: most need little of what all of them need together."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - of click
        """Every name."""
        return sorted(_HOMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - of click
        """One command; None when there is none of that name."""
        if cmd_name not in _HOMES:
            return None
        found: Sequence[click.Command] = importlib.import_module(f"peakpoint.cli.{_HOMES[cmd_name]}").COMMANDS
        return next(command for command in found if command.name == cmd_name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="peakpoint")
def cli() -> None:
    """Keep, find and ship the best checkpoints of a model's training.

    ROOT is a repository: the directory that was given to Checkpointer. REF names a checkpoint: RUN@latest,
    RUN@best:METRIC, RUN@best:METRIC:min, RUN:epoch=N, RUN:STEP, RUN/NAME, or @ALIAS.
    """


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    click.echo(f"peakpoint: {message}", err=True)


def run() -> None:
    """The entry point of the command ``peakpoint``."""
    warnings.showwarning = _warn
    try:
        cli.main(standalone_mode=False)
    except Error as error:
        click.echo(f"peakpoint: {error}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        click.echo("peakpoint: interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("peakpoint: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # the reader of a pipe has gone; leave quietly, and keep Python from complaining at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
