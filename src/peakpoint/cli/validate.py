"""The command validate, and how validations look."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peakpoint.cli import render
from peakpoint.cli.arguments import JSON, REF, ROOT, reads
from peakpoint.errors import ConfigError, RefusedError
from peakpoint.format.amounts import read_duration
from peakpoint.production import validation
from peakpoint.production.policy import read_policies
from peakpoint.repository.root import open_repository
from peakpoint.repository.validations import Progress, Validation, ValidationSpec

_COLOURS = {"passed": "green", "failed": "bold red", "skipped": "dim"}
_LINES = 12  # of what was printed, shown with a failure


def _pairs(option: str, texts: tuple[str, ...], read: Callable[[str], Any], example: str) -> dict[str, Any]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            found[name] = read(value.strip()) if name and equals else None
        except ValueError:
            found[name] = None
        if found[name] is None:
            raise ConfigError(f"{option} {text!r} cannot be read; write NAME=VALUE, such as {option} {example}")
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


@click.command()
@ROOT
@REF
@click.option("--with", "evaluate", metavar="MODULE:FUNCTION", help="Evaluates: gets the state, returns metrics.")
@click.option("--model", metavar="MODULE:FUNCTION", help="Makes the model, without arguments.")
@click.option("--part", default="model", show_default=True, help="The part that is the model.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Must be confirmed; repeatable.")
@click.option("--tolerance", type=float, default=1e-3, show_default=True, help="How far a metric may be off.")
@click.option("--sparsity", default="sparsity", show_default=True, help="The metric that is counted in the weights.")
@click.option("--golden", metavar="FILE", help="Safetensors with inputs, and maybe labels.")
@click.option("--agreement", type=float, default=0.0, help="Share of golden predictions that must be the champion's.")
@click.option("--signature", multiple=True, metavar="NAME=F32[*,10]", help="An output of the model; repeatable.")
@click.option(
    "--budget", "budgets", multiple=True, metavar="NAME=LIMIT", help="latency_ms, memory_mb, size_mb, parameters."
)
@click.option("--check", "checks", multiple=True, metavar="MODULE:FUNCTION", help="A check of your own; repeatable.")
@click.option("--against", default="champion", show_default=True, metavar="ALIAS", help="Compare with its holder.")
@click.option("--timeout", callback=reads(read_duration), help="Such as 10min; none by default.")
@JSON
def validate(
    root: Path,
    ref: str,
    against: str,
    timeout: timedelta | None,
    json: bool,  # noqa: FBT001
    **asked: Any,
) -> None:
    """Examine a checkpoint before it is deployed, and record what was found.

    Without options that say what to check, production.toml does, where it has a table for the alias. Exits with 16
    when the checkpoint did not pass.
    """
    asked["budgets"] = _pairs("--budget", asked["budgets"], _number, "latency_ms=20")
    asked["signature"] = _pairs("--signature", asked["signature"], str, "output=F32[*,10]")
    repository = open_repository(root)
    seconds = None if timeout is None else timeout.total_seconds()
    wanted = ValidationSpec(**asked)
    policy = None if _said(asked) else read_policies(repository.store).of(against.removeprefix("@"))
    if policy is not None:
        wanted, seconds = policy.wanted, seconds or policy.timeout
        click.echo(f"checking what production.toml asks of {policy.alias}", err=True)
    with _progress() as progress:
        found = validation.validate(repository, ref, wanted, alias=against, timeout=seconds, progress=progress)
    if json:
        render.as_json(asdict(found) | {"passed": found.passed})
    else:
        show(render.console(), found)
    if not found.passed:
        names = ", ".join(one.check for one in found.failures)
        raise RefusedError(f"{found.run}/{found.name} did not pass: {names}")


def _said(asked: Mapping[str, Any]) -> bool:
    """Whether the command line says anything of what to check."""
    context = click.get_current_context()
    return any(context.get_parameter_source(name) is not ParameterSource.DEFAULT for name in asked)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Says which check is at work: on a terminal in place, otherwise a line each."""
    if not sys.stderr.isatty():
        yield lambda name: click.echo(f"checking {name}", err=True)
        return
    with render.console(stderr=True).status("starting") as status:
        yield lambda name: status.update(f"checking {escape(name)}")


def show(console: Console, found: Validation) -> None:
    """A validation: a line for each check, and what failing ones had printed."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("outcome")
    table.add_column("what was found", overflow="fold")
    table.add_column("seconds", justify="right")
    for one in found.findings:
        colour = _COLOURS[one.outcome]
        table.add_row(escape(one.check), f"[{colour}]{one.outcome}[/]", escape(one.said), f"{one.seconds:.2f}")
    console.print(table)
    for one in found.failures:
        for what in ("output", "traceback"):
            lines = str(one.evidence.get(what, "")).strip().splitlines()[-_LINES:]
            if lines:
                console.print(f"\n[bold]{escape(one.check)}[/], the end of its {what}:")
                console.print(escape("\n".join(f"  {line}" for line in lines)), soft_wrap=True)
    word = "[green]passed[/]" if found.passed else "[bold red]failed[/]"
    console.print(f"\nvalidation {found.number} of {escape(f'{found.run}/{found.name}')}: {word}")


def line(found: Validation) -> str:
    """One validation among others."""
    failures = ", ".join(one.check for one in found.failures)
    word = "[green]passed[/]" if found.passed else f"[bold red]failed[/]: {escape(failures)}"
    return f"{found.number}: {found.at:%Y-%m-%d %H:%M} UTC, {word}, by {escape(found.by)}"


COMMANDS = (validate,)
