"""Commands about space: archive, restore, trash, undo."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from peakpoint import packs, upkeep
from peakpoint.archiving import Packed, unarchived
from peakpoint.cli import fitting, render
from peakpoint.cli.arguments import JSON, ROOT
from peakpoint.cli.fitting import Column
from peakpoint.errors import ConfigError, CorruptError
from peakpoint.manifest import Manifest
from peakpoint.repository import Repository, Run, open_repository
from peakpoint.trash import InTrash


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import Progress  # noqa: PLC0415 - start-up time

    with Progress(console=render.console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.advance(task, size)


def _chosen(repository: Repository, name: str, names: Sequence[str]) -> tuple[Run, list[Manifest]]:
    """Checkpoints of one run; all of them when none is named."""
    run = repository.run(name)
    if not names:
        return run, list(run.manifests())
    found = {manifest.id: manifest for manifest in map(repository.find_manifest, names)}
    for manifest in found.values():
        if manifest.run != name:
            raise ConfigError(f"{manifest.run}/{manifest.name} is no checkpoint of run {name!r}; give refs of one run")
    return run, sorted(found.values(), key=lambda manifest: manifest.sequence)


# --- archive, restore ---------------------------------------------------------------------------------------------


@click.command()
@ROOT
@click.argument("name", metavar="RUN")
@click.argument("names", metavar="[REF]...", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Only say what would be packed.")
@click.option("--level", type=click.IntRange(1, 19), help="Of zstd; higher is slower, and hardly smaller.")
@JSON
def archive(root: Path, name: str, names: tuple[str, ...], *, dry_run: bool, level: int | None, json: bool) -> None:
    """Pack a finished run without loss: it takes less space, and is still listed and loaded."""
    run, chosen = _chosen(open_repository(root), name, names)
    chosen = unarchived(run.store, chosen)
    total = sum(manifest.size_bytes for manifest in chosen)
    if dry_run:
        if json:
            render.as_json({"run": name, "would_archive": [_json(manifest) for manifest in chosen], "bytes": total})
        else:
            click.echo(f"would archive {render.count(len(chosen), 'checkpoint')}, {render.size(total)}")
        return
    with progress("packing", total) as advance:
        done, failures = upkeep.archive(run, chosen, level=level, progress=lambda one: advance(one.size_bytes))
    if json:
        archived = [_json(one.manifest) | {"packed_bytes": one.packed_bytes, "bases": one.bases} for one in done]
        packed = {"bytes": sum(one.size_bytes for one in done), "packed_bytes": sum(one.packed_bytes for one in done)}
        render.as_json({"run": name, "archived": archived} | packed | {"failures": failures})
    else:
        _print_packed(name, done)
    for failure in failures:
        click.echo(f"peakpoint: not archived: {failure}", err=True)
    if failures:
        raise SystemExit(CorruptError.exit_code)


def _json(manifest: Manifest) -> dict[str, Any]:
    return {"ref": f"{manifest.run}/{manifest.name}", "id": manifest.id, "size_bytes": manifest.size_bytes}


_NEIGHBOURS = ("nothing", "the one before", "the two before")


def _print_packed(name: str, done: Sequence[Packed]) -> None:
    if not done:
        click.echo(f"nothing to archive: every checkpoint of {name} is archived, or there is none")
        return
    console = render.console()
    columns = [
        Column("archived", [escape(one.manifest.name) for one in done], right=False),
        Column("size", [render.size(one.size_bytes) for one in done]),
        Column("packed", [render.size(one.packed_bytes) for one in done]),
        Column("of it", [f"{one.packed_bytes / (one.size_bytes or one.packed_bytes):.0%}" for one in done]),
        Column("as differences to", [_NEIGHBOURS[one.bases] for one in done], right=False),
    ]
    console.print(fitting.table(columns, console.width))
    before, after = sum(one.size_bytes for one in done), sum(one.packed_bytes for one in done)
    console.print(
        f"{render.count(len(done), 'checkpoint')}, {render.size(before)} in {render.size(after)}, every byte compared; "
        f"peakpoint restore brings the files back"
    )


@click.command()
@ROOT
@click.argument("name", metavar="RUN")
@click.argument("names", metavar="[REF]...", nargs=-1)
@JSON
def restore(root: Path, name: str, names: tuple[str, ...], *, json: bool) -> None:
    """Put the files of archived checkpoints back, bit for bit; of the whole run by default."""
    run, chosen = _chosen(open_repository(root), name, names)
    chosen = [manifest for manifest in chosen if packs.archived(run.store, run.name, manifest.name) is not None]
    with progress("unpacking", sum(manifest.size_bytes for manifest in chosen)) as advance:
        done = upkeep.restore(run, chosen, progress=lambda manifest: advance(manifest.size_bytes))
    if json:
        render.as_json({"run": name, "restored": [_json(manifest) for manifest in done]})
    elif done:
        total = sum(manifest.size_bytes for manifest in done)
        restored = render.count(len(done), "checkpoint")
        click.echo(f"restored {restored}, {render.size(total)}, every byte compared with its digest")
    else:
        click.echo("nothing to restore: none of these is archived")


# --- trash, undo --------------------------------------------------------------------------------------------------


@click.command()
@ROOT
@click.option("--empty", is_flag=True, help="Let it all go now.")
@JSON
def trash(root: Path, *, empty: bool, json: bool) -> None:
    """List what was removed and can be brought back, and until when."""
    runs = open_repository(root).runs()
    entries = [entry for run in runs for entry in (upkeep.empty_trash(run) if empty else upkeep.in_trash(run))]
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
    console.print(fitting.with_reasons(console, columns, ["size"], "why", whys))
    console.print(
        f"{render.size(total)}; {escape(render.command('undo', root, 'RUN/NAME'))} brings one back", soft_wrap=True
    )


def _trash_json(entry: InTrash) -> dict[str, Any]:
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
    back = [manifest for run, names in wanted.items() for manifest in upkeep.undo(repository.run(run), names)]
    if json:
        render.as_json({"back": [_json(manifest) for manifest in back]})
        return
    for manifest in back:
        click.echo(f"{manifest.run}/{manifest.name} is back")
    click.echo("pinned, so that no rule takes them again; peakpoint unpin lets the rules have them")


COMMANDS = (archive, restore, trash, undo)
