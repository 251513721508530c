"""Arguments that many commands have."""

import importlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from peakpoint.errors import MissingExtraError
from peakpoint.format import amounts
from peakpoint.format.amounts import read_duration
from peakpoint.rules import FORMS

ROOT = click.argument("root", type=click.Path(path_type=Path))
REF = click.argument("ref")
CATALOGUE = click.option(
    "--catalogue",
    metavar="FILE|URL",
    help="The index to use, also from PEAKPOINT_CATALOGUE; catalogue.sqlite in the repository by default.",
)
JSON = click.option("--json", "json", is_flag=True, help="Print JSON for programs.")


def rules_help(default: str) -> str:
    """What the option --rules says of itself, each form on a line of its own.

    Args:
        default: which rules are taken without it.
    """
    forms, _, rest = FORMS.partition("; ")
    lines = "\n".join(forms.split())
    more = rest[:1].upper() + rest[1:]
    return f"Rules, separated by spaces; {default} by default. Forms:\n\n\b\n{lines}\n\n{more}."


class _Duration(click.ParamType[timedelta]):
    """A time span such as 24h."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:  # noqa: ARG002
        """Read it; errors are ours."""
        return read_duration("--undo-for", value)


UNDO_FOR = click.option(
    "--undo-for",
    type=_Duration(),
    default=amounts.UNDO_FOR,
    show_default=True,
    help="How long what goes can be brought back with peakpoint undo, such as 7d; 0 frees the space at once.",
)


def reads(reader: Callable[[str, str], Any]) -> Any:
    """An option's callback that reads its text, if there is any."""

    def callback(_: click.Context, option: click.Parameter, value: str | None) -> Any:
        return None if value is None else reader(option.opts[-1], value)

    return callback


def torch_side(module: str, extra: str = "torch") -> Any:
    """Import a module that needs torch, or something else of an extra.

    Raises:
        MissingExtraError: what it needs is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        extra = "demo" if error.name == "sklearn" else extra
        raise MissingExtraError(
            f"this command needs {error.name}, which is not installed: pip install 'peakpoint[{extra}]'"
        ) from error
