"""The commands ``show`` and ``explain``: one checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from peakpoint.cli import render, tables
from peakpoint.cli.command import REF, ROOT, Answer, command
from peakpoint.cli.completion import CHECKPOINTS
from peakpoint.cli.records import validation_line
from peakpoint.cli.render import aliases_of, count, fields, literal, manifest_json, number, print_list, ref, seconds
from peakpoint.errors import CorruptError, FormatError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.amounts import size_text
from peakpoint.format.manifest import Manifest
from peakpoint.format.settings import Settings, settings_of
from peakpoint.reports.diff import openings
from peakpoint.reports.explain import CheckpointHistory, checkpoint_histories
from peakpoint.repository import maintenance, reader, signing, validations
from peakpoint.repository.annotations import all_with_annotations, measurements_of
from peakpoint.repository.packs import packed_bytes
from peakpoint.repository.refs import AtEpoch, AtStep, ByName, parse
from peakpoint.repository.root import Repository, open_repository
from peakpoint.repository.run import Run
from peakpoint.repository.trash import dropped_parts
from peakpoint.rules import Claim, moment_text

# --- show ----------------------------------------------------------------------------------------------------------


@command(ROOT, REF)
def show(root: Path, ref: str) -> Answer:
    """Show one checkpoint: metrics, reasons, parts, files, digests, signatures, timing, validations."""
    repository = open_repository(root)
    run, stored = repository.locate(ref)
    manifest = next((manifest for manifest in run.annotated(()) if manifest.id == stored.id), stored)
    claims = run.kept().get(manifest.id, ())
    survey = validations.survey(run.store, run.name, manifest.id)
    settings = settings_of(openings(run.events(), manifest))  # later ones may differ
    data = manifest_json(manifest, claims) | fields(manifest, "parent", "members", "written_by", "timing", "asked")
    data |= {
        "aliases": aliases_of(run).get(manifest.id, ()),
        **asdict(settings),
        "packed_bytes": packed_bytes(run.store, run.name, [manifest]).get(manifest.id),
        "parts": manifest.parts,
        "files": [fields(file, "name", "size", "digest") | {"tensors": len(file.tensors)} for file in manifest.files],
        "signatures": signing.signatures(run.store, run.name, manifest.name),
        "path": _place(str(root), layout.checkpoint_prefix(manifest.run, manifest.name)),
        "validations": [fields(validation, "number", "at", "passed", "by") for validation in survey.validations],
        "damaged_validations": [what for _, what in survey.damage],
    }
    origin = ("made of", "\n".join(literal(_name_of(repository, member)) for member in manifest.members))
    if not manifest.members:
        origin = ("parent", literal(_parent(repository, manifest)))

    def text(console: Console) -> None:
        console.print(render.facts(_facts(manifest, claims, survey, origin, settings, data)))
        console.print()
        console.print(_files_table(manifest))

    return Answer(data, text)


def _parent(repository: Repository, manifest: Manifest) -> str:
    """Return RUN/NAME of the parent where it exists, otherwise its id; checkpoints of its run are tried first."""
    if manifest.parent is None:
        return ""
    manifests = reader.list_run(repository.store, manifest.run).manifests
    names = [ref(candidate) for candidate in manifests if candidate.id == manifest.parent]
    return names[0] if names else f"{manifest.parent} (not in this run, or removed)"


def _place(root: str, prefix: str) -> str:
    """Where something is, of a repository in a directory or in a bucket."""
    if "://" not in root:
        return str(Path(root) / prefix)
    address, question, options = root.partition("?")
    return f"{address.rstrip('/')}/{prefix}{question}{options}"


def _name_of(repository: Repository, member: str) -> str:
    try:
        return ref(repository.find_manifest(member))
    except (CorruptError, FormatError, NotFoundError):
        return f"{member} (removed, renamed or damaged)"


def _facts(
    manifest: Manifest,
    claims: Sequence[Claim],
    survey: validations.ValidationSurvey,
    origin: tuple[str, str],
    settings: Settings,
    data: Mapping[str, Any],
) -> list[tuple[str, str]]:
    """Names and values; ``data`` is what ``--json`` prints, ``origin`` what the checkpoint was made of, in markup."""
    epoch = "" if manifest.epoch is None else f", epoch {manifest.epoch}"
    metrics = "\n".join(literal(f"{name} = {number(value)}") for name, value in manifest.metrics.items())
    damaged = [f"[bold red]damaged[/]: {literal(what)}" for what in data["damaged_validations"]]
    packed = data["packed_bytes"]
    return [
        ("checkpoint", literal(ref(manifest))),
        ("id", literal(manifest.id)),
        *([("aliases", render.alias_text(data["aliases"]))] if data["aliases"] else []),
        ("directory", literal(data["path"])),
        ("taken at", f"step {manifest.step}{epoch} (commit {manifest.sequence}, report {manifest.report})"),
        ("created", f"{manifest.created_at:%Y-%m-%d %H:%M:%S} UTC, {render.age(manifest.created_at)}"),
        ("metrics", metrics or "none"),
        *([("config", render.setting_list(settings))] if settings.config else []),
        *([("tags", literal(", ".join(settings.tags)))] if settings.tags else []),
        ("saved because", "\n".join(map(literal, manifest.reasons))),
        ("kept because", render.claims_text(claims)),
        ("size", size_text(manifest.size_bytes)),
        ("archived", "no" if packed is None else f"packed into {size_text(packed)}"),
        ("signed", "\n".join(literal(_signature(signature)) for signature in data["signatures"]) or "no"),
        ("parts", literal(", ".join(_part(manifest, part) for part in manifest.parts))),
        (origin[0], origin[1] or "none: the first checkpoint of its run"),
        ("written by", literal(", ".join(f"{name} {value}" for name, value in manifest.written_by.items()))),
        ("written", _writing(manifest)),
        ("training blocked", _stall(manifest)),
        ("validations", "\n".join([*map(validation_line, survey.validations), *damaged]) or "none"),
    ]


def _part(manifest: Manifest, part: str) -> str:
    """A part and, if it is in shards, how many processes have written them."""
    ranks = len({name.rpartition("+rank")[2] for name in manifest.parts[part] if manifest.file(name).offsets})
    return f"{part} ({count(ranks, 'rank')})" if ranks else part


def _writing(manifest: Manifest) -> str:
    """How long the files took, and how fast they were written."""
    duration, rate = manifest.timing.get("write_seconds"), manifest.timing.get("bytes_per_second")
    if duration is None or rate is None:
        return "not recorded"
    shared = manifest.size_bytes - manifest.written_bytes
    speed = f"{size_text(manifest.written_bytes)} in {seconds(duration)}, {size_text(rate)}/s"
    note = f"; {size_text(shared)} shared with earlier checkpoints" if shared else ""
    return f"{speed}, including hashing and fsync{note}"


def _stall(manifest: Manifest) -> str:
    """What the save cost the training loop."""
    names = {"capture_seconds": "copy", "waited_seconds": "previous save", "step_waited_seconds": "optimizer step"}
    stalls = {phase: manifest.timing[name] for name, phase in names.items() if name in manifest.timing}
    if not stalls:
        return "not recorded"
    phases = ", ".join(f"{seconds(duration)} {phase}" for phase, duration in stalls.items())
    return f"{seconds(sum(stalls.values()))} ({phases})"


def _signature(signature: signing.Signature) -> str:
    key = "names no key" if signature.fingerprint is None else f"key {signature.fingerprint}"
    return f"{signature.record}, {key} (not verified)"


def _files_table(manifest: Manifest) -> tables.PlainTable:
    part_of = {file: part for part, files in manifest.parts.items() for file in files}
    rows = [
        (
            literal(file.name),
            literal(part_of.get(file.name, "")),
            str(len(file.tensors)) if file.header else "",
            size_text(file.size),
            f"{file.digest[:16]}…",
        )
        for file in manifest.files
    ]
    return tables.PlainTable(("file", "part", ">tensors", ">size", "digest (BLAKE3)"), rows)


# --- explain -------------------------------------------------------------------------------------------------------


_MOST_NAMES = 3  # checkpoints that a rule keeps instead


@command(ROOT, click.argument("text", metavar="REF", **CHECKPOINTS))
def explain(root: Path, text: str) -> Answer:
    """Say why a checkpoint is kept; of one that was removed, when, why, and what was kept instead."""
    repository = open_repository(root)
    if text.startswith("@"):
        manifest = repository.find_manifest(text)
        text = f"{manifest.run}/{manifest.id}"
    run = repository.run(parse(text).run)
    try:
        manifest = run.find_manifest(text)
    except NotFoundError as error:
        life = _removed(run, text)
        if life is None:
            raise NotFoundError(f"{error}; the journal has no record of such a checkpoint either") from error
        until = {entry.manifest.id: entry.record.until for entry in maintenance.in_trash(run)}
        return _explain_removed(root, run, life, until.get(life.saved.checkpoint))
    return _explain_kept(run, manifest)


# --- kept ----------------------------------------------------------------------------------------------------------


def _explain_kept(run: Run, manifest: Manifest) -> Answer:
    events, rules = run.events(), run.rules()
    manifests = all_with_annotations(run.manifests(), events, rules)
    claims = run.kept().get(manifest.id, ())
    dropped = list(dropped_parts(run.store, run.name, manifest.name))
    measured = measurements_of(events, manifest.id)
    names = {candidate.id: candidate.name for candidate in manifests}
    claiming = {claim.rule for claim in claims}
    instead = {rule.text: [names[id_] for id_ in rule.claims(manifests)] for rule in rules if rule.text not in claiming}
    packed = packed_bytes(run.store, run.name, [manifest]).get(manifest.id)
    annotated = next((candidate for candidate in manifests if candidate.id == manifest.id), manifest)
    data = manifest_json(annotated, claims) | {
        "exists": True,
        "measured": [fields(event, "at", "metrics", "source", "by") for event in measured],
        "claimed_instead": instead,
        "dropped": [fields(record, "at", "parts") | {"reason": record.why} for record in dropped],
        "aliases": aliases_of(run).get(manifest.id, ()),
    }

    def text(console: Console) -> None:
        console.print(f"[bold]{literal(ref(manifest))}[/] exists ({moment_text(manifest)})")
        console.print(f"saved {manifest.created_at:%Y-%m-%d %H:%M:%S} UTC because")
        print_list(console, map(literal, manifest.reasons))
        console.print("kept because" if claims else "[yellow]no rule keeps it: the next save of this run removes it[/]")
        print_list(console, map(render.claim_text, claims))
        for record in dropped:
            parts = literal(", ".join(record.parts))
            console.print(f"{parts} removed {record.at:%Y-%m-%d %H:%M} UTC: {literal(record.why)}")
        if packed is not None:
            console.print(f"archived: {size_text(manifest.size_bytes)} packed into {size_text(packed)}")
        for event in measured:
            console.print(f"measured {event.at:%Y-%m-%d %H:%M} UTC by {literal(event.by)}: {_values(event.metrics)}")
        for rule, kept in instead.items():
            keeps = f"{render.listed(kept, _MOST_NAMES)} instead" if kept else "nothing"
            console.print(f"[dim]{literal(rule)} keeps {literal(keeps)}[/]")

    return Answer(data, text)


# --- removed -------------------------------------------------------------------------------------------------------


def _removed(run: Run, text: str) -> CheckpointHistory | None:
    """Return the removed checkpoint that a ref names; the last one of several."""

    def exists(life: CheckpointHistory) -> bool:  # damaged, or its removal came to nothing
        return life.removed is None and run.store.size(layout.manifest_key(run.name, life.saved.name)) is not None

    removed = [life for life in checkpoint_histories(run.events()) if not exists(life)]
    match parse(text):
        case ByName(name=name):
            matching = [life for life in removed if life.saved.name == name]
        case AtStep(step=step):
            matching = [life for life in removed if life.record.step == step]
        case AtEpoch(epoch=epoch):
            matching = [life for life in removed if life.record.epoch == epoch]
        case _:
            matching = []
    return matching[-1] if matching else None


def _explain_removed(root: Path, run: Run, life: CheckpointHistory, until: datetime | None) -> Answer:
    """Explain a removal; ``until`` is when the trash lets the checkpoint go, None when it is not there."""
    removed = life.removed
    moment = life.record if removed is None else removed
    data = fields(moment, "step", "epoch") | {
        "exists": False,
        "name": life.saved.name,
        "id": life.saved.checkpoint,
        "metrics": life.record.metrics,
        "saved": fields(life.saved, "at", "reasons"),
        "removed": removed and fields(removed, "at", "reason", "by", "until"),
        "in_trash": until is not None,
        "claimed_instead": dict(life.claimed_instead),
    }
    return Answer(data, lambda console: _print_removed(console, root, run, life, until))


def _print_removed(console: Console, root: Path, run: Run, life: CheckpointHistory, until: datetime | None) -> None:
    removed = life.removed
    date = "" if removed is None else f" on {removed.at:%Y-%m-%d}"
    fate = "is gone" if removed is None else "was removed"
    console.print(f"[bold]{literal(life.saved.name)}[/] {fate}{date} ({moment_text(life.record)})")
    values = _values(life.record.metrics) or "no metrics"
    console.print(f"saved {life.saved.at:%Y-%m-%d %H:%M:%S} UTC with {values} because")
    print_list(console, map(literal, life.saved.reasons))
    if removed is None:
        console.print("The journal does not say when or why: the disk was full, or somebody deleted the files.")
        return
    console.print(f"removed {removed.at:%Y-%m-%d %H:%M:%S} UTC by {literal(removed.by)}: {literal(removed.reason)}")
    if until is not None:
        undo = literal(render.command_line("undo", root, f"{run.name}/{life.saved.name}"))
        console.print(f"in the trash until {until:%Y-%m-%d %H:%M} UTC. To restore it: {undo}", soft_wrap=True)
    elif removed.until is not None:
        console.print("it was in the trash, and is permanently deleted")
    for rule, kept in life.claimed_instead:
        if not kept:
            console.print(f"[cyan]{literal(rule)}[/]: keeps no checkpoint in this range")
            continue
        console.print(f"[cyan]{literal(rule)}[/] kept instead:")
        more = [f"and {len(kept) - _MOST_NAMES} more"] if len(kept) > _MOST_NAMES else []
        print_list(console, map(literal, [*kept[:_MOST_NAMES], *more]))


def _values(metrics: Mapping[str, float]) -> str:
    return literal(", ".join(f"{name} = {value:.6g}" for name, value in metrics.items()))
