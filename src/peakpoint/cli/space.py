"""The commands ``rm``, ``undo``, ``archive`` and ``audit``: space, and what is wrong in it."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from peakpoint import catalogue as catalogues
from peakpoint.cli import render, tables
from peakpoint.cli.command import (
    CATALOGUE,
    INCOMPLETE,
    ROOT,
    RUN,
    UNDO_FOR,
    Answer,
    command,
    confirm,
    confirmed,
    progress_bar,
    run_bar,
)
from peakpoint.cli.completion import CHECKPOINTS
from peakpoint.cli.render import count, fields, literal, ref, short_json
from peakpoint.cli.terminal import say
from peakpoint.errors import ConfigError, ConflictError, CorruptError, FormatError, NotFoundError, StoreError
from peakpoint.format import layout
from peakpoint.format.amounts import size_text
from peakpoint.format.manifest import Manifest
from peakpoint.format.names import check_text
from peakpoint.repository import audit as audits
from peakpoint.repository import lost, maintenance, packs, reader, whole_run
from peakpoint.repository.archive import PackedCheckpoint
from peakpoint.repository.reader import Damaged
from peakpoint.repository.refs import ByName, parse_any
from peakpoint.repository.root import Repository, open_repository
from peakpoint.repository.run import Run
from peakpoint.repository.trash import TrashEntry

_MOST_LEFT = 5  # names that one message lists

# --- rm ------------------------------------------------------------------------------------------------------------


@command(ROOT, click.argument("refs", metavar="REF...", nargs=-1, required=True, **CHECKPOINTS))
@click.option("--why", default="removed by hand", help="The reason, for the journal.")
@click.option("--run", "whole_runs", is_flag=True, help="REF is the name of a run: remove all of it, permanently.")
@UNDO_FOR
@confirmed
def rm(root: Path, refs: tuple[str, ...], why: str, undo_for: timedelta, *, whole_runs: bool, apply: bool) -> Answer:
    """Remove checkpoints: shows the plan, and carries it out with --yes.

    Damaged ones that cannot be read are named RUN/NAME, as audit lists them, and removed permanently.
    """
    check_text("--why", why)
    repository = open_repository(root)
    if whole_runs:
        return _rm_runs(repository, refs, undo_for, apply=apply)
    manifests, damaged = _targets(repository, refs)
    errors = {f"{run}/{damage.name}": str(damage.error) for run, of_run in damaged.items() for damage in of_run}
    if damaged and undo_for > maintenance.PERMANENTLY:
        raise ConfigError(
            f"{', '.join(errors)}: damaged, and cannot be restored once it is removed; to remove it permanently, add "
            "--undo-for 0"
        )
    by_run: defaultdict[str, list[Manifest]] = defaultdict(list)
    for manifest in manifests.values():
        by_run[manifest.run].append(manifest)
    for name, of_run in by_run.items():
        _refuse_what_aliases_protect(repository.run(name), of_run)
        _refuse_the_newest_good(repository.run(name), manifests)
    claims = {name: repository.run(name).kept() for name in by_run}
    failures = _remove(repository, by_run, damaged, why, undo_for) if apply else []
    removed = [manifest for of_run in by_run.values() for manifest in of_run]
    data = {
        "removed" if apply else "would_remove": [
            render.manifest_json(manifest, claims[manifest.run].get(manifest.id, ())) for manifest in removed
        ],
        "damaged": errors,
        "freed_bytes": sum(manifest.size_bytes for manifest in removed),
        "failures": failures,
    }

    def text(console: Console) -> None:
        for manifest in removed:
            console.print(f"[bold]{literal(ref(manifest))}[/]")
            console.print(f"  frees {size_text(manifest.size_bytes)}; was kept because:")
            render.print_list(console, map(render.claim_text, claims[manifest.run].get(manifest.id, ())))
        for damaged_ref, error in errors.items():
            console.print(f"[bold]{literal(damaged_ref)}[/] [bold red]damaged[/]: {literal(error)}", soft_wrap=True)
        if not apply:
            say("nothing is removed yet; add --yes to remove")
            return
        say(f"removed {count(len(removed) + len(errors) - len(failures), 'checkpoint')}")
        say(render.undo_hint(root, list(map(ref, removed)), undo_for))

    return Answer(data, text, failures, StoreError.exit_code if failures else 0)


def _rm_runs(repository: Repository, names: Collection[str], undo_for: timedelta, *, apply: bool) -> Answer:
    """Remove whole runs."""
    if undo_for > maintenance.PERMANENTLY:
        raise ConfigError("a whole run can only be removed permanently: add --undo-for 0")
    runs = [repository.run(name) for name in dict.fromkeys(names)]
    for run in runs:
        whole_run.check_unprotected(run)
    plans = [_run_json(run) for run in runs]
    remains = {run.name: whole_run.remove_run(run) for run in runs} if apply else {}

    def text(console: Console) -> None:
        for plan in plans:
            parts = f"{count(plan['checkpoints'], 'checkpoint')}, {count(plan['reports'], 'report')}"
            console.print(f"[bold]{literal(plan['run'])}[/]: {parts}, frees {size_text(plan['bytes'])}")
        for name, children in remains.items():
            if children:
                stays = f"runs/{name} still has what Peakpoint has not written: {render.listed(children, _MOST_LEFT)}"
                console.print(literal(stays), soft_wrap=True)
        permanently = "permanently: checkpoints, trash, journal and validations"
        say(f"removed {permanently}" if apply else f"nothing is removed yet; add --yes to remove them {permanently}")

    return Answer({"removed" if apply else "would_remove": plans}, text)


def _run_json(run: Run) -> dict[str, Any]:
    manifests = [*run.manifests(), *(entry.manifest for entry in maintenance.in_trash(run))]
    size_bytes = sum(manifest.size_bytes for manifest in manifests)
    return {"run": run.name, "checkpoints": len(manifests), "reports": len(run.history()), "bytes": size_bytes}


def _remove(
    repository: Repository,
    by_run: Mapping[str, Sequence[Manifest]],
    damaged: Mapping[str, Sequence[Damaged]],
    why: str,
    undo_for: timedelta,
) -> list[str]:
    """Remove checkpoints; one sentence for each removal that failed."""
    failures: list[str] = []
    for name, of_run in by_run.items():
        failures += maintenance.remove(repository.run(name), of_run, why, undo_for=undo_for)
    for name, damaged_of_run in damaged.items():
        failures += maintenance.remove_damaged(repository.run(name), damaged_of_run, why)
    return failures


def _targets(
    repository: Repository, refs: Collection[str]
) -> tuple[dict[str, Manifest], defaultdict[str, list[Damaged]]]:
    """Find what is to be removed: checkpoints by id, and by run those whose manifest cannot be read."""
    manifests: dict[str, Manifest] = {}
    damaged: defaultdict[str, list[Damaged]] = defaultdict(list)
    for text in dict.fromkeys(refs):
        try:
            manifest = repository.find_manifest(text)
            manifests[manifest.id] = manifest
        except (CorruptError, FormatError, NotFoundError):
            parsed = parse_any(text)
            if not isinstance(parsed, ByName):
                raise
            damaged_of_run = _damaged(repository.run(parsed.run))
            matching = [damage for damage in damaged_of_run if damage.is_named(parsed.name)]
            if not matching:
                raise
            damaged[parsed.run] += matching
    return manifests, damaged


def _damaged(run: Run) -> list[Damaged]:
    """Everything in a run that only its directory names."""
    listing = reader.list_run(run.store, run.name)
    return [
        *lost.damaged_checkpoints(run.store, run.name, listing),
        *lost.damaged_in_trash(run.store, run.name, listing),
    ]


def _refuse_what_aliases_protect(run: Run, manifests: Sequence[Manifest]) -> None:
    protected = run.aliased(manifests, run.events())
    reasons = [f"{ref(manifest)}: {protected[manifest.id]}" for manifest in manifests if manifest.id in protected]
    if reasons:
        raise ConflictError(
            f"nothing was removed: aliases protect {', '.join(reasons)}. The champion and the champions before it that "
            "it keeps cannot be removed: promote another checkpoint first. To clear any other alias: peakpoint promote "
            "ROOT --retire ALIAS --why TEXT"
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


# --- undo ----------------------------------------------------------------------------------------------------------


@command(ROOT, click.argument("refs", metavar="[RUN/NAME]...", nargs=-1))
@click.option("--list", "listing", is_flag=True, help="List what can be restored, and until when.")
@click.option("--empty", is_flag=True, help="Delete everything in the trash permanently.")
@click.option("--yes", is_flag=True, help="With --empty: delete without being asked.")
def undo(root: Path, refs: tuple[str, ...], *, listing: bool, empty: bool, yes: bool) -> Answer:
    """Restore removed checkpoints from the trash, comparing every byte with its digest, and pin them."""
    if sum((bool(refs), listing, empty)) != 1:
        raise ConfigError("give the RUN/NAME of what to restore, or --list, or --empty")
    repository = open_repository(root)
    if empty:
        return _empty_trash(repository, yes=yes)
    if listing:
        return _list_trash(root, repository)
    names_by_run: defaultdict[str, list[str]] = defaultdict(list)
    for text in refs:
        run, _, name = text.partition("/")
        if not (run and name):
            listed = render.command_line("undo", root, "--list")
            raise ConfigError(f"{text!r} names nothing in the trash; give RUN/NAME, as {listed} lists it")
        names_by_run[run].append(name)
    restored = [
        manifest for run, names in names_by_run.items() for manifest in maintenance.undo(repository.run(run), names)
    ]
    lines = [f"{ref(manifest)} is restored" for manifest in restored]
    hint = render.command_line("unpin", root, "RUN/NAME")
    lines.append(f"Pinned, so that no rule removes it again. To remove the pin: {hint}")
    return Answer({"back": list(map(short_json, restored))}, "\n".join(lines))


def _empty_trash(repository: Repository, *, yes: bool) -> Answer:
    """Delete everything in the trash, unless somebody at a terminal does not want that."""
    by_run, _ = repository.read_runs(maintenance.in_trash)
    manifests = [entry.manifest for entries in by_run.values() for entry in entries]
    extent = f"{count(len(manifests), 'checkpoint')}, {render.sizes(manifests)}"
    if manifests and not yes and not confirm(f"Permanently delete everything in the trash ({extent})?"):
        raise ConfigError(f"nothing was deleted: the trash holds {extent}; to delete it permanently, add --yes")
    emptied, errors = repository.read_runs(maintenance.empty_trash)
    entries = [entry for of_run in emptied.values() for entry in of_run]
    sizes = render.sizes(entry.manifest for entry in entries)
    deleted = f"permanently deleted {count(len(entries), 'checkpoint')}, {sizes} freed"
    data = {
        "emptied": list(map(_entry_json, entries)),
        "bytes": sum(entry.manifest.size_bytes for entry in entries),
        "unread": errors,
    }
    text = deleted if entries else "the trash is empty"
    return Answer(data, text, render.left_out(errors), INCOMPLETE if errors else 0)


def _list_trash(root: Path, repository: Repository) -> Answer:
    by_run, errors = repository.read_runs(maintenance.in_trash)
    entries = [entry for of_run in by_run.values() for entry in of_run]
    manifests = [entry.manifest for entry in entries]
    total = sum(manifest.size_bytes for manifest in manifests)
    data = {"trash": list(map(_entry_json, entries)), "bytes": total, "unread": errors}
    problems, exit_code = render.left_out(errors), INCOMPLETE if errors else 0
    if not entries:
        return Answer(data, "the trash is empty", problems, exit_code)
    columns = [
        tables.Column("checkpoint", [literal(ref(manifest)) for manifest in manifests], right=False),
        tables.Column("size", [size_text(manifest.size_bytes) for manifest in manifests]),
        tables.Column("until", [f"{entry.record.until:%Y-%m-%d %H:%M} UTC" for entry in entries], right=False),
    ]

    def text(console: Console) -> None:
        reasons = [literal(entry.record.why) for entry in entries]
        console.print(tables.with_reasons(console, columns, ["size"], "why", reasons))
        hint = literal(render.command_line("undo", root, "RUN/NAME"))
        console.print(f"{size_text(total)}. To restore one: {hint}", soft_wrap=True)

    return Answer(data, text, problems, exit_code)


def _entry_json(entry: TrashEntry) -> dict[str, object]:
    return short_json(entry.manifest) | fields(entry.record, "until", "by") | {"reason": entry.record.why}


# --- archive -------------------------------------------------------------------------------------------------------


_BASES = ("nothing", "the one before", "the two before")


@command(ROOT, RUN, without={"--level": "--restore"})
@click.option("--restore", is_flag=True, help="Restore the files of an archived run, bit for bit.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--level", type=click.IntRange(1, 19), help="Level of zstd; higher is slower, and hardly smaller.")
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
        "archived": [short_json(pack.manifest) | fields(pack, "packed_bytes", "bases") for pack in packs_made],
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
    return Answer(data, f"restored {checkpoints}, {render.sizes(restored)}, every byte compared with its digest")


def _print_packs(console: Console, root: Path, name: str, packs_made: Sequence[PackedCheckpoint]) -> None:
    columns = [
        tables.Column("archived", [literal(pack.manifest.name) for pack in packs_made], right=False),
        tables.Column("size", [size_text(pack.size_bytes) for pack in packs_made]),
        tables.Column("packed", [size_text(pack.packed_bytes) for pack in packs_made]),
        tables.Column(
            "ratio", [f"{pack.packed_bytes / (pack.size_bytes or pack.packed_bytes):.0%}" for pack in packs_made]
        ),
        tables.Column("as differences to", [_BASES[pack.bases] for pack in packs_made], right=False),
    ]
    console.print(tables.table(columns, console.width))
    before, after = sum(pack.size_bytes for pack in packs_made), sum(pack.packed_bytes for pack in packs_made)
    packed = f"{count(len(packs_made), 'checkpoint')}, {size_text(before)} packed into {size_text(after)}"
    hint = literal(render.command_line("archive", root, name, "--restore"))
    console.print(f"{packed}, every byte compared.\nTo restore the files: {hint}", soft_wrap=True)


# --- audit ---------------------------------------------------------------------------------------------------------


_KINDS = {
    "damage": "[bold red]damaged[/]",
    "litter": "[yellow]incomplete[/]",
    "unread": "[bold red]not read[/]",
    "foreign": "[blue]foreign[/]",
    "busy": "[cyan]in use[/]",
    "removed": "[green]removed[/]",
}


@command(ROOT, needs={"--dry-run": "--clean"})
@click.option("--deep", is_flag=True, help="Compare every byte of every file with its digest.")
@click.option("--clean", is_flag=True, help="Remove incomplete saves; damaged checkpoints are never touched.")
@click.option("--dry-run", is_flag=True, help="With --clean: only say what would be removed.")
@click.option("--rebuild", is_flag=True, help="Rebuild the catalogue from the files.")
@CATALOGUE
def audit(root: Path, catalogue: str | None, *, deep: bool, clean: bool, dry_run: bool, rebuild: bool) -> Answer:
    """Find damage and incomplete saves. Exits with 12 when there is damage, with 23 when something cannot be read."""
    repository = open_repository(root)
    removed = audits.clean(repository) if clean and not dry_run else []
    result = _audit(repository, deep=deep)
    result.findings += catalogues.audit(repository, catalogue)
    rebuilt = _rebuild(repository, catalogue) if rebuild else None
    data = fields(result, "findings", "runs", "checkpoints", "bytes", "deep", "clean")

    def text(console: Console) -> None:
        _print_audit(console, root, result, removed)
        if rebuilt is not None:
            say(f"rebuilt the catalogue {rebuilt}")

    exit_code = INCOMPLETE if result.of_kind("unread") else 0
    exit_code = CorruptError.exit_code if result.of_kind("damage") else exit_code
    return Answer(data | {"removed": removed, "catalogue": rebuilt}, text, exit_code=exit_code)


def _audit(repository: Repository, *, deep: bool) -> audits.Audit:
    if not deep:
        return audits.audit(repository)
    sizes, _ = repository.read_runs(lambda run: sum(manifest.size_bytes for manifest in run.manifests()))
    with progress_bar("reading", sum(sizes.values())) as advance:
        return audits.audit(repository, deep=True, progress=lambda manifest: advance(manifest.size_bytes))


def _rebuild(repository: Repository, where: str | None) -> str:
    """Rebuild the catalogue; return where it is."""
    catalogue = catalogues.Catalogue(repository, where)
    with run_bar() as progress:
        catalogue.rebuild(progress)
    return catalogue.location


def _print_audit(console: Console, root: Path, result: audits.Audit, removed: Sequence[audits.AuditFinding]) -> None:
    findings = [audits.AuditFinding("removed", finding.where, finding.what) for finding in removed] + result.findings
    if findings:
        rows = [(_KINDS[finding.kind], literal(finding.where), literal(finding.what)) for finding in findings]
        console.print(tables.PlainTable(("kind", "where", "what"), rows))
    console.print(audit_sentence(result))
    damage, litter = result.of_kind("damage"), result.of_kind("litter")
    if damage:
        console.print(f"[bold red]{len(damage)} damaged[/]")
        refs = _damaged_refs(damage)
        if refs:
            command_line = render.command_line("rm", root, *refs, "--undo-for", "0")
            console.print(
                "A resume skips damaged checkpoints. Copy what is damaged from a backup, or remove these checkpoints:\n"
                f"  {literal(command_line)}",
                soft_wrap=True,
            )
        if any(finding.where.startswith(f"{layout.ALIASES}/") for finding in damage):
            console.print(
                "Nothing can be removed while the newest record of an alias is damaged: promote --force or rollback "
                "adds a good one."
            )
    if litter:
        console.print(f"[yellow]{count(len(litter), 'incomplete save')}[/], harmless. To remove:")
        console.print(f"  {literal(render.command_line('audit', root, '--clean'))}", soft_wrap=True)
    if result.clean:
        console.print("[green]clean[/]")


def _damaged_refs(damage: Sequence[audits.AuditFinding]) -> list[str]:
    """The checkpoints, as RUN/NAME, that a damaged directory or file is of."""
    keys = [finding.where.split("/") for finding in damage]
    return list(dict.fromkeys(f"{key[1]}/{key[3]}" for key in keys if len(key) > 3 and key[2] == "checkpoints"))


def audit_sentence(result: audits.Audit) -> str:
    """Say what was checked, in one sentence."""
    shallow = "file sizes and manifests checked; --deep compares every byte"
    depth = "every byte compared with its digest" if result.deep else shallow
    return f"{count(result.runs, 'run')}, {count(result.checkpoints, 'checkpoint')}, {size_text(result.bytes)}: {depth}"
