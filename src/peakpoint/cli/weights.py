"""The commands ``diff`` and ``soup``: the weights of several checkpoints."""

import functools
import math
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from peakpoint.cli import tables
from peakpoint.cli.command import ROOT, Answer, command, metric_with_mode, progress_bar, torch_side
from peakpoint.cli.completion import CHECKPOINTS
from peakpoint.cli.render import command_line, count, fields, listed, literal, manifest_json, number, rounded
from peakpoint.errors import ConfigError, Error
from peakpoint.format.amounts import size_text
from peakpoint.format.settings import SETTING
from peakpoint.reports.diff import (
    CheckpointDifference,
    DiffSide,
    MetricDifference,
    TensorDifference,
    by_importance,
    diff_manifests,
    is_counter,
)
from peakpoint.repository.root import Repository, open_repository
from peakpoint.state.functions import RAISED_BY_PROGRAMS, load_function

# --- diff ----------------------------------------------------------------------------------------------------------


_VALUES = 20  # that differ, shown
_COUNTERS = 3  # that differ, shown
_WIDE = 120  # columns from which on a tensor is one line


@command(
    ROOT,
    click.argument("a", metavar="REF", **CHECKPOINTS),
    click.argument("b", metavar="REF", **CHECKPOINTS),
    without={"--top": "--all"},
)
@click.option("--no-values", is_flag=True, help="From the manifests alone; opens no other file, needs no torch.")
@click.option("--top", type=click.IntRange(min=0), default=20, help="How many tensors to list.")
@click.option("--all", "all_tensors", is_flag=True, help="List them all.")
def diff(root: Path, a: str, b: str, top: int, *, no_values: bool, all_tensors: bool) -> Answer:
    """Compare two checkpoints: metrics, rules, versions, values, tensor by tensor."""
    repository = open_repository(root)
    manifests = repository.find_manifest(a), repository.find_manifest(b)
    difference = diff_manifests(repository, *manifests)
    if not no_values:
        value_diff = torch_side("peakpoint.models.value_diff")
        total = sum(tensor.bytes for tensor in difference.tensors if tensor.what in {"dtype", "values"})
        with progress_bar("comparing", total) as advance:
            difference = value_diff.with_distances(repository.store, *manifests, difference, advance)
    tensors = by_importance(difference.tensors)
    tensors = tensors if all_tensors else tensors[:top]
    return Answer(_json(difference, tensors), lambda console: _print_diff(console, difference, tensors))


def _json(difference: CheckpointDifference, tensors: Sequence[TensorDifference]) -> dict[str, Any]:
    return asdict(difference) | {
        "metrics": [asdict(metric) | {"change": metric.change} for metric in difference.metrics],
        "tensors": tensors,
        "different_tensors": len(difference.tensors),
        "identical": difference.identical,
    }


def _print_diff(console: Console, difference: CheckpointDifference, tensors: Sequence[TensorDifference]) -> None:
    """Print what matters first: metrics and settings, then values and weights, and last what differs always."""
    a, b = difference.a, difference.b
    changed = [metric for metric in difference.metrics if not _same(metric)]
    rows = [*map(_metric_cells, changed), *(tuple(map(literal, row)) for row in _settings(a, b))]
    if not rows:
        rows = [("metrics and settings", "the same", "the same")]
    console.print(tables.PlainTable(("", f"a: {literal(a.ref)}", f"b: {literal(b.ref)}"), rows))
    console.print()
    for side, parts in (("a", difference.parts_only_in_a), ("b", difference.parts_only_in_b)):
        for part in parts:
            console.print(f"part {literal(part)} is only in {side}")
    plain = [value for value in difference.plain or () if not is_counter(value.path)]
    if plain:
        values = [(literal(value.path), *map(literal, _plain(value.a, value.b))) for value in plain[:_VALUES]]
        console.print(tables.PlainTable(("value", "a", "b"), values))
        if len(plain) > _VALUES:
            console.print(f"and {len(plain) - _VALUES} other values; --json lists them")
        console.print()
    _print_tensors(console, difference, tensors)
    console.print()
    _print_rest(console, difference)


def _same(metric: MetricDifference) -> bool:
    return metric.a == metric.b or (metric.change is not None and math.isnan(metric.change))


def _print_rest(console: Console, difference: CheckpointDifference) -> None:
    """Print what says little: when each was saved and why, counters of steps, and what is the same."""
    rows = [(name, fact(difference.a), fact(difference.b)) for name, fact in _FACTS.items()]
    console.print(tables.PlainTable(("", "a", "b"), rows))
    counters = [value for value in difference.plain or () if is_counter(value.path)]
    if counters:
        texts = [f"{value.path} {value.a} and {value.b}" for value in counters]
        console.print(f"counters: {literal(listed(texts, _COUNTERS))}")
    if difference.generators_same is not None:
        console.print(f"random generators: {'the same' if difference.generators_same else 'in different states'}")
    same = [metric.name for metric in difference.metrics if _same(metric)]
    if same:
        console.print(f"the same in both: {literal(listed(same, _VALUES))}")


def _metric_cells(metric: MetricDifference) -> tuple[str, str, str]:
    cells = {"a": number(metric.a) or "none", "b": number(metric.b) or "none"}
    if metric.better:
        cells[metric.better] = f"[bold green]{cells[metric.better]} *[/]"
    if metric.change is not None:
        cells["b"] += f"  ({rounded(metric.change, metric.a or 0, metric.b or 0):+.6g})"
    return literal(metric.name), cells["a"], cells["b"]


