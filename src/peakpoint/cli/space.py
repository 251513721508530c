"""Commands about space: archive, restore, trash, undo."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.progress import Progress

from peakpoint.cli import render, tables
from peakpoint.cli.arguments import JSON, ROOT
from peakpoint.cli.tables import Column
from peakpoint.errors import ConfigError
from peakpoint.format.manifest import Manifest
from peakpoint.repository import maintenance, packs
from peakpoint.repository.archive import PackedCheckpoint
from peakpoint.repository.root import open_repository
from peakpoint.repository.run import Run
from peakpoint.repository.trash import TrashEntry


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with Progress(console=render.console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.advance(task, size)


# --- archive ------------------------------------------------------------------------------------------------------


@click.command()
@ROOT
@click.argument("name", metavar="RUN")
@click.option("--restore", "back", is_flag=True, help="Put the files of an archived run back, bit for bit.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--level", type=click.IntRange(1, 19), help="Of zstd; higher is slower, and hardly smaller.")
@JSON
def archive(root: Path, name: str, *, back: bool, dry_run: bool, level: int | None, json: bool) -> None:
    """Pack a finished run without loss: it takes less space, and is still listed and loaded."""
    run = open_repository(root).run(name)
    manifests = run.manifests()
    packed = packs.packed_bytes(run.store, name, manifests)
    chosen = [manifest for manifest in manifests if (manifest.id in packed) == back]
    total = sum(manifest.size_bytes for manifest in chosen)
    if dry_run:
        if json:
            verb = "would_restore" if back else "would_archive"
            render.as_json({"run": name, verb: [_json(manifest) for manifest in chosen], "bytes": total})
        else:
            verb = "restore" if back else "archive"
            click.echo(f"would {verb} {render.count(len(chosen), 'checkpoint')}, {render.size(total)}")
        return
    if back:
        _restore(run, total, json=json)
        return
    with progress("packing", total) as advance:
        done = maintenance.archive(run, level=level, progress=lambda packed: advance(packed.size_bytes))
    if json:
        archived = [_json(one.manifest) | {"packed_bytes": one.packed_bytes, "bases": one.bases} for one in done]
        sizes = {"bytes": sum(one.size_bytes for one in done), "packed_bytes": sum(one.packed_bytes for one in done)}
        render.as_json({"run": name, "archived": archived} | sizes)
    else:
        _print_packed(root, name, done)


@click.command(hidden=True)
@ROOT
@click.argument("name", metavar="RUN")
@click.pass_context
def restore(context: click.Context, root: Path, name: str) -> None:
    """Former name of ``archive --restore``."""
    context.invoke(archive, root=root, name=name, back=True, dry_run=False, level=None, json=False)


def _restore(run: Run, total: int, *, json: bool) -> None:
    with progress("unpacking", total) as advance:
        back = maintenance.restore(run, progress=lambda manifest: advance(manifest.size_bytes))
    if json:
        render.as_json({"run": run.name, "restored": [_json(manifest) for manifest in back]})
    elif back:
        restored, size = render.count(len(back), "checkpoint"), sum(manifest.size_bytes for manifest in back)
        click.echo(f"restored {restored}, {render.size(size)}, every byte compared with its digest")
    else:
        click.echo(f"nothing to restore: run {run.name!r} is not archived")


def _json(manifest: Manifest) -> dict[str, Any]:
    return {"ref": f"{manifest.run}/{manifest.name}", "id": manifest.id, "size_bytes": manifest.size_bytes}


_NEIGHBOURS = ("nothing", "the one before", "the two before")


def _print_packed(root: Path, name: str, done: Sequence[PackedCheckpoint]) -> None:
    if not done:
        click.echo(f"nothing to archive: run {name!r} is archived, or has no checkpoints")
        return
    console = render.console()
    columns = [
        Column("archived", [escape(one.manifest.name) for one in done], right=False),
        Column("size", [render.size(one.size_bytes) for one in done]),
        Column("packed", [render.size(one.packed_bytes) for one in done]),
        Column("of it", [f"{one.packed_bytes / (one.size_bytes or one.packed_bytes):.0%}" for one in done]),
        Column("as differences to", [_NEIGHBOURS[one.bases] for one in done], right=False),
    ]
    console.print(tables.table(columns, console.width))
    before, after = sum(one.size_bytes for one in done), sum(one.packed_bytes for one in done)
    back = escape(render.command("archive", root, name, "--restore"))
    console.print(
        f"{render.count(len(done), 'checkpoint')}, {render.size(before)} in {render.size(after)}, every byte compared; "
        f"{back} brings the files back",
        soft_wrap=True,
    )


# --- trash, undo --------------------------------------------------------------------------------------------------


@click.command()
@ROOT
@click.option("--empty", is_flag=True, help="Let it all go now.")
@JSON
def trash(root: Path, *, empty: bool, json: bool) -> None:
    """List what was removed and can be brought back, and until when."""
    runs = open_repository(root).runs()
    entries = [
        entry for run in runs for entry in (maintenance.empty_trash(run) if empty else maintenance.in_trash(run))
    ]
    total = sum(entry.manifest.size_bytes for entry in entries)
    if json:
        render.as_json({"emptied" if empty else "trash": [_trash_json(entry) for entry in entries], "bytes": total})
        return
    console = render.console()
    if not entries:
        console.print("the trash is empty")
        return
    if empty:
        console.print(f"{render.count(len(entries), 'checkpoint')} gone for good, {render.size(total)} freed")
        return
    refs = [escape(f"{entry.manifest.run}/{entry.manifest.name}") for entry in entries]
    columns = [
        Column("checkpoint", refs, right=False),
        Column("size", [render.size(entry.manifest.size_bytes) for entry in entries]),
        Column("until", [f"{entry.record.until:%Y-%m-%d %H:%M} UTC" for entry in entries], right=False),
    ]
    whys = [escape(entry.record.why) for entry in entries]
    console.print(tables.with_reasons(console, columns, ["size"], "why", whys))
    console.print(
        f"{render.size(total)}; {escape(render.command('undo', root, 'RUN/NAME'))} brings one back", soft_wrap=True
    )


def _trash_json(entry: TrashEntry) -> dict[str, Any]:
    record = entry.record
    return _json(entry.manifest) | {"until": record.until, "reason": record.why, "by": record.by}


@click.command()
@ROOT
@click.argument("names", metavar="RUN/NAME...", nargs=-1, required=True)
@JSON
def undo(root: Path, names: tuple[str, ...], *, json: bool) -> None:
    """Bring removed checkpoints back from the trash, every byte compared with its digest."""
    repository = open_repository(root)
    wanted: dict[str, list[str]] = {}
    for ref in names:
        run, slash, name = ref.partition("/")
        if not (run and slash and name):
            raise ConfigError(f"{ref!r} names nothing in the trash; give RUN/NAME, as peakpoint trash lists it")
        wanted.setdefault(run, []).append(name)
    back = [manifest for run, names in wanted.items() for manifest in maintenance.undo(repository.run(run), names)]
    if json:
        render.as_json({"back": [_json(manifest) for manifest in back]})
        return
    for manifest in back:
        click.echo(f"{manifest.run}/{manifest.name} is back")
    click.echo("pinned, so that no rule takes them again; peakpoint unpin lets the rules have them")


COMMANDS = (archive, restore, trash, undo)
