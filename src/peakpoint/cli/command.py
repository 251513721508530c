"""What commands are made of: arguments and options, answers, progress."""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import msgspec
from click.core import ParameterSource
from rich.console import Console
from rich.progress import Progress

from peakpoint.cli.completion import CHECKPOINTS, RUNS
from peakpoint.cli.render import console, literal
from peakpoint.cli.terminal import complain, is_terminal, print_json, say
from peakpoint.errors import ConfigError, MissingExtraError
from peakpoint.format import amounts
from peakpoint.format.metrics import json_value
from peakpoint.rules import FORMS, Mode, mode_of

# --- arguments and options that many commands have -----------------------------------------------------------------


PATH = click.Path(path_type=Path)
POSITIVE = click.IntRange(min=1)


class RootType(click.Path):
    """A repository: a directory's path, or the URL of a bucket, which is no path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path or the URL."""
        return value if "://" in str(value) else super().convert(value, param, ctx)


ROOT_TYPE = RootType(path_type=Path)
ROOT = click.argument("root", type=ROOT_TYPE)
RUN = click.argument("name", metavar="RUN", **RUNS)
REF = click.argument("ref", **CHECKPOINTS)
CATALOGUE = click.option(
    "--catalogue",
    metavar="FILE|URL",
    help="The index to use, also from PEAKPOINT_CATALOGUE; catalogue.sqlite in the repository by default.",
)
KEY = click.option("--key", type=PATH, metavar="FILE", help="Sign it with this private key (PEM) first.")


def reads(reader: Callable[[str, str], Any]) -> Any:
    """Return an option's callback that reads its text, if there is any."""

    def callback(_: click.Context, option: click.Parameter, value: str | None) -> Any:
        return None if value is None else reader(option.opts[-1], value)

    return callback


UNDO_FOR = click.option(
    "--undo-for",
    metavar="DURATION",
    callback=reads(amounts.read_duration),
    default=amounts.UNDO_FOR,
    help="How long peakpoint undo can restore what is removed, such as 7d; 0 frees the space at once.",
)


def rules_help(default: str) -> str:
    """Return the help of --rules, each form on a line of its own.

    Args:
        default: the rules without it.
    """
    forms, _, notes = FORMS.partition("; ")
    lines = "\n".join(forms.split())
    return f"Rules, separated by spaces; {default} by default. Forms:\n\n\b\n{lines}\n\n{notes[:1].upper()}{notes[1:]}."


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


# --- answers -------------------------------------------------------------------------------------------------------


INCOMPLETE = 23  # the exit code of an answer that leaves out what cannot be read


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command found or did.

    Attributes:
        data: for ``--json``, or a function that makes it; NaN and infinities become strings.
        text: for people: lines, or a function that prints on a console.
        problems: lines for standard error.
        exit_code: 0 is success.
        json_exit_code: instead, with ``--json``.
    """

    data: Any
    text: str | Callable[[Console], object]
    problems: Sequence[str] = ()
    exit_code: int = 0
    json_exit_code: int = 0


def _builtin(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def _show(answer: Answer, *, as_json: bool) -> None:
    """Print an answer, and exit when its code is not 0."""
    if as_json:
        data = answer.data() if callable(answer.data) else answer.data
        encoded = msgspec.json.encode(json_value(msgspec.to_builtins(data, enc_hook=_builtin)))
        print_json(msgspec.json.format(encoded, indent=2).decode())
    elif callable(answer.text):
        answer.text(console())
    elif answer.text:
        say(answer.text)
    for problem in answer.problems:
        complain(problem)
    if exit_code := (as_json and answer.json_exit_code) or answer.exit_code:
        sys.exit(exit_code)


def given_options(context: click.Context) -> list[str]:
    """Return the options that the command line has, by their long names."""
    default = ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP
    options = [option for option in context.command.params if isinstance(option, click.Option)]
    return [option.opts[-1] for option in options if context.get_parameter_source(option.name or "") not in default]


def _refuse_idle_options(needs: Mapping[str, str], without: Mapping[str, str]) -> None:
    """Refuse options that would have no effect: without one that they need, or beside one that overrides them."""
    options = given_options(click.get_current_context())
    for option in options:
        needed = needs.get(option, "").split()
        if needed and not any(name in options for name in needed):
            raise ConfigError(f"{option} has no effect without {' or '.join(needed)}; add that, or leave {option} out")
        for other in without.get(option, "").split():
            if other in options:
                raise ConfigError(f"{option} has no effect with {other}; leave one of them out")


def command(
    *arguments: Callable[[Any], Any],
    cls: type[click.Command] = click.Command,
    needs: Mapping[str, str] = MappingProxyType({}),
    without: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Callable[..., Answer]], click.Command]:
    """Make a command of a function that returns an answer: it gets arguments and ``--json``, and shows the answer.

    Args:
        arguments: decorators that add arguments.
        cls: the class of the command.
        needs: option to the options, separated by spaces, of which it needs one to have an effect.
        without: option to those beside which it has no effect.
    """

    def decorate(function: Callable[..., Answer]) -> click.Command:
        @functools.wraps(function)
        def call(*, as_json: bool, **values: Any) -> None:
            _refuse_idle_options(needs, without)
            _show(function(**values), as_json=as_json)

        for argument in reversed(arguments):
            argument(call)
        made_command = click.command(function.__name__.rstrip("_"), cls=cls)(call)
        made_command.params.append(click.Option(["--json", "as_json"], is_flag=True, help="Print JSON for programs."))
        return made_command

    return decorate


def confirm(question: str) -> bool:
    """Ask somebody at a terminal; False where there is none."""
    return is_terminal(sys.stdin) and click.confirm(question, err=True)


def confirmed(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """Add ``--yes`` and ``--dry-run``, and pass ``apply``: whether to do it, not only to show the plan."""

    @click.option("--yes", is_flag=True, help="Remove; without it only the plan is shown.")
    @click.option("--dry-run", is_flag=True, help="Show the plan and remove nothing, even with --yes.")
    @functools.wraps(function)
    def call(*, yes: bool, dry_run: bool, **values: Any) -> Answer:
        return function(**values, apply=yes and not dry_run)

    return call


# --- progress on standard error, on a terminal only ----------------------------------------------------------------


_SLOW = 20  # runs to read that are worth a bar


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar; call the yielded function with each further amount."""
    if not is_terminal(sys.stderr):
        yield lambda _: None
        return
    with Progress(console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


@contextmanager
def run_bar() -> Iterator[Callable[[int, int], None]]:
    """Show a bar once there are many runs to read; call the yielded function with how many were read, of how many."""
    if not is_terminal(sys.stderr):
        yield lambda _read, _total: None
        return
    with Progress(console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading runs", total=None, visible=False)
        yield lambda read, total: bar.update(task, completed=read, total=total, visible=total > _SLOW)


@contextmanager
def status_line(start: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done; call the yielded function with each next step."""
    if not is_terminal(sys.stderr):
        yield lambda _: None
        return
    with console(stderr=True).status(start, spinner="line") as status:
        yield lambda step: status.update(literal(step))
