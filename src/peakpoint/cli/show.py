"""Commands about single checkpoints: show, rm; and demo."""

import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import click
from rich.markup import escape

from peakpoint.cli import alias_marks, render
from peakpoint.cli.arguments import JSON, REF, ROOT, UNDO_FOR, torch_side
from peakpoint.cli.validate import line
from peakpoint.errors import ConfigError, ConflictError, CorruptError, FormatError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.manifest import Manifest
from peakpoint.format.names import check_text
from peakpoint.repository import maintenance, reader, signing, validations
from peakpoint.repository.packs import packed_bytes
from peakpoint.repository.root import Repository, open_repository
from peakpoint.repository.run import Run
from peakpoint.rules import Claim

# --- show ---------------------------------------------------------------------------------------------------------


@click.command()
@ROOT
@REF
@JSON
def show(root: Path, ref: str, json: bool) -> None:  # noqa: FBT001
    """Show one checkpoint: metrics, reasons, parts, files, digests."""
    repository = open_repository(root)
    run, manifest = repository.locate(ref)
    manifest = next((known for known in run.known(()) if known.id == manifest.id), manifest)
    claims = run.kept().get(manifest.id, ())
    tested = validations.survey(run.store, run.name, manifest.id)
    packed = packed_bytes(run.store, run.name, [manifest]).get(manifest.id)
    signed = signing.signatures(run.store, run.name, manifest.name)
    aliases = alias_marks.pointing(run).get(manifest.id, ())
    if json:
        extra = {
            "aliases": aliases,
            "packed_bytes": packed,
            "parts": manifest.parts,
            "files": [
                {"name": file.name, "size": file.size, "digest": file.digest, "tensors": len(file.tensors)}
                for file in manifest.files
            ],
            "parent": manifest.parent,
            "members": manifest.members,
            "written_by": manifest.written_by,
            "timing": manifest.timing,
            "asked": manifest.asked,
            "signatures": [asdict(one) for one in signed],
            "path": str(root / layout.checkpoint_prefix(manifest.run, manifest.name)),
            "validations": [
                {"number": one.number, "at": one.at, "passed": one.passed, "by": one.by} for one in tested.validations
            ],
            "damaged_validations": [what for _, what in tested.damage],
        }
        render.as_json(render.manifest_json(manifest, claims) | extra)
        return
    console = render.console()
    facts = _facts(root, manifest, claims, packed, signed, _members(repository, manifest), aliases)
    facts.append(("validations", "\n".join([*map(line, tested.validations), *_damaged(tested)]) or "none"))
    console.print(render.facts(facts))
    console.print()
    console.print(render.files_table(manifest))


def _damaged(tested: validations.ValidationSurvey) -> list[str]:
    return [f"[bold red]damaged[/]: {escape(what)}" for _, what in tested.damage]


def _members(repository: Repository, manifest: Manifest) -> list[str]:
    """The names of what a checkpoint was made from, as far as it is there."""
    found = []
    for ref in manifest.members:
        try:
            member = repository.find_manifest(ref)
            found.append(f"{member.run}/{member.name}")
        except (CorruptError, FormatError, NotFoundError):
            found.append(f"{ref}, which is gone or damaged")
    return found


def _facts(
    root: Path,
    manifest: Manifest,
    claims: Sequence[Claim],
    packed: int | None,
    signed: Sequence[signing.Signature],
    members: Sequence[str],
    aliases: Sequence[str],
) -> list[tuple[str, str]]:
    where = f"step {manifest.step}" + ("" if manifest.epoch is None else f", epoch {manifest.epoch}")
    metrics = "\n".join(f"{name} = {render.number(value)}" for name, value in manifest.metrics.items())
    return [
        ("checkpoint", escape(f"{manifest.run}/{manifest.name}")),
        ("id", manifest.id),
        *([("aliases", alias_marks.text(aliases))] if aliases else []),
        ("directory", escape(str(root / layout.checkpoint_prefix(manifest.run, manifest.name)))),
        ("taken at", f"{where}; commit {manifest.sequence} of the run, report {manifest.report}"),
        ("created", f"{manifest.created_at:%Y-%m-%d %H:%M:%S} UTC, {render.age(manifest.created_at)}"),
        ("metrics", escape(metrics) or "none"),
        ("saved because", escape("\n".join(manifest.reasons))),
        ("kept because", render.claims_text(claims)),
        ("size", render.size(manifest.size_bytes)),
        ("archived", "no" if packed is None else f"in a pack of {render.size(packed)}"),
        ("signed", escape("\n".join(map(_signature, signed))) or "no"),
        ("parts", escape(", ".join(manifest.parts))),
        ("made from", escape("\n".join(members)))
        if manifest.members
        else ("continues", manifest.parent or "nothing: the first of its run"),
        ("written by", escape(", ".join(f"{name} {value}" for name, value in manifest.written_by.items()))),
        ("written", render.written(manifest)),
        ("the loop waited", render.waits(manifest)),
    ]


