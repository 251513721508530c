"""Tables for people, JSON for programs. Nothing here decides anything."""

import math
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from peakpoint.cli import alias_marks, tables
from peakpoint.cli.tables import Column
from peakpoint.format import amounts
from peakpoint.format.manifest import Checkpoint, Manifest
from peakpoint.format.metrics import json_value
from peakpoint.repository import reader
from peakpoint.repository.annotations import all_with_annotations
from peakpoint.repository.audit import Audit, AuditFinding
from peakpoint.repository.packs import packed_bytes
from peakpoint.repository.run import Run, rules_of
from peakpoint.rules import Claim, ranked, ranking_metrics
from peakpoint.rules.history import history
from peakpoint.rules.peaks import Peak, peaks

if TYPE_CHECKING:
    from peakpoint.catalogue import RunSummary

size, at = amounts.size_text, amounts.moment_label
_NAMED = 10  # things that one command names
_WIDE = 200  # columns when the output is not a terminal: nothing is cut off


def console(*, stderr: bool = False) -> Console:
    """A console with colours on a terminal, plain text otherwise."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if terminal else _WIDE
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False, emoji=False)  # best:fire:max is a rule


def as_json(value: Any) -> None:
    """Print JSON; NaN and infinities as strings."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(json_value(value)), indent=2).decode() + "\n")


def words(text: str) -> str:
    """Somebody's words, in which nothing means anything to a terminal or a table."""
    return escape("".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text))


