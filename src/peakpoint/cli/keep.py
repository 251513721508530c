"""The commands ``keep``, ``pin``, ``unpin`` and ``record``: what rules keep of a run, and what they know."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from peakpoint.cli import tables
from peakpoint.cli.command import REF, ROOT, RUN, UNDO_FOR, Answer, command, confirmed, rules_help
from peakpoint.cli.render import claims_text, count, fields, literal, manifest_json, money, number, ref, undo_hint
from peakpoint.cli.terminal import say
from peakpoint.errors import ConfigError, StoreError
from peakpoint.format.amounts import size_text
from peakpoint.format.events import Reported
from peakpoint.format.manifest import Manifest
from peakpoint.format.names import did_you_mean
from peakpoint.repository import maintenance
from peakpoint.repository.packs import check_not_archived
from peakpoint.repository.root import open_repository
from peakpoint.repository.run import Run
from peakpoint.rules import Rule, check_ranking_metrics, moment_text, parse_all
from peakpoint.rules.retention import RetentionPlan
from peakpoint.rules.simulate import WhatIf, typical_size, what_if

GB = 1e9


@command(
    ROOT,
    RUN,
    needs={"--price": "--what-if"},
    without={"--yes": "--what-if", "--dry-run": "--what-if", "--undo-for": "--what-if"},
)
@click.option("--rules", "text", help=rules_help("those in force"))
@click.option("--what-if", is_flag=True, help="Simulate the rules on the recorded history, from the first report on.")
@click.option("--price", type=click.FloatRange(min=0), help="With --what-if: price of a GB in a month.")
@UNDO_FOR
@confirmed
def keep(
    root: Path, name: str, text: str | None, price: float | None, undo_for: timedelta, *, what_if: bool, apply: bool
) -> Answer:
    """Show what rules keep of a run, why, and what they would remove.

    With --yes it is removed, and the rules given with --rules are in force from then on.
    """
    run = open_repository(root).run(name)
    rules = run.rules() if text is None else parse_all(text)
    if not rules and text is not None:
        raise ConfigError("--rules is empty; give rules such as last:3")
    if not rules:
        raise ConfigError(f"no rules: run {name!r} has none in force; give some with --rules, such as last:3")
    if text is not None:
        _check_names(run, rules)
    if what_if:
        return _what_if(run, rules, price)
    manifests = run.manifests()
    check_not_archived(run.store, name, manifests)
    plan = run.plan(rules)
    data = _plan_json(run, manifests, rules, plan)
    failures: list[str] = []
    if apply:
        failures = maintenance.apply_plan(run, plan, rules if text is not None else None, undo_for=undo_for)
    data |= {"applied": apply, "failures": failures}

    def show_plan(console: Console) -> None:
        console.print(f"[bold]{literal(run.name)}[/] under {literal(' '.join(rule.text for rule in rules))}")
        _print_checkpoints(console, manifests, plan)
        say(_outcome(root, plan, failures, undo_for, apply=apply))

    return Answer(data, show_plan, failures, StoreError.exit_code if failures else 0)


def _check_names(run: Run, rules: Sequence[Rule]) -> None:
    """Refuse a metric that no report and no checkpoint of the run has, and a part that no checkpoint has."""
    parts = list(dict.fromkeys(part for manifest in run.manifests() for part in manifest.parts))
    for rule in rules if parts else ():
        for part in rule.needs or ():
            if part not in parts:
                hint = did_you_mean(part, parts)
                raise ConfigError(f"rule {rule.text} needs a part {part!r}, which no checkpoint of the run has{hint}")
    reported = [event.metrics for event in run.events() if isinstance(event, Reported)]
    measured = [manifest.metrics for manifest in run.annotated(())]
    check_ranking_metrics(rules, {name for metrics in reported + measured for name in metrics})


def _outcome(root: Path, plan: RetentionPlan, failures: Sequence[str], undo_for: timedelta, *, apply: bool) -> str:
    if not plan.remove and not plan.drop:
        return "nothing to remove"
    if not apply:
        return "nothing is removed yet; add --yes to remove"
    parts = f", parts of {count(len(plan.drop), 'checkpoint')} permanently" if plan.drop else ""
    failed = f"; {len(failures)} failed" if failures else ""
    line = f"removed {count(len(plan.remove), 'checkpoint')}{parts}{failed}"
    refs = [ref(removal.manifest) for removal in plan.remove]
    return f"{line}\n{undo_hint(root, refs, undo_for)}" if refs else line


def _print_checkpoints(console: Console, manifests: Sequence[Manifest], plan: RetentionPlan) -> None:
    removed = {removal.manifest.id: literal(removal.reason) for removal in plan.remove}
    dropped = {thinning.manifest.id: ", ".join(thinning.parts) for thinning in plan.drop}

    def verdict(manifest: Manifest) -> str:
        if manifest.id in removed:
            return "[red]removed[/]"
        parts = dropped.get(manifest.id)
        return f"[yellow]loses {literal(parts)} permanently[/]" if parts else "[green]kept[/]"

    if manifests:
        columns = [
            tables.Column("checkpoint", [literal(manifest.name) for manifest in manifests], right=False),
            tables.Column("", list(map(verdict, manifests)), right=False),
            tables.Column("size", [size_text(manifest.size_bytes) for manifest in manifests]),
        ]
        reasons = [removed.get(manifest.id) or claims_text(plan.keep.get(manifest.id, ())) for manifest in manifests]
        console.print(tables.with_reasons(console, columns, ["size"], "why", reasons))
    kept_bytes = sum(manifest.size_bytes for manifest in manifests) - plan.freed_bytes
    console.print(
        f"{len(manifests) - len(plan.remove)} of {count(len(manifests), 'checkpoint')} kept, {size_text(kept_bytes)}; "
        f"the rest frees {size_text(plan.freed_bytes)}"
    )


def _plan_json(run: Run, manifests: Sequence[Manifest], rules: Sequence[Rule], plan: RetentionPlan) -> dict[str, Any]:
    kept = [manifest for manifest in manifests if manifest.id in plan.keep]
    return {
        "run": run.name,
        "rules": [rule.text for rule in rules],
        "stays": [manifest_json(manifest, plan.keep[manifest.id]) for manifest in kept],
        "goes": [manifest_json(removal.manifest, ()) | {"reason": removal.reason} for removal in plan.remove],
        "drops": [{"ref": ref(thinning.manifest)} | fields(thinning, "parts", "reason") for thinning in plan.drop],
        "freed_bytes": plan.freed_bytes,
    }


# --- what if -------------------------------------------------------------------------------------------------------


def _what_if(run: Run, rules: Sequence[Rule], price: float | None) -> Answer:
    simulated = what_if(run.events(), rules, typical_size(run.manifests()), also=run.rules())
    return Answer(_replay_json(run, simulated, price), lambda console: _print_replay(console, run, simulated, price))


def _print_replay(console: Console, run: Run, simulated: WhatIf, price: float | None) -> None:
    rules = " ".join(rule.text for rule in simulated.rules)
    console.print(
        f"[bold]{literal(run.name)}[/], {simulated.reports} reports, under {literal(rules)}: {simulated.saves} saved, "
        f"{len(simulated.kept)} kept at the end, {simulated.most} at most at one time"
    )
    moments = tables.Column("kept", [moment_text(kept.moment) for kept in simulated.kept], right=False)
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
            f"best {literal(peak.metric)} ({peak.mode}): {value} at {moment_text(peak.moment)}, would be {verdict}"
        )


def _replay_json(run: Run, simulated: WhatIf, price: float | None) -> dict[str, Any]:
    def moment(manifest: Manifest) -> dict[str, Any]:
        return fields(manifest, "step", "epoch", "metrics")

    return fields(simulated, "reports", "saves", "most", "bytes_kept", "bytes_written") | {
        "run": run.name,
        "rules": [rule.text for rule in simulated.rules],
        "kept": [moment(kept.moment) | {"claims": kept.claims} for kept in simulated.kept],
        "checkpoint_bytes": simulated.size_bytes,
        "per_month": None if price is None else simulated.bytes_kept / GB * price,
        "peaks": [fields(peak, "metric", "mode", "survives") | moment(peak.moment) for peak in simulated.peaks],
    }


# --- pin, unpin, record --------------------------------------------------------------------------------------------


@command(ROOT, REF)
@click.option("--why", required=True, help="The reason, for people.")
def pin(root: Path, ref: str, why: str) -> Answer:
    """Protect a checkpoint from the rules, also while its run is training."""
    run, manifest = open_repository(root).locate(ref)
    run.pin(f"{run.name}/{manifest.name}", why)
    return _annotated(run, manifest, "is pinned")


@command(ROOT, REF)
def unpin(root: Path, ref: str) -> Answer:
    """Remove the pin of a checkpoint, so that only rules keep it."""
    run, manifest = open_repository(root).locate(ref)
    pinned = any(claim.rule == "protection:pinned" for claim in run.kept().get(manifest.id, ()))
    run.unpin(f"{run.name}/{manifest.name}")
    return _annotated(run, manifest, "is no longer pinned" if pinned else "was not pinned")


@command(
    ROOT,
    REF,
    click.argument("values", metavar="[METRIC=VALUE]...", nargs=-1),
    without={"--part": "--remove", "--source": "--remove"},
)
@click.option("--part", help="The part that was measured, such as ema.")
@click.option("--source", default="by hand", help="What measured it.")
@click.option("--remove", "names", multiple=True, metavar="METRIC", help="Take its recorded values back; repeatable.")
def record(
    root: Path, ref: str, values: tuple[str, ...], names: tuple[str, ...], part: str | None, source: str
) -> Answer:
    """Add metrics that were measured after the save, or take them back; rules use them at once."""
    run, manifest = open_repository(root).locate(ref)
    exact = f"{run.name}/{manifest.name}"
    if not names:
        run.record(exact, dict(map(_measurement, values)), part=part, source=source)
        return _annotated(run, manifest, f"has {', '.join(values)}")
    if values:
        raise ConfigError("--remove takes measurements back and METRIC=VALUE adds them: do one after the other")
    run.withdraw(exact, *names)
    return _annotated(run, manifest, f"has its recorded {', '.join(names)} no more")


def _measurement(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    if "," in value and "=" in value:
        apart = text.replace(",", " ")
        raise ConfigError(f"{text!r} holds several measurements; separate them by spaces: {apart}")
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
