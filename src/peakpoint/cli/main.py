"""The entry point ``peakpoint``: find the command, run it, turn errors into exit codes.

Exit codes are those of the errors (see ``peakpoint.errors``); 0 is success, 2 a bad command line, 130 Ctrl-C.
"""

import errno
import importlib
import io
import sys
import warnings

import click
from click.shell_completion import CompletionItem

from peakpoint._version import __version__
from peakpoint.cli import terminal
from peakpoint.cli.commands import ENTRIES, GROUPS, RENAMED
from peakpoint.errors import Error, StoreError
from peakpoint.format.names import did_you_mean

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}


class CommandTable(click.Group):
    """The commands of the table; a module is imported when its command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - of click
        """Return the names in the order of the help page."""
        return list(ENTRIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - of click
        """Import a command; None when there is none of that name."""
        if cmd_name not in ENTRIES:
            return None
        module, _, function = ENTRIES[cmd_name].function.partition(":")
        command: click.Command = getattr(importlib.import_module(f"peakpoint.cli.{module}"), function)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which one was meant."""
        name = args[0]
        if ctx.resilient_parsing:  # of a shell that completes a line
            return super().resolve_command(ctx, args)
        if name in RENAMED:
            ctx.fail(f"{name!r} is now: peakpoint {RENAMED[name]}")
        if name not in ENTRIES and not name.startswith("-"):
            ctx.fail(f"No such command {name!r}{did_you_mean(name, list(ENTRIES)) or '; peakpoint --help lists them'}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer the commands; imports none of them."""
        entries = [entry for entry in ENTRIES.values() if entry.name.startswith(incomplete)]
        offers = [CompletionItem(entry.name, help=entry.help) for entry in entries]
        return offers + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - of click
        """Write the commands by group; imports none of them."""
        for title, entries in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(entry.name.ljust(len("changelog")), entry.help) for entry in entries])


@click.group(cls=CommandTable, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="peakpoint")
def cli() -> None:
    """Keep, find and ship the best checkpoints of a model's training.

    ROOT is a repository: the directory that was given to Checkpointer. REF names a checkpoint: RUN@latest,
    RUN@best, RUN@best:METRIC, RUN@best:METRIC:min, RUN:epoch=N, RUN:STEP, RUN/NAME, or @ALIAS.
    """


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    terminal.complain(message)


def run() -> None:
    """Run the command ``peakpoint``."""
    warnings.showwarning = _warn
    terminal.prepare()
    try:
        cli.main(standalone_mode=False)
    except Error as error:
        sys.exit(_failed(_sentence(error), error.exit_code))
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.exit(_failed("interrupted", 130))
    except click.ClickException as error:
        with io.StringIO() as page:
            error.show(page)
            terminal.complain(page.getvalue().rstrip("\n"), prefix="")
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of a pipe has gone
        sys.exit(141)
    except OSError as error:
        sys.exit(_failed(_sentence(error), StoreError.exit_code))
    finally:
        terminal.discard_unwritten()


def _failed(problem: object, exit_code: int) -> int:
    terminal.complain(problem)
    return exit_code


def _sentence(error: Exception) -> str:
    """Say what is wrong; of what the system refused, without the number of the error."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    text = error.strerror
    if not isinstance(error, Error):  # of the output: files are read and written by stores, whose errors say more
        text = f"{error.filename or 'the output cannot be written'}: {text}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        text += "; allow this process more open files, such as with: ulimit -n 1024"
    return text
