"""The commands ``report`` and ``changelog``."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.text import Text

from peakpoint.cli.command import INCOMPLETE, PATH, ROOT, Answer, command, metric_with_mode, reads, status_line
from peakpoint.cli.completion import RUNS
from peakpoint.cli.render import left_out, literal
from peakpoint.cli.tables import PlainTable
from peakpoint.errors import ConfigError, ConflictError, printable
from peakpoint.format.amounts import size_text
from peakpoint.reports import changelog as changelogs
from peakpoint.reports import evaluation
from peakpoint.reports.changelog import markdown
from peakpoint.reports.evaluation import files, tables
from peakpoint.repository.root import open_repository
from peakpoint.store import translated

_WHOLE = (tables.CURVE, "verdict")
_STYLES = {
    "peak": "bold yellow",
    "not finite": "bold red",
    "within noise": "green",
    "still improving": "green",
    tables.NOISE_UNKNOWN: "cyan",
}


@command(
    ROOT,
    click.argument("names", metavar="[RUN]...", nargs=-1, **RUNS),
    needs={"--separate": "--to", "--force": "--to", "--percent": "--n-eval"},
)
@click.option("--metric", "metrics", multiple=True, metavar="NAME:max|min", help="A metric to report; may be repeated.")
@click.option("--n-eval", "counts", multiple=True, metavar="[METRIC=]N", help="Examples of an evaluation.")
@click.option("--percent", is_flag=True, help="The metrics of --n-eval are percentages, from 0 to 100.")
@click.option("--group-by", default="optimizer", help="Also config.NAME, or a REGEX with one group.")
@click.option("--sparsity", default="sparsity", help="The metric that holds the sparsity.")
@click.option(
    "--compare", nargs=2, multiple=True, metavar="ORIGINAL COMPRESSED", help="Two refs, or the best of two runs."
)
@click.option("--part", default="model", help="The part whose parameters are counted.")
@click.option("--separate", is_flag=True, help="A figure for each run.")
@click.option("--to", "targets", multiple=True, type=PATH, help="DIR or FILE.html, .md, .png, .svg, .json, .csv.")
@click.option("--force", is_flag=True, help="Replace files that are not earlier reports, too.")
def report(
    root: Path,
    names: tuple[str, ...],
    metrics: tuple[str, ...],
    counts: tuple[str, ...],
    targets: tuple[Path, ...],
    *,
    force: bool,
    separate: bool,
    **options: Any,
) -> Answer:
    """Report runs: best against last, by optimizer, by sparsity, compressed against original."""
    with status_line("reading"):
        result = evaluation.evaluate(
            open_repository(root),
            names,
            metrics=dict(map(metric_with_mode, metrics)),
            n_eval=_examples(counts),
            **options,
        )
    paths = [path for target in targets for path in evaluation.write(result, target, force=force, separate=separate)]
    lines = "\n".join(f"wrote {path} ({size_text(path.stat().st_size)})" for path in paths)
    data = files.as_json(result) | {"files": list(map(str, paths))}
    problems = left_out(result.unread)
    exit_code = INCOMPLETE if problems or any(run.remarks for run in result.runs) else 0
    return Answer(data, lines if targets else lambda console: _print(console, result), problems, exit_code)


def _examples(texts: tuple[str, ...]) -> int | dict[str, int] | None:
    examples: dict[str, int] = {}
    for text in texts:
        name, _, count = text.rpartition("=")
        if not (count.isascii() and count.isdecimal() and len(count) < 16):
            hint = "give one, such as 10000 or val_accuracy=10000"
            raise ConfigError(f"--n-eval {text!r} is not a number of examples; {hint}")
        if name in examples or (not name and len(texts) > 1):
            raise ConfigError("--n-eval is given twice: name the metric of each, such as val_accuracy=10000")
        examples[name] = int(count)
    return examples.get("", examples) or None


def _print(console: Console, result: evaluation.Evaluation) -> None:
    if not result.runs:
        console.print(_text(f"no runs yet in {result.location}"))
    for table in tables.tables(result):
        console.print(_text(table.title, "bold"))
        first, *folded = table.parts
        console.print(_rich(replace(table, rows=first)))
        for rows in folded:
            console.print(_text(f"and {len(rows)} more; --to report.html has all", "dim"))
        for note in table.notes:
            console.print(_text(note, "dim"))
        console.print()
    for remark in result.remarks:
        console.print(_text(remark, "dim"))


def _text(text: str, style: str = "") -> Text:
    """Make text of text from users: no markup is read in it."""
    return Text(printable(text), style)


def _rich(table: tables.ReportTable) -> PlainTable:
    columns = [literal(column) for column in table.columns]
    rows = [[_styled(head, cell) for (head, _), cell in zip(table.heads, cells, strict=True)] for cells in table.rows]
    return PlainTable(columns, rows, unbroken=_WHOLE)


def _styled(head: str, cell: str) -> str:
    style = _STYLES.get(cell, "") if head == "verdict" else ""
    return f"[{style}]{literal(cell)}[/]" if style else literal(cell)


# --- changelog -----------------------------------------------------------------------------------------------------


@command(ROOT, needs={"--force": "--to"})
@click.option(
    "--since", callback=reads(lambda _, text: changelogs.since(text)), metavar="TIME|DURATION", help="Such as 7d."
)
@click.option(
    "--until", callback=reads(lambda _, text: changelogs.until(text)), metavar="TIME", help="A date is included."
)
@click.option("--run", "runs", multiple=True, metavar="RUN", help="Only what is about this run; may be repeated.")
@click.option("--kind", "kinds", multiple=True, metavar="KIND", help="Only this, such as promoted; may be repeated.")
@click.option("--all", "all_entries", is_flag=True, help="Do not group saves and removals, however many there are.")
@click.option("--to", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="JSON for FILE.json.")
@click.option("--force", is_flag=True, help="Replace a file that is not an earlier changelog, too.")
def changelog(
    root: Path,
    runs: tuple[str, ...],
    kinds: tuple[str, ...],
    to: Path | None,
    *,
    all_entries: bool,
    force: bool,
    **period: Any,
) -> Answer:
    """List everything that was done: promotions first, then saves, removals, and which rules kept what.

    A TIME is a date or a time in ISO 8601, in UTC when it names no zone.
    """
    repository = open_repository(root)
    entries = changelogs.entries(repository, only=runs or None, kinds=kinds, **period)
    page = markdown.by_day(entries, repository.store.location, everything=all_entries)
    exit_code = INCOMPLETE if any(entry.kind == "damage" for entry in entries) else 0
    if to is None:
        return Answer(entries, page.removesuffix("\n"), exit_code=exit_code)
    json_page = msgspec.json.format(msgspec.json.encode(entries), indent=2).decode() + "\n"
    _write(to, json_page if to.suffix.lower() == ".json" else page, force=force)
    entries_noun = "entry" if len(entries) == 1 else "entries"
    return Answer(entries, f"wrote {to} ({len(entries):,} {entries_noun})", exit_code=exit_code)


def _write(to: Path, text: str, *, force: bool) -> None:
    if not force and to.exists():
        with translated("look at", to):
            is_changelog = f"<!-- {markdown.MARK} -->" in to.read_text(encoding="utf-8", errors="ignore")[:200]
        if not is_changelog:
            raise ConflictError(
                f"{to} exists and is not a changelog of Peakpoint; choose another name, or replace it with --force"
            )
    files.replace_file(to, text.encode())
