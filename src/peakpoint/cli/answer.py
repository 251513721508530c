"""Answers of commands: JSON for programs, text for people, problems on standard error, and an exit code."""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
import msgspec
from rich.console import Console

from peakpoint.cli.render import console
from peakpoint.format.metrics import json_value


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


def show(answer: Answer, *, as_json: bool) -> None:
    """Print an answer, and exit when its code is not 0."""
    if as_json:
        data = answer.data() if callable(answer.data) else answer.data
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(json_value(data)), indent=2).decode() + "\n")
    elif callable(answer.text):
        answer.text(console())
    elif answer.text:
        click.echo(answer.text)
    for problem in answer.problems:
        click.echo(f"peakpoint: {problem}", err=True)
    if exit_code := (as_json and answer.json_exit_code) or answer.exit_code:
        sys.exit(exit_code)


def answers(function: Callable[..., Answer]) -> Callable[..., None]:
    """Add ``--json`` to a command that returns an answer, and show the answer."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
    @functools.wraps(function)
    def command(*, as_json: bool, **arguments: Any) -> None:
        show(function(**arguments), as_json=as_json)

    return command


def confirmed(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """Add ``--yes`` and ``--dry-run``, and pass ``apply``: whether to do it, not only to show the plan."""

    @click.option("--yes", is_flag=True, help="Remove; without it only the plan is shown.")
    @click.option("--dry-run", is_flag=True, help="Show the plan and remove nothing, even with --yes.")
    @functools.wraps(function)
    def command(*, yes: bool, dry_run: bool, **arguments: Any) -> Answer:
        return function(**arguments, apply=yes and not dry_run)

    return command


def asks(*, yes: bool) -> bool:
    """Whether a command asks before it acts: on a terminal, without ``--yes`` and ``--json``."""
    return not (yes or click.get_current_context().params["as_json"]) and sys.stdin.isatty()
