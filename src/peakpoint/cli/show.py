"""The command ``show``: one checkpoint."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peakpoint.cli import tables
from peakpoint.cli.answer import Answer, answers
from peakpoint.cli.arguments import REF, ROOT
from peakpoint.cli.render import age, alias_text, aliases_of, claims_text, facts, manifest_json, number, ref, seconds
from peakpoint.cli.validate import validation_line
from peakpoint.errors import CorruptError, FormatError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.amounts import size_text
from peakpoint.format.manifest import Manifest
from peakpoint.repository import reader, signing, validations
from peakpoint.repository.packs import packed_bytes
from peakpoint.repository.root import Repository, open_repository
from peakpoint.rules import Claim


@dataclass(frozen=True, slots=True)
class CheckpointView:
    """Everything that ``show`` says of a checkpoint.

    Attributes:
        directory: where its files are.
        packed: its bytes in the archive; None when it is not there.
        parent: RUN/NAME of the checkpoint that the training continued from; "" for the first one.
        members: of a mean: RUN/NAME of each checkpoint that it was made of.
    """

    manifest: Manifest
    directory: str
    claims: Sequence[Claim]
    aliases: Sequence[str]
    packed: int | None
    signatures: Sequence[signing.Signature]
    validations: validations.ValidationSurvey
    parent: str
    members: Sequence[str]


@click.command()
@ROOT
@REF
@answers
def show(root: Path, ref: str) -> Answer:
    """Show one checkpoint: metrics, reasons, parts, files, digests, signatures, timing, validations."""
    checkpoint = _view(open_repository(root), root, ref)

    def text(console: Console) -> None:
        console.print(facts(_facts(checkpoint)))
        console.print()
        console.print(_files_table(checkpoint.manifest))

    return Answer(_json(checkpoint), text)


def _view(repository: Repository, root: Path, ref: str) -> CheckpointView:
    run, stored = repository.locate(ref)
    manifest = next((manifest for manifest in run.known(()) if manifest.id == stored.id), stored)
    return CheckpointView(
        manifest=manifest,
        directory=str(root / layout.checkpoint_prefix(manifest.run, manifest.name)),
        claims=run.kept().get(manifest.id, ()),
        aliases=aliases_of(run).get(manifest.id, ()),
        packed=packed_bytes(run.store, run.name, [manifest]).get(manifest.id),
        signatures=signing.signatures(run.store, run.name, manifest.name),
        validations=validations.survey(run.store, run.name, manifest.id),
        parent=_parent(repository, manifest),
        members=[_name_of(repository, member) for member in manifest.members],
    )


def _parent(repository: Repository, manifest: Manifest) -> str:
    """Return RUN/NAME of the parent where it exists, otherwise its id; checkpoints of its run are tried first."""
    if manifest.parent is None:
        return ""
    manifests = reader.list_run(repository.store, manifest.run).manifests
    names = [ref(candidate) for candidate in manifests if candidate.id == manifest.parent]
    return names[0] if names else f"{manifest.parent} (not in this run, or removed)"


def _name_of(repository: Repository, member: str) -> str:
    try:
        return ref(repository.find_manifest(member))
    except (CorruptError, FormatError, NotFoundError):
        return f"{member} (removed or damaged)"


def _json(checkpoint: CheckpointView) -> dict[str, Any]:
    manifest = checkpoint.manifest
    return manifest_json(manifest, checkpoint.claims) | {
        "aliases": checkpoint.aliases,
        "packed_bytes": checkpoint.packed,
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
        "signatures": [asdict(signature) for signature in checkpoint.signatures],
        "path": checkpoint.directory,
        "validations": [
            {"number": validation.number, "at": validation.at, "passed": validation.passed, "by": validation.by}
            for validation in checkpoint.validations.validations
        ],
        "damaged_validations": [what for _, what in checkpoint.validations.damage],
    }


def _facts(checkpoint: CheckpointView) -> list[tuple[str, str]]:
    manifest, survey = checkpoint.manifest, checkpoint.validations
    epoch = "" if manifest.epoch is None else f", epoch {manifest.epoch}"
    metrics = "\n".join(f"{name} = {number(value)}" for name, value in manifest.metrics.items())
    damaged = [f"[bold red]damaged[/]: {escape(what)}" for _, what in survey.damage]
    parent = ("made of", "\n".join(checkpoint.members)) if manifest.members else ("parent", checkpoint.parent)
    return [
        ("checkpoint", escape(ref(manifest))),
        ("id", manifest.id),
        *([("aliases", alias_text(checkpoint.aliases))] if checkpoint.aliases else []),
        ("directory", escape(checkpoint.directory)),
        ("taken at", f"step {manifest.step}{epoch} (commit {manifest.sequence}, report {manifest.report})"),
        ("created", f"{manifest.created_at:%Y-%m-%d %H:%M:%S} UTC, {age(manifest.created_at)}"),
        ("metrics", escape(metrics) or "none"),
        ("saved because", escape("\n".join(manifest.reasons))),
        ("kept because", claims_text(checkpoint.claims)),
        ("size", size_text(manifest.size_bytes)),
        ("archived", "no" if checkpoint.packed is None else f"packed into {size_text(checkpoint.packed)}"),
        ("signed", escape("\n".join(map(_signature, checkpoint.signatures))) or "no"),
        ("parts", escape(", ".join(manifest.parts))),
        (parent[0], escape(parent[1]) or "none: the first checkpoint of its run"),
        ("written by", escape(", ".join(f"{name} {value}" for name, value in manifest.written_by.items()))),
        ("written", _writing(manifest)),
        ("training blocked", _stall(manifest)),
        ("validations", "\n".join([*map(validation_line, survey.validations), *damaged]) or "none"),
    ]


def _writing(manifest: Manifest) -> str:
    """How long the files took, and how fast they were written."""
    duration, rate = manifest.timing.get("write_seconds"), manifest.timing.get("bytes_per_second")
    if duration is None or rate is None:
        return "not recorded"
    shared = manifest.size_bytes - manifest.written_bytes
    text = (
        f"{size_text(manifest.written_bytes)} in {seconds(duration)}, {size_text(rate)}/s, including hashing and fsync"
    )
    return text + (f"; {size_text(shared)} shared with earlier checkpoints" if shared else "")


def _stall(manifest: Manifest) -> str:
    """What the save cost the training loop."""
    names = {
        "capture_seconds": "copy",
        "waited_seconds": "previous save",
        "step_waited_seconds": "optimizer step",
    }
    timing = {name: manifest.timing[name] for name in names if name in manifest.timing}
    if not timing:
        return "not recorded"
    return f"{seconds(sum(timing.values()))} ({', '.join(f'{seconds(timing[name])} {names[name]}' for name in timing)})"


def _signature(signature: signing.Signature) -> str:
    key = "names no key" if signature.fingerprint is None else f"key {signature.fingerprint}"
    return f"{signature.record}, {key} (not verified)"


def _files_table(manifest: Manifest) -> Table:
    part_of = {file: part for part, files in manifest.parts.items() for file in files}
    rows = [
        (
            escape(file.name),
            escape(part_of.get(file.name, "")),
            str(len(file.tensors)) if file.header else "",
            size_text(file.size),
            f"{file.digest[:16]}…",
        )
        for file in manifest.files
    ]
    return tables.plain(("file", "part", ">tensors", ">size", "digest (BLAKE3)"), rows)
