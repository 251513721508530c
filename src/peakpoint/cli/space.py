"""The commands ``rm``, ``undo`` and ``archive``: space, and how to get it back."""

from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from peakpoint.cli import tables
from peakpoint.cli.answer import Answer, answers, confirmed
from peakpoint.cli.arguments import ROOT, UNDO_FOR
from peakpoint.cli.progress import progress_bar
from peakpoint.cli.render import claim_text, command, count, manifest_json, ref, short_json, sizes, undo_hint
from peakpoint.cli.tables import Column
from peakpoint.errors import ConfigError, ConflictError, StoreError
from peakpoint.format.amounts import size_text
from peakpoint.format.manifest import Manifest
from peakpoint.format.names import check_text
from peakpoint.repository import maintenance, packs, reader
from peakpoint.repository.archive import PackedCheckpoint
from peakpoint.repository.root import Repository, open_repository
from peakpoint.repository.run import Run
from peakpoint.repository.trash import TrashEntry
from peakpoint.rules import Claim

# --- rm ------------------------------------------------------------------------------------------------------------


@click.command()
@ROOT
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option("--why", default="removed by hand", help="The reason, for the journal.")
@UNDO_FOR
@answers
@confirmed
def rm(root: Path, refs: tuple[str, ...], why: str, undo_for: timedelta, *, apply: bool) -> Answer:
    """Remove checkpoints: shows the plan, and carries it out with --yes."""
    check_text("--why", why)
    repository = open_repository(root)
    by_run: dict[str, dict[str, Manifest]] = {}
    for manifest in map(repository.find_manifest, refs):
        by_run.setdefault(manifest.run, {})[manifest.id] = manifest
    for name, manifests in by_run.items():
        _refuse_what_aliases_protect(repository.run(name), list(manifests.values()))
        _refuse_the_newest_good(repository.run(name), manifests)
    claims = {name: repository.run(name).kept() for name in by_run}
    failures: list[str] = []
    if apply:
        for name, manifests in by_run.items():
            failures += maintenance.remove(repository.run(name), list(manifests.values()), why, undo_for=undo_for)
    removed = [manifest for manifests in by_run.values() for manifest in manifests.values()]
    data = {
        "removed" if apply else "would_remove": [manifest_json(manifest, ()) for manifest in removed],
        "freed_bytes": sum(manifest.size_bytes for manifest in removed),
        "failures": failures,
    }

    def text(console: Console) -> None:
        for manifest in removed:
            _print_removal(console, manifest, claims[manifest.run].get(manifest.id, ()))
        if not apply:
            click.echo("nothing is removed yet; add --yes to remove")
            return
        click.echo(f"removed {count(len(removed) - len(failures), 'checkpoint')}")
        click.echo(undo_hint(root, list(map(ref, removed)), undo_for))

    return Answer(data, text, failures, StoreError.exit_code if failures else 0)


def _refuse_what_aliases_protect(run: Run, manifests: Sequence[Manifest]) -> None:
    protected = run.aliased(manifests, run.events())
    reasons = [f"{ref(manifest)}: {protected[manifest.id]}" for manifest in manifests if manifest.id in protected]
    if reasons:
        raise ConflictError(
            f"nothing was removed: aliases protect {', '.join(reasons)}. The champion and the champions before it that "
            "it keeps cannot be removed: promote another checkpoint first. To clear any other alias: peakpoint promote "
            "ROOT --retire ALIAS"
        )


def _refuse_the_newest_good(run: Run, removed: Collection[str]) -> None:
    """Refuse to remove what the run would continue from while newer ones stay that it cannot continue from."""
    listing = reader.list_run(run.store, run.name)
    damaged = reader.find_damage(run.store, listing.manifests)
    unusable: list[str] = []
    for manifest in reversed(listing.manifests):
        if manifest.id not in damaged and manifest.id not in listing.incomplete:
            if manifest.id in removed and unusable:
                raise ConfigError(
                    f"{ref(manifest)} is the newest good checkpoint of run {run.name!r}, and stays: "
                    f"{'; '.join(unusable)}. To remove it nevertheless, name the newer ones, too"
                )
            return
        if manifest.id not in removed:
            unusable.append(damaged.get(manifest.id, f"{manifest.name} is newer, but has lost parts"))


