"""The command ``import``."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peakpoint.cli import tables
from peakpoint.cli.answer import Answer, answers
from peakpoint.cli.arguments import PATH, ROOT, torch_side
from peakpoint.cli.progress import progress_bar
from peakpoint.cli.render import command, count, number
from peakpoint.cli.tables import Column
from peakpoint.errors import ConfigError, Error, FormatError
from peakpoint.format.amounts import size_text
from peakpoint.repository.root import open_repository
from peakpoint.rules import parse_all

_MOST_NAMES = 20  # files that are named
_HELD_OUT = re.compile(r"(^|[/_.-])(val|acc|loss)", re.IGNORECASE)


@click.command("import")
@click.argument("path", metavar="DIR_OR_FILE", type=PATH)
@ROOT
@click.option("--run", required=True, help="The run that they become; a new one.")
@click.option("--metrics", type=PATH, help="A log: JSON, JSON lines, CSV, or TensorBoard's.")
@click.option(
    "--join", type=click.Choice(["auto", "epoch", "step"]), default="auto", help="What log and checkpoints share."
)
@click.option("--epochs-from", type=click.IntRange(0, 1), default=0, help="The number of the first epoch in the files.")
@click.option("--part", "parts", multiple=True, metavar="FROM=TO", help="A name in the files, and the part it becomes.")
@click.option(
    "--strip-prefix",
    default="",
    show_default=False,
    help="Removed from the names of the model's tensors, such as module.",
)
@click.option("--inert", multiple=True, metavar="MODULE.CLASS", help="Keep objects of it as records of their values.")
@click.option("--rules", "rule_text", help="Put these rules in force, and pin nothing.")
@click.option("--link", is_flag=True, help="Hard-link safetensors files that can serve as they are.")
@click.option("--skip-unreadable", is_flag=True, help="Import the others when a file cannot be read.")
@click.option("--dry-run", is_flag=True, help="Only show what would be imported.")
@answers
def import_(
    path: Path, root: Path, run: str, parts: tuple[str, ...], rule_text: str | None, *, dry_run: bool, **options: Any
) -> Answer:
    """Import checkpoints of other tools into a run; runs no code from the files, and changes none of them."""
    renamed = dict(map(_renamed_part, parts))
    rules = None if rule_text is None else parse_all(rule_text)
    imports = torch_side("peakpoint.exchange.imports", "import")
    with _interrupted(root, run), progress_bar("importing", _bytes(path)) as advance:
        report = imports.import_checkpoints(
            path, root, run=run, parts=renamed, rules=rules, dry_run=dry_run, progress=advance, **options
        )
    problems = [f"not imported: {source.error}" for source in report.checkpoints if source.status == "unreadable"]
    return Answer(
        {"dry_run": dry_run, **msgspec.to_builtins(report, enc_hook=str)},
        lambda console: _print_report(console, root, path, report, dry_run=dry_run, pinned=rules is None),
        problems,
        FormatError.exit_code if problems else 0,
    )


@contextlib.contextmanager
def _interrupted(root: Path, run: str) -> Iterator[None]:
    """After Ctrl-C, say what has been imported."""
    try:
        yield
    except KeyboardInterrupt:
        try:
            imported = len(open_repository(root).run(run).manifests())
        except Error:
            imported = 0
        checkpoints = count(imported, "checkpoint")
        click.echo(f"peakpoint: {checkpoints} in run {run}, each complete; the same command imports the rest", err=True)
        raise


def _renamed_part(text: str) -> tuple[str, str]:
    name, equals, part = text.rpartition("=")
    if not (name and equals and part):
        raise ConfigError(f"--part {text} names no part; give FROM=TO, such as --part generator=model")
    return name, part


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _print_report(console: Console, root: Path, path: Path, report: Any, *, dry_run: bool, pinned: bool) -> None:
    sources = report.checkpoints
    console.print(_table(sources, console.width))
    for note, repeats in Counter(note for source in sources for note in source.notes).items():
        console.print(f"  {escape(note)}" + ("" if repeats == len(sources) else f" ({count(repeats, 'file')})"))
    for note in report.notes:
        console.print(f"  {escape(note)}")
    if any(source.step_counted for source in sources):
        console.print("  (N): step guessed")
    if report.others:
        names = ", ".join(str(file.relative_to(path) if file != path else file) for file in report.others[:_MOST_NAMES])
        more = f" and {len(report.others) - _MOST_NAMES} more" if len(report.others) > _MOST_NAMES else ""
        console.print(f"  not checkpoints: {escape(names)}{more}")
    new = sum(source.status in {"imported", "linked", "planned"} for source in sources)
    console.print(
        f"{count(new, 'checkpoint')} {'would be imported' if dry_run else 'imported'} into run {escape(report.run)}"
        f"{_skipped(sources)}; {count(report.reports, 'report')} in its history"
    )
    if new and not dry_run:
        console.print(f"To see them: {escape(command('ls', root, report.run))}", soft_wrap=True)
        if pinned:
            rules = '--rules "best:METRIC:max last:3"'
            console.print(f"All are pinned. To let rules decide instead, repeat the command with {rules}")


def _skipped(sources: Sequence[Any]) -> str:
    """Say which sources were not imported now, and why not."""
    counts = Counter(source.status for source in sources)
    reasons = {"there": "imported before", "removed": "imported before and removed since", "twin": "duplicate"}
    return "".join(f", {counts[status]} {reason}" for status, reason in reasons.items() if counts[status])


def _metric_names(sources: Sequence[Any]) -> list[str]:
    """Return the metrics of most interest, as many as a table has room for."""
    names = {name: None for source in sources for name in source.metrics}
    return sorted(names, key=lambda name: (_HELD_OUT.search(name) is None, name.startswith("best")))[:3]


_STATUSES = {"unreadable": "[red]unreadable[/]", "there": "imported before", "twin": "duplicate"}


def _table(sources: Sequence[Any], width: int) -> Table:
    """Return one row for each source, with the columns that there is room for."""

    def step(source: Any) -> str:
        return "" if source.step is None else f"({source.step})" if source.step_counted else str(source.step)

    metrics = {
        escape(name): [number(source.metrics.get(name)) for source in sources] for name in _metric_names(sources)
    }
    columns = [
        Column("file", [escape(source.path.name) for source in sources], right=False),
        Column("kind", [escape(source.tool) for source in sources], right=False),
        Column("epoch", ["" if source.epoch is None else str(source.epoch) for source in sources]),
        Column("step", list(map(step, sources))),
        *(Column(title, cells) for title, cells in metrics.items()),
        Column("parts", [escape(", ".join(source.parts)) for source in sources], right=False),
        Column("size", [size_text(source.size_bytes) for source in sources]),
        Column("status", [_STATUSES.get(source.status, str(source.status)) for source in sources], right=False),
    ]
    return tables.table(tables.fitted(columns, ["parts", "kind", "size", *reversed(metrics)], width), width)
