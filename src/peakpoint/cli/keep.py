"""The commands ``keep``, ``pin``, ``unpin`` and ``record``: what rules keep of a run, and what they know."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from peakpoint.cli import tables
from peakpoint.cli.answer import Answer, answers, confirmed
from peakpoint.cli.arguments import REF, ROOT, UNDO_FOR, rules_help
from peakpoint.cli.render import claims_text, count, manifest_json, money, number, ref, undo_hint
from peakpoint.cli.tables import Column
from peakpoint.errors import ConfigError, StoreError
from peakpoint.format.amounts import size_text
from peakpoint.format.events import Reported
from peakpoint.format.manifest import Manifest
from peakpoint.repository import maintenance
from peakpoint.repository.packs import check_not_archived
from peakpoint.repository.root import open_repository
from peakpoint.repository.run import Run
from peakpoint.rules import Rule, check_ranking_metrics, moment_text, parse_all
from peakpoint.rules.retention import RetentionPlan
from peakpoint.rules.simulate import WhatIf, typical_size, what_if

GB = 1e9


@click.command()
@ROOT
@click.argument("name", metavar="RUN")
@click.option("--rules", "text", help=rules_help("those in force"))
@click.option("--what-if", is_flag=True, help="Simulate the rules on the recorded history, from the first report on.")
@click.option("--price", type=click.FloatRange(min=0), help="With --what-if: price of a GB in a month.")
@UNDO_FOR
@answers
@confirmed
def keep(
    root: Path, name: str, text: str | None, price: float | None, undo_for: timedelta, *, what_if: bool, apply: bool
) -> Answer:
    """Show what rules keep of a run, why, and what they would remove.

    With --yes it is removed, and the rules given with --rules are in force from then on.
    """
    run = open_repository(root).run(name)
    rules = run.rules() if text is None else parse_all(text)
    if not rules:
        raise ConfigError(f"no rules: run {name!r} has none in force; give some with --rules, such as last:3")
    if text is not None:
        _check_metrics(run, rules)
    if what_if:
        return _what_if(run, rules, price)
    check_not_archived(run.store, name, run.manifests())
    plan = run.plan(rules)
    rows = _rows(run, plan)
    data = _plan_json(run, rules, plan)
    failures: list[str] = []
    if apply:
        failures = maintenance.apply_plan(run, plan, rules if text is not None else None, undo_for=undo_for)
    data |= {"applied": apply, "failures": failures}

    def show_plan(console: Console) -> None:
        console.print(f"[bold]{escape(run.name)}[/] under {escape(' '.join(rule.text for rule in rules))}")
        _print_rows(console, rows, plan)
        click.echo(_outcome(root, run, plan, failures, undo_for) if apply else _next_step(plan))

    return Answer(data, show_plan, failures, StoreError.exit_code if failures else 0)


def _check_metrics(run: Run, rules: Sequence[Rule]) -> None:
    """Refuse a metric that no report and no checkpoint of the run has."""
    reported = [event.metrics for event in run.events() if isinstance(event, Reported)]
    measured = [manifest.metrics for manifest in run.annotated(())]
    check_ranking_metrics(rules, {name for metrics in reported + measured for name in metrics})


def _next_step(plan: RetentionPlan) -> str:
    return "nothing is removed yet; add --yes to remove" if plan.remove or plan.drop else "nothing to remove"


def _outcome(root: Path, run: Run, plan: RetentionPlan, failures: Sequence[str], undo_for: timedelta) -> str:
    if not plan.remove and not plan.drop:
        return "nothing to remove"
    parts = f", parts of {count(len(plan.drop), 'checkpoint')} permanently" if plan.drop else ""
    failed = f"; {len(failures)} failed" if failures else ""
    line = f"removed {count(len(plan.remove), 'checkpoint')}{parts}{failed}"
    refs = [f"{run.name}/{removal.manifest.name}" for removal in plan.remove]
    return f"{line}\n{undo_hint(root, refs, undo_for)}" if refs else line


def _rows(run: Run, plan: RetentionPlan) -> list[tuple[str, str, int, str]]:
    """Return name, verdict, bytes and reason of each checkpoint."""
    removals = {removal.manifest.id: removal.reason for removal in plan.remove}
    dropped = {thinning.manifest.id: ", ".join(thinning.parts) for thinning in plan.drop}
    rows = []
    for manifest in run.manifests():
        verdict, reason = "[green]kept[/]", claims_text(plan.keep.get(manifest.id, ()))
        if manifest.id in dropped:
            verdict = f"[yellow]loses {escape(dropped[manifest.id])} permanently[/]"
        if manifest.id in removals:
            verdict, reason = "[red]removed[/]", escape(removals[manifest.id])
        rows.append((manifest.name, verdict, manifest.size_bytes, reason))
    return rows


def _print_rows(console: Console, rows: Sequence[tuple[str, str, int, str]], plan: RetentionPlan) -> None:
    if rows:
        names, verdicts, sizes, reasons = (list(cells) for cells in zip(*rows, strict=True))
        columns = [
            Column("checkpoint", list(map(escape, names)), right=False),
            Column("", verdicts, right=False),
            Column("size", list(map(size_text, sizes))),
        ]
        console.print(tables.with_reasons(console, columns, ["size"], "why", reasons))
    kept_bytes = sum(size_bytes for _, _, size_bytes, _ in rows) - plan.freed_bytes
    console.print(
        f"{len(rows) - len(plan.remove)} of {count(len(rows), 'checkpoint')} kept, {size_text(kept_bytes)}; "
        f"the rest frees {size_text(plan.freed_bytes)}"
    )


def _plan_json(run: Run, rules: Sequence[Rule], plan: RetentionPlan) -> dict[str, Any]:
    return {
        "run": run.name,
        "rules": [rule.text for rule in rules],
        "stays": [
            manifest_json(manifest, plan.keep[manifest.id]) for manifest in run.manifests() if manifest.id in plan.keep
        ],
        "goes": [manifest_json(removal.manifest, ()) | {"reason": removal.reason} for removal in plan.remove],
        "drops": [
            {"ref": ref(thinning.manifest), "parts": thinning.parts, "reason": thinning.reason}
            for thinning in plan.drop
        ],
        "freed_bytes": plan.freed_bytes,
    }


# --- what if -------------------------------------------------------------------------------------------------------


def _what_if(run: Run, rules: Sequence[Rule], price: float | None) -> Answer:
    simulated = what_if(run.events(), rules, typical_size(run.manifests()), also=run.rules())
    return Answer(_replay_json(run, simulated, price), lambda console: _print_replay(console, run, simulated, price))


def _print_replay(console: Console, run: Run, simulated: WhatIf, price: float | None) -> None:
    rules = " ".join(rule.text for rule in simulated.rules)
    console.print(
        f"[bold]{escape(run.name)}[/], {simulated.reports} reports, under {escape(rules)}: {simulated.saves} saved, "
        f"{len(simulated.kept)} kept at the end, {simulated.most} at most at one time"
    )
    moments = Column("kept", [moment_text(kept.moment) for kept in simulated.kept], right=False)
    reasons = [claims_text(kept.claims) for kept in simulated.kept]
    console.print(tables.with_reasons(console, [moments], [], "why", reasons))
    cost = "" if price is None else f" ({money(simulated.bytes_kept / GB * price)} a month at {price:g} a GB)"
    console.print(
        f"at {size_text(simulated.size_bytes)} a checkpoint: {size_text(simulated.bytes_kept)} kept{cost}, "
        f"{size_text(simulated.bytes_written)} written"
    )
    for peak in simulated.peaks:
        verdict = "[green]kept[/]" if peak.survives else "[bold red]lost[/]"
        value = number(peak.moment.metrics[peak.metric])
        console.print(
            f"best {escape(peak.metric)} ({peak.mode}): {value} at {moment_text(peak.moment)}, would be {verdict}"
        )


def _replay_json(run: Run, simulated: WhatIf, price: float | None) -> dict[str, Any]:
    def moment(point: Any) -> dict[str, Any]:
        return {"step": point.step, "epoch": point.epoch, "metrics": dict(point.metrics)}

    return {
        "run": run.name,
        "rules": [rule.text for rule in simulated.rules],
        "reports": simulated.reports,
        "saves": simulated.saves,
        "most": simulated.most,
        "kept": [moment(kept.moment) | {"claims": [asdict(claim) for claim in kept.claims]} for kept in simulated.kept],
        "checkpoint_bytes": simulated.size_bytes,
        "bytes_kept": simulated.bytes_kept,
        "bytes_written": simulated.bytes_written,
        "per_month": None if price is None else simulated.bytes_kept / GB * price,
        "peaks": [
            {"metric": peak.metric, "mode": peak.mode, "survives": peak.survives} | moment(peak.moment)
            for peak in simulated.peaks
        ],
    }


# --- pin, unpin, record --------------------------------------------------------------------------------------------


@click.command()
@ROOT
@REF
@click.option("--why", required=True, help="The reason, for people.")
@answers
def pin(root: Path, ref: str, why: str) -> Answer:
    """Protect a checkpoint from the rules, also while its run is training."""
    run, manifest = open_repository(root).locate(ref)
    run.pin(f"{run.name}/{manifest.name}", why)
    return _annotated(run, manifest, "is pinned")


@click.command()
@ROOT
@REF
@answers
def unpin(root: Path, ref: str) -> Answer:
    """Remove the pin of a checkpoint, so that only rules keep it."""
    run, manifest = open_repository(root).locate(ref)
    run.unpin(f"{run.name}/{manifest.name}")
    return _annotated(run, manifest, "is not pinned")


@click.command()
@ROOT
@REF
@click.argument("values", metavar="METRIC=VALUE...", nargs=-1, required=True)
@click.option("--part", help="The part that was measured, such as ema.")
@click.option("--source", default="by hand", help="What measured it.")
@answers
def record(root: Path, ref: str, values: tuple[str, ...], part: str | None, source: str) -> Answer:
    """Add metrics that were measured after the save; rules use them at once."""
    run, manifest = open_repository(root).locate(ref)
    run.record(f"{run.name}/{manifest.name}", dict(map(_measurement, values)), part=part, source=source)
    return _annotated(run, manifest, f"has {', '.join(values)}")


def _measurement(text: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    try:
        if equals:
            return name, float(value)
    except ValueError:
        pass
    raise ConfigError(f"{text!r} is not a measurement; give METRIC=VALUE, such as accuracy=0.74")


def _annotated(run: Run, manifest: Manifest, change: str) -> Answer:
    def data() -> object:
        annotated = next(candidate for candidate in run.annotated(()) if candidate.id == manifest.id)
        return manifest_json(annotated, run.kept().get(manifest.id, ()))

    return Answer(data, f"{ref(manifest)} {change}")