_FLOAT = re.compile(r"(?<![\w.\"-])-?\d+(?:\.\d+(?:[eE][+-]?\d+)?|[eE][+-]?\d+)(?![\w.\"-])")


def _plain(*sides: str | None) -> list[str]:
    """Shorten two values that differ: fractions in six digits, unless that makes them the same."""
    long = [str(side)[:60] for side in sides]
    short = [
        side if side.startswith('"') else _FLOAT.sub(lambda match: number(float(match[0])), side)
        for side in map(str, sides)
    ]
    return [side[:60] for side in short] if len(set(short)) == len(short) else long


_FACTS: dict[str, Callable[[DiffSide], str]] = {  # in markup
    "at": lambda side: f"step {side.step}" + ("" if side.epoch is None else f", epoch {side.epoch}"),
    "created": lambda side: f"{side.created_at:%Y-%m-%d %H:%M:%S} UTC",
    "size": lambda side: size_text(side.size_bytes),
    "saved because": lambda side: "\n".join(map(literal, side.reasons)),
    "id": lambda side: literal(side.id),
}


def _settings(a: DiffSide, b: DiffSide) -> list[tuple[str, str, str]]:
    """Return what was set differently: settings, rules, classes, and what wrote the checkpoints."""
    rows = [("rules", " ".join(a.rules), " ".join(b.rules))]
    both = ((SETTING, a.settings, b.settings), ("class of ", a.classes, b.classes), ("", a.written_by, b.written_by))
    for prefix, of_a, of_b in both:
        names = dict.fromkeys(name for name in [*of_a, *of_b] if name != "pid")  # says nothing
        rows += [(prefix + name, of_a.get(name, "none"), of_b.get(name, "none")) for name in names]
    return [row for row in rows if row[1] != row[2]]


def _print_tensors(console: Console, difference: CheckpointDifference, tensors: Sequence[TensorDifference]) -> None:
    console.print(
        f"{count(difference.same_tensors, 'tensor')} the same, {size_text(difference.same_bytes)}; "
        f"{len(difference.tensors)} different, {size_text(difference.changed_bytes)}"
    )
    if not tensors:
        return
    measured = any(tensor.distance for tensor in tensors)
    heads: tuple[str, ...] = ("tensor", ">size", ">relative", ">L2", ">largest", ">cosine", ">changed", ">zeros")
    heads = heads if measured else heads[:2]
    gap = "  " if console.width >= _WIDE else "\n"
    rows = [
        (literal(f"{tensor.part}: {tensor.name}") + gap + _types(tensor), size_text(tensor.bytes), *_figures(tensor))
        for tensor in tensors
    ]
    console.print(tables.PlainTable(heads, [row[: len(heads)] for row in rows]))
    if len(difference.tensors) > len(tensors):
        console.print(f"and {len(difference.tensors) - len(tensors)} more; --all lists them")


def _types(tensor: TensorDifference) -> str:
    """The types and shapes of a tensor on both sides, in markup."""

    def type_of(side: tuple[str, tuple[int, ...]] | None) -> str:
        return "" if side is None else f"{side[0]}[{', '.join(map(str, side[1]))}]"

    match tensor.what:
        case "values":
            text = type_of(tensor.a)
        case "only in a" | "only in b":
            text = f"{tensor.what}: {type_of(tensor.a or tensor.b)}"
        case _:
            text = f"{type_of(tensor.a)} and {type_of(tensor.b)}"
    not_finite = tensor.distance.not_finite if tensor.distance else (0, 0)
    warning = f" [yellow]not finite: {not_finite[0]} and {not_finite[1]}[/]" if any(not_finite) else ""
    return f"[dim]{literal(text)}{warning}[/]"


def _figures(tensor: TensorDifference) -> list[str]:
    distance = tensor.distance
    if distance is None:
        return [""] * 6
    cosine = "" if distance.cosine is None else f"{distance.cosine:.5f}"
    changed = "" if distance.changed is None else str(distance.changed)
    zeros = " ".join(f"{share:.1%}" for share in dict.fromkeys(distance.zeros))
    return [f"{distance.relative:.4g}", f"{distance.l2:.4g}", f"{distance.largest:.4g}", cosine, changed, zeros]


# --- soup ----------------------------------------------------------------------------------------------------------


@command(
    ROOT,
    click.argument("refs", metavar="REF...", nargs=-1, required=True, **CHECKPOINTS),
    needs={"--device": "--model", "--data": "--model", "--metric": "--with"},
)
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
    given_model = "; with --model it is given the model, and returns a number"
    hint = given_model if factory else "; without --model it is given the state, not a model"
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
    run, manifest = repository.locate(result.checkpoint.ref)
    checkpoint = manifest_json(manifest, run.kept().get(manifest.id, ()))
    data = fields(result, "kind", "members", "score") | {"tasted": result.trials, "checkpoint": checkpoint}
    return Answer(data, lambda console: _print_soup(console, root, result))


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


def _print_soup(console: Console, root: Path, result: Any) -> None:
    if result.trials:
        rows = [
            (literal(trial.ref), number(trial.alone), number(trial.together), "[green]yes[/]" if trial.taken else "no")
            for trial in result.trials
        ]
        console.print(tables.PlainTable(("tried", ">alone", ">in the soup", "taken"), rows))
    else:
        for member in result.members:
            console.print(f"  {literal(member)}")
    score = "" if result.score is None else f"; score {number(result.score)}"
    ref = result.checkpoint.ref
    console.print(f"{literal(ref)} is the mean of {count(len(result.members), 'checkpoint')}{score}", soft_wrap=True)
    console.print(f"To see it: {literal(command_line('show', root, ref))}", soft_wrap=True)
