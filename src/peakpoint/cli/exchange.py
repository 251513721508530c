"""Commands that bring checkpoints in and out: import, export."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.markup import escape
from rich.table import Table

from peakpoint.cli import render, tables
from peakpoint.cli.arguments import JSON, REF, ROOT, torch_side
from peakpoint.cli.space import progress
from peakpoint.cli.tables import Column
from peakpoint.errors import ConfigError, Error
from peakpoint.repository.root import open_repository
from peakpoint.rules import parse_all

# --- import -------------------------------------------------------------------------------------------------------


@click.command("import")
@click.argument("path", metavar="DIR_OR_FILE", type=click.Path(path_type=Path))
@ROOT
@click.option("--run", "run", required=True, help="The run that they become; a new one.")
@click.option("--metrics", type=click.Path(path_type=Path), help="A log: JSON, JSON lines, CSV, or TensorBoard's.")
@click.option(
    "--join",
    type=click.Choice(["auto", "epoch", "step"]),
    default="auto",
    show_default=True,
    help="What the log and the checkpoints have in common.",
)
@click.option(
    "--epochs-from",
    type=click.IntRange(0, 1),
    default=0,
    show_default=True,
    help="The number that files and log give to the first epoch.",
)
@click.option("--part", "parts", multiple=True, metavar="FROM=TO", help="A name in the files, and the part it becomes.")
@click.option("--strip-prefix", default="", help="Taken from the names of the model's tensors, such as module.")
@click.option("--inert", multiple=True, metavar="MODULE.CLASS", help="Keep objects of it as records of their values.")
@click.option("--rules", "texts", help="Put these rules in force, and pin nothing.")
@click.option("--link", is_flag=True, help="Hard-link safetensors files that can serve as they are.")
@click.option("--skip-unreadable", is_flag=True, help="Import the others when a file cannot be read.")
@click.option("--dry-run", is_flag=True, help="Only show what would be imported.")
@JSON
def import_(
    path: Path, root: Path, *, run: str, parts: tuple[str, ...], texts: str | None, json: bool, **options: Any
) -> None:
    """Bring checkpoints of other tools into a run; no code of a file's is run, and no file is changed."""
    renamed = dict(_pair(part) for part in parts)
    rules = None if texts is None else parse_all(texts)
    importing = torch_side("peakpoint.exchange.imports", "import")
    with _saying_what_came(root, run), progress("importing", _size(path)) as advance:
        report = importing.import_checkpoints(
            path, root, run=run, parts=renamed, rules=rules, progress=advance, **options
        )
    dry_run = options["dry_run"]
    if json:
        render.as_json({"dry_run": dry_run, **msgspec.to_builtins(report, enc_hook=str)})
    else:
        _print_report(root, path, report, dry_run=dry_run, ruled=rules is not None)
    unreadable = [one for one in report.checkpoints if one.status == "unreadable"]
    for one in unreadable:
        click.echo(f"peakpoint: not imported: {one.error}", err=True)
    if unreadable:
        raise SystemExit(13)


@contextlib.contextmanager
def _saying_what_came(root: Path, run: str) -> Iterator[None]:
    """After Ctrl-C, say what has come in."""
    try:
        yield
    except KeyboardInterrupt:
        try:
            there = len(open_repository(root).run(run).manifests())
        except Error:
            there = 0
        click.echo(
            f"peakpoint: {render.count(there, 'checkpoint')} in run {run}, each of them whole; the same command goes "
            "on with the others",
            err=True,
        )
        raise


def _pair(text: str) -> tuple[str, str]:
    name, equals, part = text.rpartition("=")
    if not (name and equals and part):
        raise ConfigError(f"--part {text} says no part; give FROM=TO, such as --part generator=model")
    return name, part


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _print_report(root: Path, path: Path, report: Any, *, dry_run: bool, ruled: bool) -> None:
    console = render.console()
    console.print(_table(report.checkpoints, console.width))
    for note, count in Counter(note for one in report.checkpoints for note in one.notes).items():
        every = "" if count == len(report.checkpoints) else f" ({render.count(count, 'file')})"
        console.print(f"  {escape(note)}{every}")
    for note in report.notes:
        console.print(f"  {escape(note)}")
    if any(one.step_counted for one in report.checkpoints):
        console.print("  (N): no file tells this step: it is that of the moment before, or the number of the report")
    if report.others:
        names = ", ".join(str(one.relative_to(path) if one != path else one) for one in report.others[:_NAMED])
        more = f" and {len(report.others) - _NAMED} more" if len(report.others) > _NAMED else ""
        console.print(f"  not looked at: {escape(names)}{more}")
    new = [one for one in report.checkpoints if one.status in {"imported", "linked", "planned"}]
    did = "would be imported" if dry_run else "imported"
    moments = render.count(report.reports, "moment")
    console.print(
        f"{render.count(len(new), 'checkpoint')} {did} into run {escape(report.run)}{_others(report)}; "
        f"{moments} in its history"
    )
    if new and not dry_run:
        console.print(f"see them with {escape(render.command('ls', root, report.run))}", soft_wrap=True)
        if not ruled:
            console.print(
                'all are pinned: give --rules "best:METRIC:max last:3" in the same command to let rules have them'
            )