def _print_removal(console: Console, manifest: Manifest, claims: Sequence[Claim]) -> None:
    console.print(f"[bold]{escape(ref(manifest))}[/]")
    console.print(f"  frees {size_text(manifest.size_bytes)}; was kept because:")
    for claim in claims:
        console.print(f"  - {claim_text(claim)}")


# --- undo ----------------------------------------------------------------------------------------------------------


@click.command()
@ROOT
@click.argument("refs", metavar="[RUN/NAME]...", nargs=-1)
@click.option("--list", "listing", is_flag=True, help="List what can be restored, and until when.")
@click.option("--empty", is_flag=True, help="Delete everything in the trash permanently.")
@answers
def undo(root: Path, refs: tuple[str, ...], *, listing: bool, empty: bool) -> Answer:
    """Restore removed checkpoints from the trash, comparing every byte with its digest, and pin them."""
    if sum((bool(refs), listing, empty)) != 1:
        raise ConfigError("give the RUN/NAME of what to restore, or --list, or --empty")
    repository = open_repository(root)
    if not refs:
        return _trash(root, repository, empty=empty)
    restored = [
        manifest
        for run, names in _names_by_run(root, refs).items()
        for manifest in maintenance.undo(repository.run(run), names)
    ]
    lines = [f"{ref(manifest)} is restored" for manifest in restored]
    lines.append(f"Pinned, so that no rule removes it again. To remove the pin: {command('unpin', root, 'RUN/NAME')}")
    return Answer({"back": list(map(short_json, restored))}, "\n".join(lines))


def _names_by_run(root: Path, refs: Sequence[str]) -> Mapping[str, list[str]]:
    names_by_run: dict[str, list[str]] = {}
    for text in refs:
        run, slash, name = text.partition("/")
        if not (run and slash and name):
            listing = command("undo", root, "--list")
            raise ConfigError(f"{text!r} names nothing in the trash; give RUN/NAME, as {listing} lists it")
        names_by_run.setdefault(run, []).append(name)
    return names_by_run


def _trash(root: Path, repository: Repository, *, empty: bool) -> Answer:
    """List the trash, or empty it."""
    read = maintenance.empty_trash if empty else maintenance.in_trash
    entries = [entry for run in repository.runs() for entry in read(run)]
    manifests = [entry.manifest for entry in entries]
    total = sum(manifest.size_bytes for manifest in manifests)
    data = {"emptied" if empty else "trash": list(map(_entry_json, entries)), "bytes": total}
    if not entries:
        return Answer(data, "the trash is empty")
    if empty:
        return Answer(data, f"permanently deleted {count(len(entries), 'checkpoint')}, {size_text(total)} freed")
    columns = [
        Column("checkpoint", [escape(ref(manifest)) for manifest in manifests], right=False),
        Column("size", [size_text(manifest.size_bytes) for manifest in manifests]),
        Column("until", [f"{entry.record.until:%Y-%m-%d %H:%M} UTC" for entry in entries], right=False),
    ]

    def text(console: Console) -> None:
        reasons = [escape(entry.record.why) for entry in entries]
        console.print(tables.with_reasons(console, columns, ["size"], "why", reasons))
        hint = escape(command("undo", root, "RUN/NAME"))
        console.print(f"{size_text(total)}. To restore one: {hint}", soft_wrap=True)

    return Answer(data, text)


def _entry_json(entry: TrashEntry) -> dict[str, object]:
    record = entry.record
    return short_json(entry.manifest) | {"until": record.until, "reason": record.why, "by": record.by}


# --- archive -------------------------------------------------------------------------------------------------------


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
