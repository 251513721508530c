"""The command ``report``."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.text import Text

from peakpoint.cli import render
from peakpoint.cli.arguments import JSON, ROOT
from peakpoint.cli.tables import plain
from peakpoint.errors import ConfigError
from peakpoint.reports import evaluation
from peakpoint.reports.evaluation import files, tables
from peakpoint.repository.root import open_repository
from peakpoint.rules import Mode, mode_of

_WHOLE = (tables.CURVE, "verdict")
_FOLDED = 14  # columns of text that is folded
_STYLES = {
    "peak": "bold yellow",
    "not finite": "bold red",
    "within noise": "green",
    "still improving": "green",
    "noise unknown": "cyan",
}


@click.command()
@ROOT
@click.argument("names", metavar="[RUN]...", nargs=-1)
@click.option("--metric", "metrics", multiple=True, metavar="NAME:max|min", help="Look at this; may be repeated.")
@click.option(
    "--n-eval", "counts", multiple=True, metavar="[METRIC=]N", help="Examples that an accuracy is measured on."
)
@click.option("--percent", is_flag=True, help="The metrics of --n-eval are percentages, from 0 to 100.")
@click.option("--group-by", default="optimizer", show_default=True, help="Or a REGEX with one group.")
@click.option("--sparsity", default="sparsity", show_default=True, help="The metric that holds the sparsity.")
@click.option("--compare", nargs=2, multiple=True, metavar="ORIGINAL COMPRESSED", help="Refs, or runs: their best.")
@click.option("--part", default="model", show_default=True, help="The part whose parameters are counted.")
@click.option("--separate", is_flag=True, help="A figure for each run.")
@click.option(
    "--to",
    "targets",
    multiple=True,
    type=click.Path(path_type=Path),
    help="FILE.html, .md, .png, .svg, .json or .csv, or a directory.",
)
@click.option("--force", is_flag=True, help="Replace files that are no earlier reports, too.")
@JSON
def report(
    root: Path,
    names: tuple[str, ...],
    metrics: tuple[str, ...],
    counts: tuple[str, ...],
    compare: tuple[tuple[str, str], ...],
    group_by: str,
    targets: tuple[Path, ...],
    json: bool,  # noqa: FBT001
    force: bool,  # noqa: FBT001
    separate: bool,  # noqa: FBT001
    **options: Any,
) -> None:
    """Report what runs came to: peak against last, by optimizer, by sparsity, compressed against original."""
    working = render.console(stderr=True).status("reading") if sys.stderr.isatty() else contextlib.nullcontext()
    with working:
        found = evaluation.evaluate(
            open_repository(root),
            names,
            metrics=dict(map(_direction, metrics)),
            n_eval=_examples(counts),
            group_by=group_by,
            compare=compare,
            **options,
        )
    written = [file for target in targets for file in evaluation.write(found, target, force=force, separate=separate)]
    if json:
        render.as_json(files.as_json(found) | {"files": [str(file) for file in written]})
        return
    if not targets:
        _print(found, render.console())
    for file in written:
        click.echo(f"wrote {file} ({render.size(file.stat().st_size)})")


def _direction(text: str) -> tuple[str, Mode]:
    name, separator, mode = text.rpartition(":")
    if not separator or not name:
        raise ConfigError(f"--metric {text!r}: is larger better? say --metric {text}:max or --metric {text}:min")
    return name, mode_of(mode)


def _examples(texts: tuple[str, ...]) -> int | dict[str, int] | None:
    found: dict[str, int] = {}
    for text in texts:
        name, _, count = text.rpartition("=")
        if not (count.isascii() and count.isdecimal() and len(count) < 16):
            raise ConfigError(
                f"--n-eval {text!r} is no number of examples; give one, such as 10000 or val_accuracy=10000"
            )
        if name in found or (not name and len(texts) > 1):
            raise ConfigError("--n-eval is given twice: name the metric of each, such as val_accuracy=10000")
        found[name] = int(count)
    return found.get("", found) or None


def _print(found: evaluation.Evaluation, console: Console) -> None:
    if not found.runs:
        console.print(_text(f"{found.location} has no runs yet"))
    for table in tables.tables(found):
        console.print(_text(table.title, "bold"))
        console.print(_rich(table, console.width))
        for note in table.notes:
            console.print(_text(note, "dim"))
        console.print()
    for remark in found.remarks:
        console.print(_text(remark, "dim"))


def _text(text: str, style: str = "") -> Text:
    """Text from users: no markup is read in it."""
    return Text(tables.printable(text), style)


def _rich(table: tables.ReportTable, width: int) -> RenderableType:
    """A table; where it is too narrow for one, a paragraph for each row."""
    lengths = [
        max(map(cell_len, column)) for column in zip([head for head, _ in table.heads], *table.rows, strict=True)
    ]
    whole = [is_number or head in _WHOLE for head, is_number in table.heads]
    least = [length if keep else min(length, _FOLDED) for length, keep in zip(lengths, whole, strict=True)]
    if sum(least) + 2 * (len(least) - 1) > width:
        return Group(*(line for cells in table.rows for line in _paragraph(table, cells, width)))
    heads = [escape(tables.printable(column)) for column in table.columns]
    rows = [[_styled(head, cell) for (head, _), cell in zip(table.heads, cells, strict=True)] for cells in table.rows]
    return plain(heads, rows, unbroken=[head for head, keep in zip(heads, whole, strict=True) if keep])


def _paragraph(table: tables.ReportTable, cells: Sequence[str], width: int) -> list[Text]:
    """The first cell, then heads with their cells, as many on a line as fit."""
    lines = [Text.assemble(_text(cells[0], "bold"))]
    for (head, _), cell in list(zip(table.heads, cells, strict=True))[1:]:
        pair = Text.assemble("  ", _text(head, "dim"), " ", _styled(head, cell))
        if cell and lines[-1].cell_len + pair.cell_len > width:
            lines.append(pair)
        elif cell:
            lines[-1].append_text(pair)
    return lines


def _styled(head: str, cell: str) -> Text:
    return _text(cell, _STYLES.get(cell, "") if head == "verdict" else "")


COMMANDS = (report,)
