"""The command that makes a checkpoint of several: soup."""

import functools
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from peakpoint.cli import render
from peakpoint.cli.arguments import JSON, ROOT, torch_side
from peakpoint.cli.space import progress
from peakpoint.errors import ConfigError, Error
from peakpoint.repository.root import Repository, open_repository
from peakpoint.state.functions import RAISED_BY_PROGRAMS, load_function


@click.command()
@ROOT
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option(
    "--kind",
    type=click.Choice(["uniform", "greedy"]),
    default="uniform",
    show_default=True,
    help="The mean of all, or only of those that make it better.",
)
@click.option("--with", "scorer", metavar="MODULE:FUNCTION", help="Your function that scores a model; greedy needs it.")
@click.option("--metric", metavar="NAME:max|min", help="The name of that score, and which are better.")
@click.option("--model", "factory", metavar="MODULE:FUNCTION", help="Your function that makes the model.")
@click.option("--data", "batches", metavar="MODULE:FUNCTION", help="Your function that returns batches for BatchNorm.")
@click.option(
    "--batchnorm",
    type=click.Choice(["estimate", "average"]),
    default="estimate",
    show_default=True,
    help="Measure the statistics of BatchNorm anew, or average them.",
)
@click.option("--part", default="model", show_default=True, help="Which part is averaged.")
@click.option("--device", metavar="DEVICE", help="Where the model is put, such as cuda.")
@click.option("--run", "run", help="The run of the soup; that of the first REF with -soup by default.")
@click.option("--why", default="a soup was asked for", help="The reason, which protects it from rules.")
@JSON
def soup(
    root: Path,
    refs: tuple[str, ...],
    kind: str,
    scorer: str | None,
    metric: str | None,
    factory: str | None,
    batches: str | None,
    batchnorm: str,
    part: str,
    device: str | None,
    run: str | None,
    why: str,
    json: bool,  # noqa: FBT001
) -> None:
    """Average the weights of checkpoints, and save the mean as a checkpoint of a run of its own."""
    repository = open_repository(root)
    soups = torch_side("peakpoint.models.soup")
    name, mode = (None, None) if metric is None else _metric(metric)
    with progress("reading", _bytes(repository, refs, part) if kind == "uniform" else None) as advance:
        made = soups.soup(
            refs,
            root=repository.store,
            kind=kind,
            evaluate=_called(
                "--with",
                scorer,
                "; with --model it is given the model, and returns a number"
                if factory
                else "; without --model it is given the state, not a model",
            ),
            metric=name,
            mode=mode,
            build_model=_called("--model", factory),
            data=_called("--data", batches),
            batchnorm=batchnorm,
            device=device,
            part=part,
            run=run,
            why=why,
            progress=advance,
        )
    if json:
        checkpoint = render.manifest_json(repository.find_manifest(made.checkpoint.ref), ())
        told = {"kind": made.kind, "members": made.members, "score": made.score}
        render.as_json(told | {"tasted": [asdict(one) for one in made.tasted], "checkpoint": checkpoint})
    else:
        _print(root, made)


def _metric(text: str) -> tuple[str, str]:
    name, colon, mode = text.rpartition(":")
    if not (name and colon) or mode not in ("max", "min"):
        raise ConfigError(f"--metric {text!r}: is larger better? say --metric {text}:max or --metric {text}:min")
    return name, mode


def _called(option: str, spec: str | None, hint: str = "") -> Callable[..., Any] | None:
    """A function of the user's; what it raises is said in one line."""
    if spec is None:
        return None
    try:
        function = load_function(spec)
    except ConfigError as error:
        raise ConfigError(f"{option} {error}") from error

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Error:
            raise
        except RAISED_BY_PROGRAMS as error:
            frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is this one
            where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
            raise ConfigError(f"{option} {spec} raised {type(error).__name__}: {error}{where}{hint}") from error

    return call


def _bytes(repository: Repository, refs: tuple[str, ...], part: str) -> int:
    """Of all that is read: every member twice."""
    manifests = [repository.find_manifest(ref) for ref in refs]
    return 2 * sum(one.file(name).size for one in manifests for name in one.parts.get(part, ()))


def _print(root: Path, made: Any) -> None:
    console = render.console()
    if made.tasted:
        table = Table(box=None, header_style="bold")
        for title in ("tried", "alone", "in the soup", "taken"):
            table.add_column(title, justify="left" if title in {"tried", "taken"} else "right", overflow="fold")
        for one in made.tasted:
            taken = "[green]yes[/]" if one.taken else "no"
            table.add_row(escape(one.ref), render.number(one.alone), render.number(one.together), taken)
        console.print(table)
    else:
        for member in made.members:
            console.print(f"  {escape(member)}")
    score = "" if made.score is None else f"; it scores {render.number(made.score)}"
    ref = made.checkpoint.ref
    console.print(
        f"{escape(ref)} is the mean of {render.count(len(made.members), 'checkpoint')}{score}", soft_wrap=True
    )
    console.print(f"see it with {escape(render.command('show', root, ref))}", soft_wrap=True)


COMMANDS = (soup,)
