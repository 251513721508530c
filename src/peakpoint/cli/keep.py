"""Commands about what stays and why: keep, explain, pin, unpin, record."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from peakpoint.cli import alias_marks, render, tables
from peakpoint.cli.arguments import JSON, REF, ROOT, UNDO_FOR, rules_help
from peakpoint.cli.tables import Column
from peakpoint.errors import ConfigError, NotFoundError, StoreError
from peakpoint.format import layout
from peakpoint.format.events import Measured, Reported
from peakpoint.format.manifest import Manifest
from peakpoint.reports.explain import CheckpointHistory, checkpoint_histories
from peakpoint.repository import maintenance
from peakpoint.repository.annotations import all_with_annotations
from peakpoint.repository.packs import check_not_archived, packed_bytes
from peakpoint.repository.refs import AtEpoch, AtStep, ByName, parse
from peakpoint.repository.root import open_repository
from peakpoint.repository.run import Run
from peakpoint.repository.trash import dropped_parts
from peakpoint.rules import Rule, check_ranking_metrics, moment_text, parse_all
from peakpoint.rules.retention import RetentionPlan
from peakpoint.rules.simulate import Replay, replay, typical_size

GB = 1e9


# --- keep ---------------------------------------------------------------------------------------------------------


@click.command()
@ROOT
@click.argument("name", metavar="RUN")
@click.option("--rules", "text", help=rules_help("those in force"))
@click.option("--yes", is_flag=True, help="Remove; without it only the plan is shown.")
@click.option("--dry-run", is_flag=True, help="Show the plan and remove nothing, also with --yes.")
@UNDO_FOR
@click.option("--what-if", is_flag=True, help="Replay the recorded history under the rules, from the first report on.")
@click.option("--price", type=click.FloatRange(min=0), help="Of a GB in a month: says what that costs.")
@JSON
def keep(
    root: Path,
    name: str,
    *,
    text: str | None,
    yes: bool,
    dry_run: bool,
    undo_for: timedelta,
    what_if: bool,
    price: float | None,
    json: bool,
) -> None:
    """Say what rules keep of a run, why, and what they would remove; carry it out with --yes."""
    run = open_repository(root).run(name)
    rules = run.rules() if text is None else parse_all(text)
    if not rules:
        raise ConfigError(f"no rules: run {name!r} has none in force; give some with --rules, such as last:3")
    if text is not None:
        _check_metrics(run, rules)
    if what_if:
        _what_if(run, rules, price, json=json)
        return
    check_not_archived(run.store, name, run.manifests())
    decided = run.plan(rules)
    apply_now = yes and not dry_run
    failures: list[str] = []
    if not json:
        _print_plan(run, rules, decided)
    if apply_now:
        failures = maintenance.apply_plan(run, decided, rules if text is not None else None, undo_for=undo_for)
    if json:
        render.as_json(_plan_json(run, rules, decided, failures, applied=apply_now))
    elif not decided.remove and not decided.drop:
        click.echo("nothing would go")
    elif apply_now:
        _print_done(root, run, decided, failures, undo_for)
    else:
        click.echo("nothing is removed yet; add --yes to remove")
    _leave_with(failures)


def _check_metrics(run: Run, rules: Sequence[Rule]) -> None:
    """Refuse a metric that no report and no checkpoint of the run has."""
    reported = (event.metrics for event in run.events() if isinstance(event, Reported))
    check_ranking_metrics(
        rules, {name for metrics in (*reported, *(one.metrics for one in run.known(()))) for name in metrics}
    )


def _leave_with(failures: Sequence[str]) -> None:
    for failure in failures:
        click.echo(f"peakpoint: {failure}", err=True)
    if failures:
        raise SystemExit(StoreError.exit_code)


def _print_done(root: Path, run: Run, decided: RetentionPlan, failures: Sequence[str], undo_for: timedelta) -> None:
    parts = f", dropped parts of {len(decided.drop)} for good" if decided.drop else ""
    failed = f"; {len(failures)} failed" if failures else ""
    click.echo(f"removed {render.count(len(decided.remove), 'checkpoint')}{parts}{failed}")
    if decided.remove:
        gone = [f"{run.name}/{removal.manifest.name}" for removal in decided.remove]
        click.echo(render.undo_hint(root, gone, undo_for))


def _print_plan(run: Run, rules: Sequence[Rule], decided: RetentionPlan) -> None:
    console = render.console()
    console.print(f"[bold]{escape(run.name)}[/] under {escape(' '.join(rule.text for rule in rules))}")
    manifests = run.manifests()
    going = {removal.manifest.id: removal for removal in decided.remove}
    losing = {thinning.manifest.id: ", ".join(thinning.parts) for thinning in decided.drop}
    marks, whys = [], []
    for manifest in manifests:
        lost, removal = losing.get(manifest.id), going.get(manifest.id)
        stays = "[green]stays[/]" if lost is None else f"[yellow]loses {escape(lost)} for good[/]"
        marks.append(stays if removal is None else "[red]goes[/]")
        claims = decided.keep.get(manifest.id, ())
        whys.append(render.claims_text(claims) if removal is None else escape(removal.reason))
    columns = [
        Column("checkpoint", [escape(manifest.name) for manifest in manifests], right=False),
        Column("", marks, right=False),
        Column("size", [render.size(manifest.size_bytes) for manifest in manifests]),
    ]
    if manifests:
        console.print(tables.with_reasons(console, columns, ["size"], "why", whys))
    total = sum(manifest.size_bytes for manifest in manifests)
    console.print(
        f"{len(manifests) - len(going)} of {render.count(len(manifests), 'checkpoint')} stay, "
        f"{render.size(total - decided.freed_bytes)}; {render.size(decided.freed_bytes)} would be freed"
    )


def _plan_json(
    run: Run, rules: Sequence[Rule], decided: RetentionPlan, failures: Sequence[str], *, applied: bool
) -> dict[str, Any]:
    keep = decided.keep
    drops = [
        {"ref": f"{run.name}/{one.manifest.name}", "parts": one.parts, "reason": one.reason} for one in decided.drop
    ]
    return {
        "run": run.name,
        "rules": [rule.text for rule in rules],
        "stays": [render.manifest_json(one, keep[one.id]) for one in run.manifests() if one.id in keep],
        "goes": [render.manifest_json(removal.manifest, ()) | {"reason": removal.reason} for removal in decided.remove],
        "drops": drops,
        "freed_bytes": decided.freed_bytes,
        "applied": applied,
        "failures": list(failures),
    }


def _what_if(run: Run, rules: Sequence[Rule], price: float | None, *, json: bool) -> None:
    events = run.events()
    found = replay(events, rules, typical_size(run.manifests()), also=run.rules())
    if json:
        render.as_json(_replay_json(run, found, price))
        return
    console = render.console()
    console.print(
        f"[bold]{escape(run.name)}[/], {found.reports} reports, under {escape(' '.join(r.text for r in found.rules))}: "
        f"{found.saves} would have been saved, {len(found.kept)} kept, {found.most} at most at one time"
    )
    kept = Column("kept", [moment_text(one.moment) for one in found.kept], right=False)
    console.print(
        tables.with_reasons(console, [kept], [], "why", [render.claims_text(one.claims) for one in found.kept])
    )
    costs = "" if price is None else f" ({render.money(found.bytes_kept / GB * price)} a month at {price:g} a GB)"
    console.print(
        f"at {render.size(found.size_bytes)} a checkpoint: {render.size(found.bytes_kept)} kept{costs}, "
        f"{render.size(found.bytes_written)} written"
    )
    for peak in found.peaks:
        verdict = "[green]survives[/]" if peak.survives else "[bold red]would be lost[/]"
        value = render.number(peak.moment.metrics[peak.metric])
        console.print(
            f"the best {escape(peak.metric)} ({peak.mode}) was {value} at {moment_text(peak.moment)}: it {verdict}"
        )


def _replay_json(run: Run, found: Replay, price: float | None) -> dict[str, Any]:
    def moment(given: Any) -> dict[str, Any]:
        return {"step": given.step, "epoch": given.epoch, "metrics": dict(given.metrics)}

    return {
        "run": run.name,
        "rules": [rule.text for rule in found.rules],
        "reports": found.reports,
        "saves": found.saves,
        "most": found.most,
        "kept": [moment(one.moment) | {"claims": [asdict(claim) for claim in one.claims]} for one in found.kept],
        "checkpoint_bytes": found.size_bytes,
        "bytes_kept": found.bytes_kept,
        "bytes_written": found.bytes_written,
        "per_month": None if price is None else found.bytes_kept / GB * price,
        "peaks": [
            {"metric": peak.metric, "mode": peak.mode, "survives": peak.survives} | moment(peak.moment)
            for peak in found.peaks
        ],
    }


# --- explain ------------------------------------------------------------------------------------------------------


@click.command()
@ROOT
@REF
@JSON
def explain(root: Path, ref: str, *, json: bool) -> None:
    """Say why a checkpoint is here, or why and when it went and what beat it."""
    repository = open_repository(root)
    if ref.startswith("@"):
        manifest = repository.find_manifest(ref)
        ref = f"{manifest.run}/{manifest.id}"
    run = repository.run(parse(ref).run)
    try:
        manifest = run.find_manifest(ref)
    except NotFoundError as error:
        life = _gone(run, ref)
        if life is None:
            raise NotFoundError(f"{error}; the journal knows of no removed one either") from error
        there = {entry.manifest.id: entry.record.until for entry in maintenance.in_trash(run)}
        _explain_gone(root, run, life, there.get(life.saved.checkpoint), json=json)
        return
    _explain_here(run, manifest, json=json)


def _gone(run: Run, ref: str) -> CheckpointHistory | None:
    """The removed checkpoint that a ref names; the last one of several."""

    def is_here(life: CheckpointHistory) -> bool:  # damaged, or its removal came to nothing
        return life.removed is None and run.store.size(layout.manifest_key(run.name, life.saved.name)) is not None

    removed = [life for life in checkpoint_histories(run.events()) if not is_here(life)]
    match parse(ref):
        case ByName(name=name):
            found = [life for life in removed if life.saved.name == name]
        case AtStep(step=step):
            found = [life for life in removed if life.record.step == step]
        case AtEpoch(epoch=epoch):
            found = [life for life in removed if life.record.epoch == epoch]
        case _:
            found = []
    return found[-1] if found else None


def _explain_here(run: Run, manifest: Manifest, *, json: bool) -> None:
    events = run.events()
    rules = run.rules()
    manifests = all_with_annotations(run.manifests(), events, rules)
    claims = run.kept().get(manifest.id, ())
    dropped = list(dropped_parts(run.store, run.name, manifest.name))
    late = [event for event in events if isinstance(event, Measured) and event.checkpoint == manifest.id]
    silent = [rule for rule in rules if rule.text not in {claim.rule for claim in claims}]
    names = {other.id: other.name for other in manifests}
    instead = [(rule.text, [names[found] for found in rule.claims(manifests)]) for rule in silent]
    if json:
        measured = [{"at": e.at, "metrics": dict(e.metrics), "source": e.source, "by": e.by} for e in late]
        lost = [{"at": record.at, "parts": record.parts, "reason": record.why} for record in dropped]
        extra = {"measured": measured, "claimed_instead": dict(instead), "dropped": lost}
        extra["aliases"] = alias_marks.pointing(run).get(manifest.id, ())
        render.as_json(render.manifest_json(manifest, claims) | {"exists": True} | extra)
        return
    console = render.console()
    console.print(f"[bold]{escape(manifest.run)}/{escape(manifest.name)}[/] is here ({moment_text(manifest)})")
    console.print(f"saved {manifest.created_at:%Y-%m-%d %H:%M:%S} UTC because")
    _print_lines(console, map(escape, manifest.reasons))
    console.print("kept because" if claims else "[yellow]kept by nothing: the next save of this run removes it[/]")
    _print_lines(console, map(render.claim_text, claims))
    for record in dropped:
        parts = ", ".join(record.parts)
        console.print(f"without {escape(parts)} since {record.at:%Y-%m-%d %H:%M}: {escape(record.why)}")
    packed = packed_bytes(run.store, run.name, [manifest]).get(manifest.id)
    if packed is not None:
        console.print(f"archived: {render.size(manifest.size_bytes)} in a pack of {render.size(packed)}")
    for event in late:
        console.print(f"measured {event.at:%Y-%m-%d %H:%M} UTC by {escape(event.by)}: {_values(event.metrics)}")
    for rule, claimed in instead:
        shown = ", ".join(claimed[:3]) + (f" and {len(claimed) - 3} more" if len(claimed) > 3 else "")
        console.print(f"[dim]{escape(rule)} does not claim it but {escape(shown or 'nothing')}[/]")


def _explain_gone(root: Path, run: Run, life: CheckpointHistory, until: datetime | None, *, json: bool) -> None:
    """What became of it; until when it is in the trash, if it still is."""
    removed = life.removed
    if json:
        moment = life.record if removed is None else removed
        render.as_json(
            {
                "exists": False,
                "name": life.saved.name,
                "id": life.saved.checkpoint,
                "step": moment.step,
                "epoch": moment.epoch,
                "metrics": dict(life.record.metrics),
                "saved": {"at": life.saved.at, "reasons": list(life.saved.reasons)},
                "removed": removed and {name: getattr(removed, name) for name in ("at", "reason", "by", "until")},
                "in_trash": until is not None,
                "claimed_instead": {rule: list(claimed) for rule, claimed in life.claimed_instead},
            }
        )
        return
    console = render.console()
    console.print(f"[bold]{escape(life.saved.name)}[/] is gone ({moment_text(life.record)})")
    values = _values(life.record.metrics) or "no metrics"
    console.print(f"saved {life.saved.at:%Y-%m-%d %H:%M:%S} UTC with {values} because")
    _print_lines(console, map(escape, life.saved.reasons))
    if removed is None:
        console.print(
            "the journal does not tell when it was removed, or why: the disk was full, or it was done by hand"
        )
        return
    console.print(f"removed {removed.at:%Y-%m-%d %H:%M:%S} UTC by {escape(removed.by)}: {escape(removed.reason)}")
    if until is not None:
        back = escape(render.command("undo", root, f"{run.name}/{life.saved.name}"))
        console.print(f"in the trash until {until:%Y-%m-%d %H:%M} UTC; {back} brings it back", soft_wrap=True)
    elif removed.until is not None:
        console.print("it was in the trash, and its files are gone for good")
    for rule, claimed in life.claimed_instead:
        console.print(f"  [cyan]{escape(rule)}[/] kept instead")
        more = [f"and {len(claimed) - 3} more"] if len(claimed) > 3 else []
        _print_lines(console, map(escape, [*claimed[:3], *more] or ["nothing"]), indent=4)


def _values(metrics: Mapping[str, float]) -> str:
    return escape(", ".join(f"{name} = {value:.6g}" for name, value in metrics.items()))


def _print_lines(console: Console, lines: Iterable[str], indent: int = 2) -> None:
    for line in lines:
        console.print(f"{' ' * indent}- {line}")


# --- pin, unpin, record -------------------------------------------------------------------------------------------


@click.command()
@ROOT
@REF
@click.option("--why", required=True, help="The reason, for people.")
@JSON
def pin(root: Path, ref: str, why: str, *, json: bool) -> None:
    """Protect a checkpoint from the rules, also of a training that is running."""
    run, manifest = open_repository(root).locate(ref)
    run.pin(f"{manifest.run}/{manifest.name}", why)
    _noted(run, manifest, "is pinned", json=json)


@click.command()
@ROOT
@REF
@JSON
def unpin(root: Path, ref: str, *, json: bool) -> None:
    """Let the rules have a pinned checkpoint again."""
    run, manifest = open_repository(root).locate(ref)
    run.unpin(f"{manifest.run}/{manifest.name}")
    _noted(run, manifest, "is not pinned", json=json)


@click.command()
@ROOT
@REF
@click.argument("values", metavar="METRIC=VALUE...", nargs=-1, required=True)
@click.option("--part", help="The part that was measured, such as ema.")
@click.option("--source", default="by hand", show_default=True, help="What measured it.")
@JSON
def record(root: Path, ref: str, values: tuple[str, ...], part: str | None, source: str, *, json: bool) -> None:
    """Append measurements to a checkpoint; rules see them at once."""
    run, manifest = open_repository(root).locate(ref)
    run.record(f"{manifest.run}/{manifest.name}", dict(map(_measurement, values)), part=part, source=source)
    _noted(run, manifest, f"has {', '.join(values)}", json=json)


def _measurement(text: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    try:
        if equals:
            return name, float(value)
    except ValueError:
        pass
    raise ConfigError(f"{text!r} is no measurement; give METRIC=VALUE, such as accuracy=0.74")


def _noted(run: Run, manifest: Manifest, what: str, *, json: bool) -> None:
    if json:
        known = next(seen for seen in run.known(()) if seen.id == manifest.id)
        render.as_json(render.manifest_json(known, run.kept().get(manifest.id, ())))
    else:
        click.echo(f"{manifest.run}/{manifest.name} {what}")


COMMANDS = (keep, explain, pin, unpin, record)