def _signature(one: signing.Signature) -> str:
    said = "names no key" if one.fingerprint is None else f"key {one.fingerprint}"
    return f"{one.record}, {said} (not verified)"


# --- rm -----------------------------------------------------------------------------------------------------------


@click.command()
@ROOT
@click.argument("names", metavar="REF...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Remove; without it only the plan is shown.")
@click.option("--dry-run", is_flag=True, help="Show the plan and remove nothing, also with --yes.")
@click.option("--why", default="removed by hand", help="The reason, for the journal.")
@UNDO_FOR
@JSON
def rm(
    root: Path,
    names: tuple[str, ...],
    yes: bool,  # noqa: FBT001
    dry_run: bool,  # noqa: FBT001
    why: str,
    undo_for: timedelta,
    json: bool,  # noqa: FBT001
) -> None:
    """Remove checkpoints: shows the plan, and carries it out with --yes."""
    check_text("--why", why)
    repository = open_repository(root)
    chosen = {manifest.id: manifest for manifest in map(repository.find_manifest, names)}
    for name in dict.fromkeys(manifest.run for manifest in chosen.values()):
        mine = [manifest for manifest in chosen.values() if manifest.run == name]
        _spare_what_aliases_protect(repository.run(name), mine)
        _spare_the_newest_good(repository.run(name), chosen)
    failures: list[str] = []
    apply_now = yes and not dry_run
    if not json:
        _print_removal(repository, list(chosen.values()))
    if apply_now:
        for run in dict.fromkeys(manifest.run for manifest in chosen.values()):
            mine = [manifest for manifest in chosen.values() if manifest.run == run]
            failures += maintenance.remove(repository.run(run), mine, why, undo_for=undo_for)
    if json:
        render.as_json(
            {
                "removed" if apply_now else "would_remove": [render.manifest_json(m, ()) for m in chosen.values()],
                "freed_bytes": sum(manifest.size_bytes for manifest in chosen.values()),
                "failures": failures,
            }
        )
    elif apply_now:
        click.echo(f"removed {render.count(len(chosen) - len(failures), 'checkpoint')}")
        gone = [f"{one.run}/{one.name}" for one in chosen.values()]
        click.echo(render.undo_hint(root, gone, undo_for))
    else:
        click.echo("nothing is removed yet; add --yes to remove")
    for failure in failures:
        click.echo(f"peakpoint: {failure}", err=True)
    if failures:
        sys.exit(20)


def _spare_what_aliases_protect(run: Run, manifests: Sequence[Manifest]) -> None:
    """Refuse to remove what an alias points at, or can be rolled back to."""
    aliased = run.aliased(manifests, run.events())
    why = [f"{run.name}/{one.name}: {aliased[one.id]}" for one in manifests if one.id in aliased]
    if why:
        raise ConflictError(
            f"aliases protect {', '.join(why)}. Nothing was removed: what an alias points at is free when others have "
            "taken its place, as many as it keeps; peakpoint retire frees all of an alias that is no champion"
        )


def _spare_the_newest_good(run: Run, chosen: Collection[str]) -> None:
    """Refuse to remove what the run would continue from while newer ones stay that it cannot continue from."""
    shelf = reader.list_run(run.store, run.name)
    damaged = reader.find_damage(run.store, shelf.manifests)
    useless: list[str] = []
    for manifest in reversed(shelf.manifests):
        if manifest.id not in damaged and manifest.id not in shelf.incomplete:
            if manifest.id in chosen and useless:
                raise ConfigError(
                    f"{run.name}/{manifest.name} is the newest good checkpoint of run {run.name!r}, and stays: "
                    f"{'; '.join(useless)}. To remove it all the same, name the newer ones, too"
                )
            return
        if manifest.id not in chosen:
            useless.append(damaged.get(manifest.id, f"{manifest.name} is newer, but has lost parts"))


def _print_removal(repository: Repository, manifests: Sequence[Manifest]) -> None:
    console = render.console()
    for manifest in manifests:
        claims = repository.run(manifest.run).kept().get(manifest.id, ())
        console.print(f"[bold]{escape(manifest.run)}/{escape(manifest.name)}[/]")
        console.print(f"  frees {render.size(manifest.size_bytes)}; was kept because:")
        for claim in claims:
            console.print(f"  - {render.claim_text(claim)}")


# --- demo ---------------------------------------------------------------------------------------------------------


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("peakpoint-demo"), help="Where to work.")
@click.option("--epochs", type=click.IntRange(min=6), default=60, show_default=True, help="Epochs of each training.")
def demo(out: Path, epochs: int) -> None:
    """Train, kill in the middle of a save, resume: see that nothing is lost."""
    torch_side("peakpoint.cli.demo.show").run(out, epochs)


COMMANDS = (show, rm, demo)
