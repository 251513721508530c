"""The command ``select``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from peakpoint.catalogue import Catalogue, Explanation, SelectionQuery
from peakpoint.catalogue.query import Metric
from peakpoint.catalogue.query import parse as parse_query
from peakpoint.catalogue.ranking import WithinSE, ranking_keys
from peakpoint.cli import tables
from peakpoint.cli.command import CATALOGUE, INCOMPLETE, ROOT, Answer, command, run_bar
from peakpoint.cli.render import age, alias_columns, checkpoint_json, fields, literal, number, text
from peakpoint.errors import ConfigError, NotFoundError
from peakpoint.format.amounts import read_count, size_text
from peakpoint.format.manifest import Checkpoint
from peakpoint.repository import reader
from peakpoint.repository.root import Repository, open_repository
from peakpoint.rules import Mode

_ON_A_SCREEN = 20  # checkpoints
_MOST_CHECKED = 200  # checkpoints whose files are looked at
_FIELDS = ("epoch", "step", "size", "created", "sequence")


class OrderedOptions(click.Command):
    """A command that remembers in which order its options --max and --min were given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as usual, and note the order."""
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        ctx.meta["order"] = [param.name for param in order if param.name in ("max", "min")]
        return super().parse_args(ctx, args)


@dataclass(frozen=True, slots=True)
class SelectView:
    """Everything that ``select`` shows.

    Attributes:
        more: whether further checkpoints match.
        damaged: ref to what is wrong with the files.
        aliases: run and id of a checkpoint to the aliases that point at it.
        explanation: with --why.
        unread: run to why it cannot be read.
        keys: what to rank by.
        metrics: those of the condition and of the keys.
    """

    checkpoints: Sequence[Checkpoint]
    more: bool
    damaged: Mapping[str, str]
    aliases: Mapping[tuple[str, str], tuple[str, ...]]
    explanation: Explanation | None
    unread: Mapping[str, str]
    keys: Mapping[str, Mode]
    metrics: Sequence[str]


@command(
    ROOT,
    click.argument("where", default=""),
    cls=OrderedOptions,
    needs={"--n-eval": "--within-se", "--se": "--within-se", "--percent": "--n-eval"},
    without={"--top": "--all", "--refs": "--why --json"},
)
@click.option("--max", "max", multiple=True, metavar="KEY", help="Largest first; further --max and --min break ties.")
@click.option("--min", "min", multiple=True, metavar="KEY", help="Smallest first: metric, size, epoch, step, created.")
@click.option("--top", type=click.IntRange(min=1), help=f"How many at most; {_ON_A_SCREEN} are shown without it.")
@click.option("--all", "all_matches", is_flag=True, help="All that match.")
@click.option("--within-se", is_flag=True, help="Count what is within one standard error of the best as equal.")
@click.option("--n-eval", help="For --within-se: examples in the evaluation, or a metric that holds them.")
@click.option("--se", metavar="METRIC", help="For --within-se: the metric that holds the standard error.")
@click.option("--percent", is_flag=True, help="For --within-se: the accuracy is from 0 to 100.")
@click.option("--why", is_flag=True, help="Say what each clause removed, and which checkpoints came next.")
@click.option("--refs", is_flag=True, help="Print refs only, a line each.")
@CATALOGUE
def select(
    root: Path,
    where: str,
    top: int | None,
    catalogue: str | None,
    *,
    all_matches: bool,
    why: bool,
    refs: bool,
    **options: Any,
) -> Answer:
    """Find checkpoints of all runs, such as 'val_accuracy > 0.7 and epoch > 20 and run ~ "resnet50*"'.

    Names are metrics, or run, name, id, epoch, step, sequence, size, created, reason, alias, pinned, archived, whole.
    Joined by and, or, not and parentheses; < <= == != in between ~ + - * / %, has(x), abs(x), metric('val/loss').
    """
    context = click.get_current_context()
    query = parse_query(where)
    keys = _keys(context.meta["order"], options)
    selection = SelectionQuery(query=query, keys=ranking_keys(keys), top=top, within=_within(**options))
    limit = not (top or all_matches or refs)
    view = _select(open_repository(root), catalogue, selection, keys, why=why, limit=limit)
    exit_code = INCOMPLETE if view.unread else 0  # a warning has named what is missing
    if refs:
        problems = [f"{ref}: {damage}" for ref, damage in view.damaged.items()]
        lines = "\n".join(checkpoint.ref for checkpoint in view.checkpoints)
        return Answer(None, lines, problems, exit_code)
    return Answer(_json(view), lambda console: _print(console, view), exit_code=exit_code)


def _select(
    repository: Repository,
    where: str | None,
    query: SelectionQuery,
    keys: Mapping[str, Mode],
    *,
    why: bool,
    limit: bool,
) -> SelectView:
    """Select checkpoints; with ``limit`` no more than fit on a screen."""
    catalogue = Catalogue(repository, where)
    with run_bar() as progress:
        catalogue.refresh(progress)
    selection = catalogue.select(replace(query, top=_ON_A_SCREEN + 1) if limit else query)
    checkpoints = list(selection)
    more = limit and len(checkpoints) > _ON_A_SCREEN
    if more:
        checkpoints.pop()
    names = [*keys, *(metric.name for metric in query.query.metrics() if isinstance(metric, Metric))]
    return SelectView(
        checkpoints=checkpoints,
        more=more,
        damaged=_damaged(repository, checkpoints),
        aliases=catalogue.aliases(),
        explanation=catalogue.select(query).why() if why else None,
        unread=selection.unread,
        keys=keys,
        metrics=[name for name in dict.fromkeys(names) if name not in _FIELDS],
    )


def _keys(order: Sequence[Mode], options: Mapping[str, Sequence[str]]) -> dict[str, Mode]:
    """Return what to rank by, the first that was given first."""
    names = {"max": iter(options["max"]), "min": iter(options["min"])}
    keys: dict[str, Mode] = {}
    for mode in order:
        name = next(names[mode])
        if name in keys:
            raise ConfigError(f"{name} is given twice to rank by; give it once")
        keys[name] = mode
    return keys


def _within(*, within_se: bool, n_eval: str | None, se: str | None, percent: bool, **_: Any) -> WithinSE | None:
    if not within_se:
        return None
    return WithinSE(n_eval=_examples(n_eval), se=se, percent=percent)


def _examples(text: str | None) -> int | str | None:
    """Read a number of examples, such as 10000 or 1e4, or the name of a metric."""
    try:
        return None if text is None else read_count("--n-eval", text)
    except ConfigError:
        if text is not None and text[:1].isdigit():
            raise
        return text


def _damaged(repository: Repository, checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """Look for files that are missing or of another size, since the catalogue knows of no files: ref to damage."""
    manifests = []
    for checkpoint in checkpoints[:_MOST_CHECKED]:
        try:
            manifests.append(reader.read_manifest(repository.store, checkpoint.run, checkpoint.name))
        except NotFoundError:  # removed since it was selected
            continue
    damage = reader.find_damage(repository.store, manifests)
    return {f"{manifest.run}/{manifest.name}": damage[manifest.id] for manifest in manifests if manifest.id in damage}


# --- how selections look -------------------------------------------------------------------------------------------


def _print(console: Console, view: SelectView) -> None:
    if view.checkpoints:
        _print_checkpoints(console, view)
    else:
        hint = "" if view.explanation else "; --why says what each clause removed"
        console.print(f"no checkpoint matches{hint}")
    if view.explanation is not None:
        _print_explanation(console, view.explanation, view.keys)


def _print_checkpoints(console: Console, view: SelectView) -> None:
    checkpoints = view.checkpoints
    metrics = [
        tables.Column(literal(name), [number(checkpoint.metrics.get(name)) for checkpoint in checkpoints])
        for name in view.metrics or _by_relevance(checkpoints)[:4]
    ]
    columns = [
        tables.Column("checkpoint", [_marked(checkpoint, view.damaged) for checkpoint in checkpoints], right=False),
        *alias_columns([view.aliases.get((checkpoint.run, checkpoint.id), ()) for checkpoint in checkpoints]),
        tables.Column("epoch", [text(checkpoint.epoch) for checkpoint in checkpoints]),
        tables.Column("step", [str(checkpoint.step) for checkpoint in checkpoints]),
        *metrics,
        tables.Column("size", [size_text(checkpoint.size_bytes) for checkpoint in checkpoints]),
        tables.Column("created", [age(checkpoint.created_at) for checkpoint in checkpoints]),
    ]
    # of metrics that the condition does not name those behind the second go first
    unnamed = [] if view.metrics else [metric.title for metric in metrics[:0:-1]]
    fixed = [title for title in ("created", "step") if title not in view.keys]
    spare = [*unnamed[:-1], *fixed, *unnamed[-1:], "size", "aliases"]
    console.print(tables.fitted_table(columns, spare, console.width))
    if view.more:
        console.print("[dim]and more; --top N shows N, --all shows all, --max or --min ranks[/]")


def _marked(checkpoint: Checkpoint, damaged: Mapping[str, str]) -> str:
    return literal(checkpoint.ref) + (" [bold red](damaged)[/]" if checkpoint.ref in damaged else "")


def _by_relevance(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return the metrics, those first for which the checkpoints were saved."""
    reasons = [reason for checkpoint in checkpoints for reason in checkpoint.reasons]

    def rank(name: str) -> tuple[int, int]:
        positions = [reason.index(name) for reason in reasons if name in reason]
        return -len(positions), sum(positions)

    return sorted(sorted({name for checkpoint in checkpoints for name in checkpoint.metrics}), key=rank)


