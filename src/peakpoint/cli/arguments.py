"""Arguments that many commands have."""

import importlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from peakpoint.errors import ConfigError, MissingExtraError
from peakpoint.format import amounts
from peakpoint.format.amounts import read_duration
from peakpoint.rules import FORMS, Mode, mode_of

PATH = click.Path(path_type=Path)
ROOT = click.argument("root", type=PATH)
REF = click.argument("ref")
CATALOGUE = click.option(
    "--catalogue",
    metavar="FILE|URL",
    help="The index to use, also from PEAKPOINT_CATALOGUE; catalogue.sqlite in the repository by default.",
)
KEY = click.option("--key", type=PATH, metavar="FILE", help="Sign it with this private key (PEM) first.")
INCOMPLETE = 23  # the exit code of an answer that leaves out what cannot be read


def rules_help(default: str) -> str:
    """Return the help of --rules, each form on a line of its own.

    Args:
        default: the rules without it.
    """
    forms, _, rest = FORMS.partition("; ")
    lines = "\n".join(forms.split())
    notes = rest[:1].upper() + rest[1:]
    return f"Rules, separated by spaces; {default} by default. Forms:\n\n\b\n{lines}\n\n{notes}."


class _Duration(click.ParamType[timedelta]):
    """A time span such as 24h."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:  # noqa: ARG002
        """Read a duration; errors are ours."""
        return read_duration("--undo-for", value)


UNDO_FOR = click.option(
    "--undo-for",
    type=_Duration(),
    default=amounts.UNDO_FOR,
    help="How long peakpoint undo can restore what is removed, such as 7d; 0 frees the space at once.",
)


def reads(reader: Callable[[str, str], Any]) -> Any:
    """Return an option's callback that reads its text, if there is any."""

    def callback(_: click.Context, option: click.Parameter, value: str | None) -> Any:
        return None if value is None else reader(option.opts[-1], value)

    return callback


def metric_with_mode(text: str) -> tuple[str, Mode]:
    """Read ``NAME:max`` or ``NAME:min``."""
    name, colon, mode = text.rpartition(":")
    if not (name and colon):
        raise ConfigError(f"--metric {text!r}: is larger better? say --metric {text}:max or --metric {text}:min")
    return name, mode_of(mode)


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
