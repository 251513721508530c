"""Commands that ask the catalogue: ls, select."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.progress import Progress

from peakpoint.catalogue import Catalogue, Explanation, SelectionQuery
from peakpoint.catalogue.query import Metric, Query
from peakpoint.catalogue.query import parse as parse_query
from peakpoint.catalogue.ranking import WithinSE, ranking_keys
from peakpoint.cli import alias_marks, render, tables
from peakpoint.cli.arguments import CATALOGUE, JSON, ROOT
from peakpoint.cli.tables import Column
from peakpoint.errors import ConfigError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.amounts import read_count
from peakpoint.format.manifest import Checkpoint
from peakpoint.repository import reader
from peakpoint.repository.root import Repository, open_repository
from peakpoint.repository.run import Run
from peakpoint.rules import Mode

_Aliases = Mapping[tuple[str, str], tuple[str, ...]]  # run and id of a checkpoint to those that point at it
_RUNS = 30  # lines of runs that fit on a screen
_SHOWN = 20
_LOOKED_AT = 200  # checkpoints whose files are looked at
INCOMPLETE = 23  # the exit code of an answer that leaves out what cannot be read
_SLOW = 20  # runs to read that are worth a bar


@contextmanager
def progress_of_runs() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, once there is much to read."""
    if not sys.stderr.isatty():
        yield lambda _done, _all: None
        return
    with Progress(console=render.console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading runs", total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=total > _SLOW)


# --- ls -----------------------------------------------------------------------------------------------------------


@click.command()
@ROOT
@click.argument("names", metavar="[RUN]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help=f"All runs, not only the {_RUNS} that saved last.")
@CATALOGUE
@JSON
def ls(root: Path, names: tuple[str, ...], everything: bool, catalogue: str | None, json: bool) -> None:  # noqa: FBT001
    """List runs: peak against last, and sizes; of one run, or those named, each checkpoint and why it is kept."""
    if names and everything:
        raise ConfigError("--all lists all runs; leave it out, or the names")
    repository = open_repository(root)
    alone = not names and len(repository.store.children(layout.RUNS)) == 1
    runs = repository.runs() if alone else [repository.run(name) for name in names]
    if not runs:
        _list(root, repository, Catalogue(repository, catalogue), everything=everything, json=json)
    elif json:
        render.as_json({"root": repository.store.location, "runs": [render.run_json(run) for run in runs]})
    else:
        for run in runs:
            render.print_run(render.console(), run)


def _list(root: Path, repository: Repository, catalogue: Catalogue, *, everything: bool, json: bool) -> None:
    """A line for each run."""
    with progress_of_runs() as progress:
        catalogue.refresh(progress)
    _tell_unread(catalogue)
    listed = catalogue.runs(None if everything or json else _RUNS)
    unread = catalogue.unread
    holders = {run.name: Run(repository.store, run.name).holder() for run in listed if run.name not in unread}
    if json:
        found = [render.listed_json(run, holders.get(run.name)) for run in listed]
        render.as_json({"root": repository.store.location, "runs": found, "unread": unread})
        if unread:
            sys.exit(INCOMPLETE)
        return
    console = render.console()
    if not listed:
        console.print(f"{escape(repository.store.location)} has no runs yet")
        return
    writing = {name for name, holder in holders.items() if holder is not None}
    console.print(render.runs_table(console, listed, writing))
    runs, checkpoints, size = catalogue.totals()
    if len(listed) < runs:
        console.print(f"[dim]and {render.count(runs - len(listed), 'more run')}; --all lists them all[/]")
    console.print(f"{render.count(runs, 'run')}, {render.count(checkpoints, 'checkpoint')}, {render.size(size)}")
    console.print(
        f"[dim]{escape(render.command('ls', root, 'RUN'))} tells why each checkpoint of a run is kept[/]",
        soft_wrap=True,
    )


def _tell_unread(catalogue: Catalogue) -> None:
    for name, why in catalogue.unread.items():
        click.echo(f"peakpoint: {name} cannot be read and is left out: {why}", err=True)
    for alias, why in catalogue.unread_aliases.items():
        click.echo(f"peakpoint: what the alias {alias!r} points at cannot be read: {why}", err=True)


# --- select -------------------------------------------------------------------------------------------------------


class _Ordered(click.Command):
    """A command that remembers in which order its options --max and --min were given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As usual, and note the order."""
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        ctx.meta["order"] = [param.name for param in order if param.name in ("max", "min")]
        return super().parse_args(ctx, args)


def _keys(order: Sequence[Mode], given: Mapping[str, Sequence[str]]) -> dict[str, Mode]:
    """What to rank by, the first that was given first."""
    waiting = {"max": iter(given["max"]), "min": iter(given["min"])}
    keys: dict[str, Mode] = {}
    for mode in order:
        name = next(waiting[mode])
        if name in keys:
            raise ConfigError(f"{name} is given twice to rank by; give it once")
        keys[name] = mode
    return keys


@click.command(cls=_Ordered)
@ROOT
@click.argument("where", default="")
@click.option("--max", "max", multiple=True, metavar="KEY", help="Largest first; further --max and --min break ties.")
@click.option(
    "--min", "min", multiple=True, metavar="KEY", help="Smallest first: a metric, size, epoch, step, created."
)
@click.option("--top", type=click.IntRange(min=1), help=f"How many at most; {_SHOWN} are shown without it.")
@click.option("--all", "everything", is_flag=True, help="All that match.")
@click.option(
    "--within-se", is_flag=True, help="What is no more than one standard error worse than the best is as good."
)
@click.option("--n-eval", help="For --within-se: examples in the evaluation, or a metric that holds them.")
@click.option("--se", metavar="METRIC", help="For --within-se: the metric that holds the standard error.")
@click.option("--percent", is_flag=True, help="For --within-se: the accuracy is from 0 to 100.")
@click.option("--why", "explain", is_flag=True, help="Say what each clause removed, and what came next.")
@click.option("--refs", is_flag=True, help="Print refs only, a line each.")
@CATALOGUE
@JSON
@click.pass_context
def select(
    ctx: click.Context,
    /,
    root: Path,
    where: str,
    top: int | None,
    everything: bool,  # noqa: FBT001
    explain: bool,  # noqa: FBT001
    refs: bool,  # noqa: FBT001
    catalogue: str | None,
    json: bool,  # noqa: FBT001
    **given: Any,
) -> None:
    """Select checkpoints of all runs, such as 'val_accuracy > 0.7 and epoch > 20 and run ~ "resnet50*"'.

    Names are metrics, or run, name, id, epoch, step, sequence, size, created, reason, alias, pinned, archived, whole.
    Joined by and, or, not and parentheses; < <= == != in between ~ + - * / %, has(x), abs(x), metric('val/loss').
    """
    if top is not None and everything:
        raise ConfigError("--top or --all, not both")
    if sum((refs, json, explain)) > 1 and refs:
        raise ConfigError("--refs prints refs and nothing else; leave out --json and --why")
    query = parse_query(where)
    keys = _keys(ctx.meta["order"], given)
    within = _within(given)
    repository = open_repository(root)
    index = Catalogue(repository, catalogue)
    with progress_of_runs() as progress:
        index.refresh(progress)
    few = top is None and not everything and not refs
    ranking = ranking_keys(keys)
    chosen = index.select(SelectionQuery(query=query, keys=ranking, top=_SHOWN + 1 if few else top, within=within))
    shown = list(chosen)
    more = few and len(shown) > _SHOWN
    shown = shown[:_SHOWN] if more else shown
    why = index.select(SelectionQuery(query=query, keys=ranking, top=top, within=within)).why() if explain else None
    damaged = _damaged(repository, shown)
    aliases = index.aliases()
    for ref, what in damaged.items() if refs else ():
        click.echo(f"peakpoint: {ref}: {what}", err=True)
    if json:
        found = {"selected": [_json(one, aliases) | {"damaged": damaged.get(one.ref)} for one in shown], "more": more}
        found["unread"] = chosen.unread
        render.as_json(found | ({} if why is None else {"why": _why_json(why, aliases)}))
    elif refs:
        for checkpoint in shown:
            click.echo(checkpoint.ref)
    else:
        _print(shown, _columns(query, keys), damaged, aliases, more=more, explained=explain)
        if why is not None:
            _print_why(why, keys)
    if chosen.unread:  # which a warning has told
        sys.exit(INCOMPLETE)


def _within(given: Mapping[str, Any]) -> WithinSE | None:
    n_eval, se, percent = given["n_eval"], given["se"], given["percent"]
    if not given["within_se"]:
        if n_eval or se or percent:
            raise ConfigError("--n-eval, --se and --percent are for --within-se; add it, or leave them out")
        return None
    return WithinSE(n_eval=_examples(n_eval), se=se, percent=percent)


def _examples(text: str | None) -> int | str | None:
    """A number of examples, such as 10000 or 1e4, or the name of a metric."""
    try:
        return None if text is None else read_count("--n-eval", text)
    except ConfigError:
        if text is not None and text[:1].isdigit():
            raise
        return text


def _columns(query: Query, keys: dict[str, Mode]) -> list[str]:
    """The metrics that were asked about."""
    named = [*keys, *(metric.name for metric in query.metrics() if isinstance(metric, Metric))]
    return list(dict.fromkeys(named))


_FIXED = ("epoch", "step", "size", "created", "sequence")


def _damaged(repository: Repository, shown: Sequence[Checkpoint]) -> dict[str, str]:
    """Those with files that are missing or of another size: ref to what is wrong. The catalogue knows of no files."""
    manifests = []
    for one in shown[:_LOOKED_AT]:
        try:
            manifests.append(reader.read_manifest(repository.store, one.run, one.name))
        except NotFoundError:  # removed since it was selected
            continue
    wrong = reader.find_damage(repository.store, manifests)
    return {f"{one.run}/{one.name}": wrong[one.id] for one in manifests if one.id in wrong}


def _marked(one: Checkpoint, damaged: Mapping[str, str]) -> str:
    return escape(one.ref) + (" [bold red](damaged)[/]" if one.ref in damaged else "")


def _print(
    shown: Sequence[Checkpoint],
    names: Sequence[str],
    damaged: Mapping[str, str],
    aliases: _Aliases,
    *,
    more: bool,
    explained: bool,
) -> None:
    console = render.console()
    if not shown:
        console.print("nothing matches" + ("" if explained else "; --why says what each clause removed"))
        return
    asked = [name for name in names if name not in _FIXED]
    metrics = asked or _telling(shown)[:4]
    values = [Column(escape(name), [render.number(one.metrics.get(name)) for one in shown]) for name in metrics]
    columns = [
        Column("checkpoint", [_marked(one, damaged) for one in shown], right=False),
        *alias_marks.columns([aliases.get((one.run, one.id), ()) for one in shown]),
        Column("epoch", ["" if one.epoch is None else str(one.epoch) for one in shown]),
        Column("step", [str(one.step) for one in shown]),
        *values,
        Column("size", [render.size(one.size_bytes) for one in shown]),
        Column("created", [render.age(one.created_at) for one in shown]),
    ]
    # of metrics that nobody asked for those behind the second go first
    unasked = [] if asked else [value.title for value in values[:0:-1]]
    spare = [
        *unasked[:-1],
        *(title for title in ("created", "step") if title not in names),
        *unasked[-1:],
        "size",
        "aliases",
    ]
    table = tables.table(tables.fitted(columns, spare, console.width), console.width)
    console.print(table)
    if more:
        console.print(
            "[dim]and more; --top N shows the first N, --all shows all, --max or --min says by what to rank[/]"
        )


def _telling(shown: Sequence[Checkpoint]) -> list[str]:
    """Metrics, those first for which the checkpoints were saved."""
    reasons = [reason for one in shown for reason in one.reasons]

    def place(name: str) -> tuple[int, int]:
        found = [reason.index(name) for reason in reasons if name in reason]
        return -len(found), sum(found)

    return sorted(sorted({name for one in shown for name in one.metrics}), key=place)


def _print_why(why: "Explanation", keys: dict[str, Mode]) -> None:
    console = render.console()
    console.print()
    rows = [("[dim]all checkpoints[/]", "", "", f"{why.candidates:,}")]
    for clause in why.clauses:
        missing = f"{clause.missing:,}" if clause.missing else ""
        rows.append((escape(clause.text), f"{clause.removed:,}", missing, f"{clause.left:,}"))
    console.print(tables.plain(("clause", ">removed", ">without a value", ">left"), rows))
    ranked = ", ".join(f"{escape(name)} ({mode})" for name, mode in keys.items()) or "newest first"
    console.print(f"{why.chosen:,} of {why.clauses[-1].left if why.clauses else why.candidates:,} chosen, by {ranked}")
    for place, one in enumerate(why.runners_up, why.chosen + 1):
        values = ", ".join(f"{escape(name)} {_value(one, name)}" for name in keys)
        console.print(f"next, number {place}: {escape(one.ref)}" + (f" with {values}" if values else ""))


def _value(one: Checkpoint, name: str) -> str:
    """A key's value, for people."""
    if name == "size":
        return render.size(one.size_bytes)
    if name == "created":
        return render.age(one.created_at)
    return render.number(getattr(one, name) if name in _FIXED else one.metrics.get(name))


def _json(one: Checkpoint, aliases: _Aliases) -> dict[str, Any]:
    return render.checkpoint_json(one) | {
        "path": None if one.path is None else str(one.path),
        "aliases": aliases.get((one.run, one.id), ()),
    }


def _why_json(why: "Explanation", aliases: _Aliases) -> dict[str, Any]:
    return {
        "candidates": why.candidates,
        "clauses": [asdict(clause) for clause in why.clauses],
        "chosen": why.chosen,
        "runners_up": [_json(one, aliases) for one in why.runners_up],
    }


COMMANDS = (ls, select)
