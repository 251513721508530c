"""The command ``soup``: the mean of several checkpoints."""

import functools
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from peakpoint.cli import tables
from peakpoint.cli.answer import Answer, answers
from peakpoint.cli.arguments import ROOT, metric_with_mode, torch_side
from peakpoint.cli.progress import progress_bar
from peakpoint.cli.render import command, count, manifest_json, number
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
    help="All, or only those that make the mean better.",
)
@click.option("--with", "scorer", metavar="MODULE:FUNCTION", help="Your function that scores a model; greedy needs it.")
@click.option("--metric", metavar="NAME:max|min", help="The name of that score, and which are better.")
@click.option("--model", "factory", metavar="MODULE:FUNCTION", help="Your function that makes the model.")
@click.option("--data", "batches", metavar="MODULE:FUNCTION", help="Your function that returns batches for BatchNorm.")
@click.option(
    "--batchnorm",
    type=click.Choice(["estimate", "average"]),
    default="estimate",
    help="Measure its statistics again, or average them.",
)
@click.option("--part", default="model", help="Which part is averaged.")
@click.option("--device", metavar="DEVICE", help="Where the model is put, such as cuda.")
@click.option("--run", help="The run of the soup; that of the first REF with -soup by default.")
@click.option("--why", default="a soup was requested", help="The reason, which protects it from rules.")
@answers
def soup(
    root: Path,
    refs: tuple[str, ...],
    kind: str,
    scorer: str | None,
    metric: str | None,
    factory: str | None,
    batches: str | None,
    part: str,
    **options: Any,
) -> Answer:
    """Average the weights of checkpoints, and save the mean as a checkpoint of a run of its own."""
    repository = open_repository(root)
    soups = torch_side("peakpoint.models.soup")
    name, mode = (None, None) if metric is None else metric_with_mode(metric)
    hint = (
        "; with --model it is given the model, and returns a number"
        if factory
        else "; without --model it is given the state, not a model"
    )
    with progress_bar("reading", _bytes(repository, refs, part) if kind == "uniform" else None) as advance:
        result = soups.soup(
            refs,
            root=repository.store,
            kind=kind,
            evaluate=_user_function("--with", scorer, hint),
            metric=name,
            mode=mode,
            build_model=_user_function("--model", factory),
            data=_user_function("--data", batches),
            part=part,
            progress=advance,
            **options,
        )
    data = {
        "kind": result.kind,
        "members": result.members,
        "score": result.score,
        "tasted": [asdict(trial) for trial in result.trials],
        "checkpoint": manifest_json(repository.find_manifest(result.checkpoint.ref), ()),
    }
    return Answer(data, lambda console: _print(console, root, result))


def _user_function(option: str, spec: str | None, hint: str = "") -> Callable[..., Any] | None:
    """Load a function of the user's; what it raises becomes an error of one line."""
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


def _bytes(repository: Repository, refs: Sequence[str], part: str) -> int:
    """Sum the bytes that are read: every member twice."""
    manifests = map(repository.find_manifest, refs)
    return 2 * sum(manifest.file(name).size for manifest in manifests for name in manifest.parts.get(part, ()))


def _print(console: Console, root: Path, result: Any) -> None:
    if result.trials:
        rows = [
            (escape(trial.ref), number(trial.alone), number(trial.together), "[green]yes[/]" if trial.taken else "no")
            for trial in result.trials
        ]
        console.print(tables.plain(("tried", ">alone", ">in the soup", "taken"), rows))
    else:
        for member in result.members:
            console.print(f"  {escape(member)}")
    score = "" if result.score is None else f"; score {number(result.score)}"
    ref = result.checkpoint.ref
    console.print(f"{escape(ref)} is the mean of {count(len(result.members), 'checkpoint')}{score}", soft_wrap=True)
    console.print(f"To see it: {escape(command('show', root, ref))}", soft_wrap=True)