def count(number: int, thing: str) -> str:
    """``"1 checkpoint"``, ``"2 checkpoints"``."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def seconds(value: float) -> str:
    """``"2.7 ms"`` or ``"1.25 s"``."""
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def written(manifest: Manifest) -> str:
    """How long the files took, and how fast they went."""
    taken, rate = manifest.timing.get("write_seconds"), manifest.timing.get("bytes_per_second")
    if taken is None or rate is None:
        return "not recorded"
    text = f"{size(manifest.written_bytes)} in {seconds(taken)}, {size(rate)}/s, hashed and durable"
    shared = manifest.size_bytes - manifest.written_bytes
    return text + (f"; {size(shared)} shared with earlier checkpoints" if shared else "")


def waits(manifest: Manifest) -> str:
    """What the save cost the training loop."""
    names = {
        "waited_seconds": "for the save before it",
        "capture_seconds": "while it was being copied",
        "step_waited_seconds": "in optimizer steps for the rest of the copy",
    }
    known = [f"{seconds(manifest.timing[name])} {what}" for name, what in names.items() if name in manifest.timing]
    return ", ".join(known) or "not recorded"


def command(*words: object) -> str:
    """A command of ours that can be pasted into a shell."""
    return "peakpoint " + shlex.join(map(str, words))


def undo_hint(root: Path, gone: Sequence[str], undo_for: timedelta) -> str:
    """What to do when it was a mistake.

    Args:
        root: the repository.
        gone: what went, each as RUN/NAME.
        undo_for: how long it can be brought back.
    """
    if not undo_for:
        return "the space is free; this cannot be taken back"
    until = datetime.now(UTC) + undo_for
    some = "it" if len(gone) == 1 else "them" if len(gone) <= _NAMED else "each of them by its name"
    return (
        f"until {until:%Y-%m-%d %H:%M} UTC this brings {some} back:\n"
        f"  {command('undo', root, *(gone if len(gone) <= _NAMED else gone[:1]))}\n"
        f"and this frees the space now:\n  {command('trash', root, '--empty')}"
    )


def number(value: float | None) -> str:
    """A metric, in six significant digits."""
    return "" if value is None else f"{value:.6g}"


def rounded(difference: float, *of: float) -> float:
    """A difference, without the digits that six significant ones of the values do not have: 0.706 - 0.7 is 0.006."""
    scale = max(map(abs, of))
    if not (0 < scale < math.inf) or not math.isfinite(difference):
        return difference
    return round(difference, 5 - math.floor(math.log10(scale))) or difference


def money(value: float) -> str:
    """A price, with two digits of what is below 1."""
    return f"{value:.2f}" if value >= 1 else f"{value:.2g}"


def age(moment: datetime, now: datetime | None = None) -> str:
    """``"3 min ago"``."""
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def kept_table(
    console: Console,
    manifests: Sequence[Manifest],
    kept: Mapping[str, tuple[Claim, ...]],
    watched: Sequence[str],
    best: Mapping[str, str],
    packed: Mapping[str, int],
    aliases: Mapping[str, Sequence[str]],
) -> RenderableType:
    """Checkpoints of a run, with the reasons why each is kept: beside them, or below where it is too narrow.

    Args:
        console: where it is to fit.
        manifests: the checkpoints.
        kept: id to claims.
        watched: metrics with a column; the last ones go first where it is too narrow.
        best: metric to the id of its best checkpoint, which is marked.
        packed: id to the bytes in the archive, of those that are there.
        aliases: id to the aliases that point at it.
    """

    def value(manifest: Manifest, metric: str) -> str:
        shown = number(manifest.metrics.get(metric))
        return f"[bold green]{shown} *[/]" if best.get(metric) == manifest.id else shown + "  "

    def bytes_of(manifest: Manifest) -> str:
        archived = f"\n[dim]packed {size(packed[manifest.id])}[/]" if manifest.id in packed else ""
        return size(manifest.size_bytes) + archived

    metrics = [Column(escape(metric), [value(one, metric) for one in manifests]) for metric in watched]
    columns = [
        Column("checkpoint", [escape(one.name) for one in manifests], right=False),
        *alias_marks.columns([aliases.get(one.id, ()) for one in manifests]),
        Column("epoch", ["" if one.epoch is None else str(one.epoch) for one in manifests]),
        Column("step", [str(one.step) for one in manifests]),
        *metrics,
        Column("size", list(map(bytes_of, manifests))),
    ]
    spare = [*(metric.title for metric in metrics[:0:-1]), "step", "size", "epoch", "aliases"]
    reasons = [claims_text(kept.get(one.id, ())) for one in manifests]
    return tables.with_reasons(console, columns, spare, "kept because", reasons)


def claims_text(claims: Iterable[Claim]) -> str:
    """Claims, a line each."""
    return "\n".join(map(claim_text, claims)) or "[yellow]nothing claims it: it goes with the next save[/]"


# how the reasons of rules begin that say all that the rule says
_SAYING = {"best": "best ", "best-at": "best ", "topk": "rank ", "pareto": "on the ", "every": "every ", "thin": "thin"}


def claim_text(claim: Claim) -> str:
    """The reason, and the rule where the reason does not say it: options, and what is simply the newest."""
    kind = claim.rule.partition(":")[0]
    plain = "=" not in claim.rule.replace(":smooth=", "")
    if kind == "protection" or (plain and kind in _SAYING and claim.reason.startswith(_SAYING[kind])):
        return escape(claim.reason)
    return f"{escape(claim.reason)} [dim]({escape(claim.rule)})[/]"


GONE = " [bold red](gone)[/]"  # no checkpoint of the best exists


def best_exist(peaks: Iterable[Peak], manifests: Sequence[Manifest]) -> dict[str, bool]:
    """For each metric, whether a checkpoint of its best step exists."""
    steps = {one.step for one in manifests}
    return {peak.metric: peak.best_step in steps for peak in peaks}


def peaks_table(peaks: Sequence[Peak], exist: Mapping[str, bool]) -> Table:
    """Best against last, and whether a checkpoint of the best exists."""
    heads = ("metric", "mode", ">best", ">at", ">last", ">at", ">lost since the best")
    return tables.plain(heads, [_peak_cells(peak, exist) for peak in peaks])


def _peak_cells(peak: Peak, exist: Mapping[str, bool]) -> tuple[str, ...]:
    return (
        escape(peak.metric),
        peak.mode,
        f"[bold green]{number(peak.best)}[/]",
        at(peak.best_step, peak.best_epoch) + ("" if exist.get(peak.metric) else GONE),
        number(peak.last),
        at(peak.last_step, peak.last_epoch),
        "nothing" if peak.lost == 0 else f"[yellow]{number(rounded(peak.lost, peak.best, peak.last))}[/]",
    )


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, one pair a line."""
    table = Table(box=None, pad_edge=False, show_header=False, show_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def files_table(manifest: Manifest) -> Table:
    """Files of a checkpoint."""
    part_of = {file: part for part, files in manifest.parts.items() for file in files}
    rows = [
        (
            escape(file.name),
            escape(part_of.get(file.name, "")),
            str(len(file.tensors)) if file.header else "",
            size(file.size),
            f"{file.digest[:16]}…",
        )
        for file in manifest.files
    ]
    return tables.plain(("file", "part", ">tensors", ">size", "digest (BLAKE3)"), rows)


_COLOURS = {"damage": "bold red", "litter": "yellow", "foreign": "blue", "busy": "cyan", "removed": "green"}


def findings_table(findings: Sequence[AuditFinding]) -> Table:
    """What an audit found."""
    rows = [(f"[{_COLOURS[one.kind]}]{one.kind}[/]", escape(one.where), escape(one.what)) for one in findings]
    return tables.plain(("kind", "where", "what"), rows)


def audit_sentence(result: Audit) -> str:
    """What was looked at, in one sentence."""
    depth = "every byte compared with its digest" if result.deep else "sizes and seals compared; --deep compares bytes"
    return f"{count(result.runs, 'run')}, {count(result.checkpoints, 'checkpoint')}, {size(result.bytes)}: {depth}"


def print_run(console: Console, run: Run) -> None:
    """A run: its rules, peak against last, and its checkpoints with the reasons why each is kept."""
    events, manifests = run.events(), run.manifests()
    in_force = rules_of(events)
    pairs = ranking_metrics(in_force)
    kept, manifests = run.plan(None, events).keep, all_with_annotations(manifests, events, ())
    total = sum(manifest.size_bytes for manifest in manifests)
    packed, aliases = packed_bytes(run.store, run.name, manifests), alias_marks.pointing(run)
    away = sum(manifest.size_bytes - packed[manifest.id] for manifest in manifests if manifest.id in packed)
    holder = run.holder()
    console.print(
        f"[bold]{escape(run.name)}[/]: {count(len(manifests), 'checkpoint')}, {size(total)}"
        + (f", archived in {size(total - away)}" if packed else "")
        + (f", newest {age(manifests[-1].created_at)}" if manifests else "")
        + (f", [cyan]being written by {escape(holder)}[/]" if holder else "")
    )
    console.print(f"rules: {escape(' '.join(rule.text for rule in in_force)) or 'none'}")
    found = peaks(history(events), pairs)
    if found:
        console.print(peaks_table(found, best_exist(found, manifests)))
    if manifests:
        metrics = [metric for metric, _ in pairs] or sorted({name for one in manifests for name in one.metrics})
        best = {metric: ranking[0].id for metric, mode in pairs if (ranking := ranked(manifests, metric, mode))}
        console.print(kept_table(console, manifests, kept, metrics[:4], best, packed, aliases))
    console.print()


def runs_table(console: Console, runs: Sequence["RunSummary"], writing: Collection[str]) -> Table:
    """Runs, a line each: the peak against the last of the first metric that its rules watch; some are being written."""
    rows = [_run_row(run, writing=run.name in writing) for run in runs]
    titles = ("run", "aliases", "checkpoints", "size", "reports", "newest", "metric", "best", "at", "last", "lost")
    cells = zip(*rows, strict=True)
    columns = [
        Column(title, column, right=title not in {"run", "aliases", "metric"})
        for title, column in zip(titles, cells, strict=True)
        if title != "aliases" or any(column)
    ]
    spare = ["reports", "at", "checkpoints", "size", "newest", "last", "aliases"]
    left = tables.fitted(columns, spare, console.width)
    return tables.table(left, console.width)


def _run_row(run: "RunSummary", *, writing: bool) -> tuple[str, ...]:
    peak = [""] * 5
    if run.peaks:
        metric, mode, best, moment, last, _, lost = _peak_cells(run.peaks[0], run.kept)
        peak = [f"{metric} ({mode})", best, moment, last, lost]
    return (
        escape(run.name) + (f" [bold red]{len(run.damaged)} damaged[/]" if run.damaged else ""),
        alias_marks.text(run.aliases),
        f"{run.checkpoints:,}",
        size(run.size_bytes),
        f"{run.reports:,}",
        "[cyan]being written[/]" if writing else "" if run.newest is None else age(run.newest),
        *peak,
    )


def listed_json(run: "RunSummary", writer: str | None) -> dict[str, Any]:
    """A run for programs, without its checkpoints."""
    return {
        "name": run.name,
        "rules": run.rules,
        "writer": writer,
        "peaks": [_peak_json(peak) for peak in run.peaks],
        "reports": run.reports,
        "checkpoint_count": run.checkpoints,
        "size_bytes": run.size_bytes,
        "newest": run.newest,
        "damaged": run.damaged,
        "best_exists": dict(run.kept),
        "aliases": run.aliases,
    }


def run_json(run: Run) -> dict[str, Any]:
    """A run for programs."""
    events, manifests = run.events(), run.manifests()
    in_force = rules_of(events)
    kept, manifests = run.plan(None, events).keep, all_with_annotations(manifests, events, ())
    packed, aliases = packed_bytes(run.store, run.name, manifests), alias_marks.pointing(run)
    past = history(events)
    found = peaks(past, ranking_metrics(in_force))
    return {
        "name": run.name,
        "rules": [rule.text for rule in in_force],
        "writer": run.holder(),
        "reports": len(past),
        "checkpoint_count": len(manifests),
        "size_bytes": sum(manifest.size_bytes for manifest in manifests),
        "newest": max((manifest.created_at for manifest in manifests), default=None),
        "damaged": [str(one.error) for one in reader.list_run(run.store, run.name).damaged],
        "peaks": [_peak_json(peak) for peak in found],
        "best_exists": best_exist(found, manifests),
        "aliases": sorted(alias for some in aliases.values() for alias in some),
        "checkpoints": [
            manifest_json(manifest, kept.get(manifest.id, ()))
            | {"packed_bytes": packed.get(manifest.id), "aliases": aliases.get(manifest.id, ())}
            for manifest in manifests
        ],
    }


def _peak_json(peak: Peak) -> dict[str, Any]:
    return asdict(peak) | {"lost": peak.lost}


def checkpoint_json(manifest: Manifest | Checkpoint) -> dict[str, Any]:
    """What a checkpoint is, for programs."""
    return {
        "ref": f"{manifest.run}/{manifest.name}",
        "run": manifest.run,
        "name": manifest.name,
        "id": manifest.id,
        "sequence": manifest.sequence,
        "step": manifest.step,
        "epoch": manifest.epoch,
        "metrics": dict(manifest.metrics),
        "size_bytes": manifest.size_bytes,
        "created_at": manifest.created_at,
        "saved_because": manifest.reasons,
    }


def manifest_json(manifest: Manifest, claims: Sequence[Claim]) -> dict[str, Any]:
    """A checkpoint and why it is kept, for programs."""
    return checkpoint_json(manifest) | {"kept_because": [asdict(claim) for claim in claims]}
