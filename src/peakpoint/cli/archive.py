"""The command ``archive``."""

from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from peakpoint.cli import tables
from peakpoint.cli.answer import Answer, answers
from peakpoint.cli.arguments import ROOT
from peakpoint.cli.progress import progress_bar
from peakpoint.cli.render import command, count, short_json, sizes
from peakpoint.cli.tables import Column
from peakpoint.format.amounts import size_text
from peakpoint.repository import maintenance, packs
from peakpoint.repository.archive import PackedCheckpoint
from peakpoint.repository.root import open_repository
from peakpoint.repository.run import Run

_BASES = ("nothing", "the one before", "the two before")


@click.command()
@ROOT
@click.argument("name", metavar="RUN")
@click.option("--restore", is_flag=True, help="Restore the files of an archived run, bit for bit.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--level", type=click.IntRange(1, 19), help="Level of zstd; higher is slower, and hardly smaller.")
@answers
def archive(root: Path, name: str, level: int | None, *, restore: bool, dry_run: bool) -> Answer:
    """Compress a finished run without loss: it takes less space, and is still listed and loaded.

    Its checkpoints cannot change until it is restored; the whole run can be removed.
    """
    run = open_repository(root).run(name)
    manifests = run.manifests()
    packed = packs.packed_bytes(run.store, name, manifests)
    affected = [manifest for manifest in manifests if (manifest.id in packed) == restore]
    total = sum(manifest.size_bytes for manifest in affected)
    if dry_run:
        verb = "restore" if restore else "archive"
        data = {"run": name, f"would_{verb}": list(map(short_json, affected)), "bytes": total}
        return Answer(data, f"would {verb} {count(len(affected), 'checkpoint')}, {size_text(total)}")
    if restore:
        return _restore(run, total)
    with progress_bar("packing", total) as advance:
        packs_made = maintenance.archive(run, level=level, progress=lambda pack: advance(pack.size_bytes))
    data = {
        "run": name,
        "archived": [
            short_json(pack.manifest) | {"packed_bytes": pack.packed_bytes, "bases": pack.bases} for pack in packs_made
        ],
        "bytes": sum(pack.size_bytes for pack in packs_made),
        "packed_bytes": sum(pack.packed_bytes for pack in packs_made),
    }
    if not packs_made:
        return Answer(data, f"nothing to archive: run {name!r} is archived, or has no checkpoints")
    return Answer(data, lambda console: _print_packs(console, root, name, packs_made))


def _restore(run: Run, total: int) -> Answer:
    with progress_bar("unpacking", total) as advance:
        restored = maintenance.restore(run, progress=lambda manifest: advance(manifest.size_bytes))
    data = {"run": run.name, "restored": list(map(short_json, restored))}
    if not restored:
        return Answer(data, f"nothing to restore: run {run.name!r} is not archived")
    checkpoints = count(len(restored), "checkpoint")
    return Answer(data, f"restored {checkpoints}, {sizes(restored)}, every byte compared with its digest")


def _print_packs(console: Console, root: Path, name: str, packs_made: Sequence[PackedCheckpoint]) -> None:
    columns = [
        Column("archived", [escape(pack.manifest.name) for pack in packs_made], right=False),
        Column("size", [size_text(pack.size_bytes) for pack in packs_made]),
        Column("packed", [size_text(pack.packed_bytes) for pack in packs_made]),
        Column("ratio", [f"{pack.packed_bytes / (pack.size_bytes or pack.packed_bytes):.0%}" for pack in packs_made]),
        Column("as differences to", [_BASES[pack.bases] for pack in packs_made], right=False),
    ]
    console.print(tables.table(columns, console.width))
    before, after = (sum(pack.size_bytes for pack in packs_made), sum(pack.packed_bytes for pack in packs_made))
    hint = escape(command("archive", root, name, "--restore"))
    console.print(
        f"{count(len(packs_made), 'checkpoint')}, {size_text(before)} packed into {size_text(after)}, every byte "
        "compared.\n"
        f"To restore the files: {hint}",
        soft_wrap=True,
    )