def _others(report: Any) -> str:
    """What has not come in now, and why not."""
    counts = Counter(one.status for one in report.checkpoints)
    words = {"there": "there already", "removed": "there once and removed since", "twin": "the same as another"}
    told = [(counts[status], text) for status, text in words.items() if counts[status]]
    return "".join(f", {count} {'was' if count == 1 else 'were'} {text}" for count, text in told)


_NAMED = 20  # files that are named
_TELLING = re.compile(r"(^|[/_.-])(val|acc|loss)", re.IGNORECASE)


def _metrics(checkpoints: Sequence[Any]) -> list[str]:
    """The metrics that tell most, as many as a table has room for."""
    found = list({name: None for one in checkpoints for name in one.metrics})
    return sorted(found, key=lambda name: (_TELLING.search(name) is None, name.startswith("best")))[:3]


def _table(checkpoints: Sequence[Any], width: int) -> Table:
    """One row for each source, with the columns that there is room for."""

    def step(one: Any) -> str:
        return "" if one.step is None else f"({one.step})" if one.step_counted else str(one.step)

    def status(one: Any) -> str:
        return "[red]unreadable[/]" if one.status == "unreadable" else str(one.status)

    def values(name: str) -> list[str]:
        return [render.number(one.metrics.get(name)) for one in checkpoints]

    metrics = {escape(name): values(name) for name in _metrics(checkpoints)}
    columns = [
        Column("file", [escape(one.path.name) for one in checkpoints], right=False),
        Column("kind", [escape(one.tool) for one in checkpoints], right=False),
        Column("epoch", ["" if one.epoch is None else str(one.epoch) for one in checkpoints]),
        Column("step", list(map(step, checkpoints))),
        *(Column(title, cells) for title, cells in metrics.items()),
        Column("parts", [escape(", ".join(one.parts)) for one in checkpoints], right=False),
        Column("size", [render.size(one.size_bytes) for one in checkpoints]),
        Column("what", list(map(status, checkpoints)), right=False),
    ]
    return tables.table(tables.fitted(columns, ["parts", "kind", "size", *reversed(metrics)], width), width)


# --- export -------------------------------------------------------------------------------------------------------


@click.command()
@ROOT
@REF
@click.option("--to", type=click.Path(path_type=Path), required=True, help="FILE.safetensors, .pth, .pt or DIR.")
@click.option("--part", "parts", multiple=True, help="Which part, may be repeated for .pth; model by default.")
@click.option("--format", "form", type=click.Choice(["hf"]), help="hf: a folder as Hugging Face's tools write it.")
@click.option("--shard", default="5 GB", show_default=True, help="hf: the most bytes of one file.")
@click.option("--config", type=click.Path(path_type=Path), help="hf: becomes config.json.")
@JSON
def export(
    root: Path,
    ref: str,
    *,
    to: Path,
    parts: tuple[str, ...],
    form: str | None,
    shard: str,
    config: Path | None,
    json: bool,
) -> None:
    """Write a checkpoint to a file or folder that other tools open."""
    repository = open_repository(root)
    if form == "hf":
        folders = torch_side("peakpoint.exchange.exports.huggingface")
        manifest = folders.export_folder(repository, ref, to, parts[0] if parts else "", shard=shard, config=config)
    else:
        manifest = torch_side("peakpoint.exchange.exports.files").export(repository, ref, to, parts)
    size = to.stat().st_size if to.is_file() else sum(file.stat().st_size for file in to.iterdir())
    if json:
        render.as_json({"ref": f"{manifest.run}/{manifest.name}", "to": str(to), "size_bytes": size})
    else:
        click.echo(f"{manifest.run}/{manifest.name} -> {to} ({render.size(size)})")


COMMANDS = (import_, export)