def _print_explanation(console: Console, explanation: Explanation, keys: Mapping[str, Mode]) -> None:
    console.print()
    rows = [("[dim]all checkpoints[/]", "", "", f"{explanation.candidates:,}")]
    for clause in explanation.clauses:
        missing = f"{clause.missing:,}" if clause.missing else ""
        rows.append((literal(clause.text), f"{clause.removed:,}", missing, f"{clause.left:,}"))
    console.print(tables.PlainTable(("clause", ">removed", ">without a value", ">left"), rows))
    order = ", ".join(f"{literal(name)} ({mode})" for name, mode in keys.items()) or "newest first"
    matching = explanation.clauses[-1].left if explanation.clauses else explanation.candidates
    console.print(f"{explanation.chosen:,} of {matching:,} selected, by {order}")
    for place, checkpoint in enumerate(explanation.runners_up, explanation.chosen + 1):
        values = ", ".join(f"{literal(name)} {_value(checkpoint, name)}" for name in keys)
        console.print(f"next, number {place}: {literal(checkpoint.ref)}" + (f" with {values}" if values else ""))


def _value(checkpoint: Checkpoint, name: str) -> str:
    if name == "size":
        return size_text(checkpoint.size_bytes)
    if name == "created":
        return age(checkpoint.created_at)
    return number(getattr(checkpoint, name) if name in _FIELDS else checkpoint.metrics.get(name))


def _json(view: SelectView) -> dict[str, Any]:
    explanation = view.explanation
    data = fields(view, "more", "unread")
    data["selected"] = [
        _checkpoint_json(view, checkpoint) | {"damaged": view.damaged.get(checkpoint.ref)}
        for checkpoint in view.checkpoints
    ]
    if explanation is not None:
        runners_up = [_checkpoint_json(view, checkpoint) for checkpoint in explanation.runners_up]
        data["why"] = fields(explanation, "candidates", "clauses", "chosen") | {"runners_up": runners_up}
    return data


def _checkpoint_json(view: SelectView, checkpoint: Checkpoint) -> dict[str, Any]:
    aliases = view.aliases.get((checkpoint.run, checkpoint.id), ())
    return checkpoint_json(checkpoint) | {"path": checkpoint.path, "aliases": aliases}
