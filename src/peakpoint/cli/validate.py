"""The command ``validate``, and how validations look."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.markup import escape

from peakpoint.cli import tables
from peakpoint.cli.answer import Answer, answers
from peakpoint.cli.arguments import REF, ROOT, reads
from peakpoint.cli.progress import status_line
from peakpoint.cli.render import count
from peakpoint.errors import ConfigError, RefusedError
from peakpoint.format.amounts import read_duration
from peakpoint.production import validation
from peakpoint.production.policy import read_policies
from peakpoint.repository.root import open_repository
from peakpoint.repository.validations import Finding, Progress, Validation, ValidationSpec

_OUTPUT_LINES = 12  # of what was printed, shown with a failure


def _pairs(option: str, texts: Sequence[str], read: Callable[[str], Any], example: str) -> dict[str, Any]:
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            values[name] = read(value.strip()) if name and equals else None
        except ValueError:
            values[name] = None
        if values[name] is None:
            raise ConfigError(f"{option} {text!r} cannot be read; write NAME=VALUE, such as {option} {example}")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


@click.command()
@ROOT
@REF
@click.option("--with", "evaluate", metavar="MODULE:FUNCTION", help="Evaluates: gets the state, returns metrics.")
@click.option("--model", metavar="MODULE:FUNCTION", help="Makes the model, without arguments.")
@click.option("--part", default="model", help="The part that is the model.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Must be confirmed; repeatable.")
@click.option("--tolerance", type=float, default=1e-3, help="How far a metric may be off.")
@click.option("--sparsity", default="sparsity", help="The metric that is counted in the weights.")
@click.option("--golden", metavar="FILE", help="Safetensors with inputs, and maybe labels.")
@click.option("--agreement", type=float, default=0.0, help="Share of golden predictions that must be the champion's.")
@click.option("--signature", multiple=True, metavar="NAME=F32[*,10]", help="An output of the model; repeatable.")
@click.option(
    "--budget", "budgets", multiple=True, metavar="NAME=LIMIT", help="latency_ms, memory_mb, size_mb, parameters."
)
@click.option("--check", "checks", multiple=True, metavar="MODULE:FUNCTION", help="A check of your own; repeatable.")
@click.option("--against", default="champion", metavar="ALIAS", help="Compare with its holder.")
@click.option("--timeout", callback=reads(read_duration), help="Such as 10min; none by default.")
@answers
def validate(root: Path, ref: str, against: str, timeout: timedelta | None, **checks: Any) -> Answer:
    """Check a checkpoint before it is deployed, and record the result.

    Without options that say what to check, production.toml does, where it has a table for the alias. Exits with 16
    when the checkpoint did not pass.
    """
    checks["budgets"] = _pairs("--budget", checks["budgets"], _finite, "latency_ms=20")
    checks["signature"] = _pairs("--signature", checks["signature"], str, "output=F32[*,10]")
    repository = open_repository(root)
    seconds = None if timeout is None else timeout.total_seconds()
    request = ValidationSpec(**checks)
    policy = None if _any_given(checks) else read_policies(repository.store).of(against.removeprefix("@"))
    if policy is not None:
        request, seconds = policy.wanted, seconds or policy.timeout
        click.echo(f"checking what production.toml demands of {policy.alias}", err=True)
    with _check_progress() as progress:
        result = validation.validate(repository, ref, request, alias=against, timeout=seconds, progress=progress)
    problems = []
    if not result.passed:
        names = ", ".join(finding.check for finding in result.failures)
        problems = [f"{result.run}/{result.name} did not pass: {names}"]
    return Answer(
        asdict(result) | {"passed": result.passed},
        lambda console: _print_validation(console, result),
        problems,
        0 if result.passed else RefusedError.exit_code,
    )


def _any_given(checks: Mapping[str, Any]) -> bool:
    """Whether the command line says anything of what to check."""
    context = click.get_current_context()
    return any(context.get_parameter_source(name) is not ParameterSource.DEFAULT for name in checks)


@contextmanager
def _check_progress() -> Iterator[Progress]:
    """Say which check is running: on a terminal in place, otherwise a line each."""
    if not sys.stderr.isatty():
        yield lambda name: click.echo(f"checking {name}", err=True)
        return
    with status_line("starting") as progress:
        yield lambda name: progress(f"checking {name}")


# --- how validations look ------------------------------------------------------------------------------------------


def _print_validation(console: Console, result: Validation) -> None:
    """Print a line for each check that ran, one for all that were skipped, and what failing ones had printed."""
    ran = [finding for finding in result.findings if finding.outcome != "skipped"]
    rows = [
        (escape(finding.check), _outcome(finding), escape(finding.said), f"{finding.seconds:.2f}") for finding in ran
    ]
    console.print(tables.plain(("check", "outcome", "result", ">seconds"), rows))
    skipped: dict[str, list[str]] = {}
    for finding in result.findings:
        if finding.outcome == "skipped":
            skipped.setdefault(finding.said, []).append(finding.check)
    if skipped:
        reasons = "; ".join(f"{', '.join(checks)} ({reason})" for reason, checks in skipped.items())
        console.print(f"[dim]skipped: {escape(reasons)}[/]")
    for finding in result.failures:
        for stream in ("output", "traceback"):
            lines = str(finding.evidence.get(stream, "")).strip().splitlines()[-_OUTPUT_LINES:]
            if lines:
                console.print(f"\n[bold]{escape(finding.check)}[/], the end of its {stream}:")
                console.print(escape("\n".join(f"  {line}" for line in lines)), soft_wrap=True)
    console.print(f"\nvalidation {result.number} of {escape(f'{result.run}/{result.name}')}: {verdict(result)}")


def _outcome(finding: Finding) -> str:
    return f"[{'green' if finding.outcome == 'passed' else 'bold red'}]{finding.outcome}[/]"


def verdict(result: Validation) -> str:
    """Say whether a validation passed, and how many of its checks ran, in markup."""
    if not result.passed:
        return f"[bold red]failed[/]: {escape(', '.join(finding.check for finding in result.failures))}"
    passed = sum(finding.outcome == "passed" for finding in result.findings)
    skipped = sum(finding.outcome == "skipped" for finding in result.findings)
    return f"[green]passed[/] ({count(passed, 'check')} passed" + (f", {skipped} skipped)" if skipped else ")")


def validation_line(result: Validation) -> str:
    """Return a validation in a line, in markup."""
    return f"{result.number}: {result.at:%Y-%m-%d %H:%M} UTC, {verdict(result)}, by {escape(result.by)}"
