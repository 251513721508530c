"""A card as Markdown."""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import PurePath

from peakpoint.format.amounts import size
from peakpoint.format.events import Reported
from peakpoint.reports.card.front_matter import front_matter, yaml
from peakpoint.reports.card.values import AliasPeriod, ModelCard
from peakpoint.reports.changelog.markdown import code, compared, escaped
from peakpoint.reports.evaluation.tables import printable
from peakpoint.rules import Claim, watched
from peakpoint.rules.peaks import peaks

MARK = "<!-- peakpoint card -->"
_UNKNOWN = "not recorded"
_LAST = 10  # reports in a table where there is no picture


def markdown(card: ModelCard, picture: str | None = None) -> str:
    """The card.

    Args:
        card: what ``gather`` found.
        picture: the path of the curve, relative to the page; a table stands for it without.
    """
    sections = (
        ("", _head(card)),
        ("About", [card.description.about.strip()] if card.description.about.strip() else []),
        ("Data", [_said(card.description.data)]),
        ("Metrics", _metrics(card)),
        ("Curve", _curve(card, picture)),
        ("Why it was saved, and why it is kept", _reasons(card)),
        ("Validation", _validation(card)),
        ("Production", _production(card)),
        ("Lineage", _lineage(card)),
        ("How to load it", _loading(card)),
        ("Files", _files(card)),
        ("What could not be read", [f"- {escaped(text)}" for text in card.damage]),
    )
    lines = ["---", yaml(front_matter(card)).rstrip(), "---", "", MARK, ""]
    for title, found in sections:
        if found:
            lines += [*([f"## {title}", ""] if title else []), *found, ""]
    return "\n".join(lines).rstrip() + "\n"


def _said(text: str | None) -> str:
    return escaped(text) if text else f"{_UNKNOWN.capitalize()}."


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table; the cells are Markdown already, those with text of others escaped."""
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows)]


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _head(card: ModelCard) -> list[str]:
    manifest, by = card.manifest, card.manifest.written_by
    now = [one.record.alias for one in card.alias_periods if one.holds]
    epoch = "" if manifest.epoch is None else f"epoch {manifest.epoch} (from 0), "
    versions = ", ".join(f"{name} {by[name]}" for name in ("peakpoint", "python", "torch") if name in by)
    rows = [
        ("run", escaped(manifest.run)),
        ("checkpoint", f"{escaped(manifest.name)}, id {escaped(manifest.id)}"),
        ("taken at", f"{epoch}step {manifest.step}"),
        ("saved", f"{_time(manifest.created_at)} on {escaped(by.get('host', _UNKNOWN))}"),
        ("code", escaped(by.get("code", _UNKNOWN))),
        ("versions", escaped(versions) or _UNKNOWN),
        ("model", escaped(card.state.get("model", _UNKNOWN))),
        ("optimizer", escaped(card.state.get("optimizer", _UNKNOWN))),
        ("size", size(manifest.size_bytes)),
        ("signed", escaped(", ".join(f"with the key {one.fingerprint or '?'}" for one in card.signatures) or "no")),
        ("license", escaped(card.description.license or _UNKNOWN)),
        ("base model", escaped(card.description.base_model or _UNKNOWN)),
    ]
    if "imported_from" in by:
        rows.insert(2, ("imported from", escaped(PurePath(by["imported_from"]).name)))
    held = f" It is **{escaped(', '.join(now))}** at present." if now else ""
    title = [f"# {escaped(manifest.run)}: {escaped(manifest.name)}", ""]
    return [*title, f"One checkpoint of the run {escaped(manifest.run)}.{held}", "", *_table(("", ""), rows)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _metrics(card: ModelCard) -> list[str]:
    later = {name: value for one in card.measured for name, value in one.metrics.items()}
    modes = dict(watched(card.run_data.rules))
    names = list(dict.fromkeys([*card.manifest.metrics, *later, *card.evaluated]))
    if not names:
        return [f"{_UNKNOWN.capitalize()}."]
    rows = [
        (
            escaped(name),
            {"max": "larger is better", "min": "smaller is better"}.get(modes.get(name, ""), ""),
            _number(card.manifest.metrics.get(name)),
            _number(later.get(name)),
            _number(card.evaluated.get(name)),
        )
        for name in names
    ]
    heads = ("metric", "", "reported in training", "measured later", "in the last validation")
    sources = [f"- measured by {escaped(one.source or _UNKNOWN)}, {_time(one.at)}" for one in card.measured]
    return [*_table(heads, rows), *(["", *sources] if sources else [])]


def _curve(card: ModelCard, picture: str | None) -> list[str]:
    metrics = [name for name, _ in watched(card.run_data.rules)] or list(card.manifest.metrics)
    if picture is not None:
        return [f"![The curve of {escaped(metrics[0])}, with its peak and this checkpoint]({picture})"]
    reports = card.run_data.history
    if not reports or not metrics:
        return []
    best: dict[int, list[str]] = {}
    for peak in peaks(reports, watched(card.run_data.rules)):
        best.setdefault(peak.best_report, []).append(peak.metric)
    newest = {one.report for one in reports[-_LAST:]}
    shown = [one for one in reports if one.report in newest | best.keys() | {card.manifest.report}]
    rows = [_row(card, one, metrics[:4], best.get(one.report, ())) for one in shown]
    heads = ("epoch", "step", *map(escaped, metrics[:4]), "")
    note = f"{len(rows):,} of {len(reports):,} reports: the last ones, the peak and this checkpoint."
    hint = (
        "`peakpoint export --as card --to DIR` draws the curve of a metric that a rule ranks by, where Matplotlib is "
    )
    hint += "(`pip install 'peakpoint[report]'`)."
    return [*_table(heads, rows), "", f"{note} {hint}"]


def _row(card: ModelCard, report: Reported, metrics: Sequence[str], best: Sequence[str]) -> tuple[str, ...]:
    marks = [f"peak of {escaped(metric)}" for metric in best]
    if report.report == card.manifest.report and report.step == card.manifest.step:
        marks.append("**this checkpoint**")
    values = (_number(report.metrics.get(metric)) for metric in metrics)
    return ("" if report.epoch is None else str(report.epoch), str(report.step), *values, ", ".join(marks))


def _reasons(card: ModelCard) -> list[str]:
    saved = [f"- saved: {escaped(reason)}" for reason in card.manifest.reasons]
    kept = [f"- kept: {escaped(claim.reason)}{_by_rule(claim)}" for claim in card.claims]
    return [*saved, *(kept or ["- nothing claims it at present: it goes with the next save"])]


def _by_rule(claim: Claim) -> str:
    return "" if claim.rule.startswith("protection:") else f" ({escaped(claim.rule)})"


def _validation(card: ModelCard) -> list[str]:
    found = card.validation
    if found is None:
        return ["It was never validated."]
    outcome = "passed" if found.passed else "**failed**"
    lines = [
        f"Validation {found.number} {outcome}: {_time(found.at)}, by {escaped(found.by)}; digest {found.digest[:16]}."
    ]
    if found.manifest != card.manifest_digest:
        lines.append("**Its manifest is another one than the one that was validated.**")
    if found.against is not None:
        lines.append(
            f"Its predictions were compared with {escaped(found.alias or 'the holder')}, {escaped(found.against)}."
        )
    rows = [
        (escaped(one.check), escaped(one.outcome), escaped(one.said), f"{one.seconds:.2f} s") for one in found.findings
    ]
    lines += ["", *_table(("check", "outcome", "found", "took"), rows)]
    environment = ", ".join(f"{name} {value}" for name, value in found.environment.items())
    return [*lines, *(["", f"Environment: {escaped(environment)}."] if environment else [])]


def _production(card: ModelCard) -> list[str]:
    if not card.alias_periods:
        return ["No alias has ever pointed at it."]
    return _table(("alias", "from", "until", "by", "why", "evidence"), map(_held, card.alias_periods))


def _held(one: AliasPeriod) -> tuple[str, ...]:
    record, after = one.record, one.after
    until = "now" if one.holds else "not known"
    if after is not None:
        until = f"{_time(after.at)} ({escaped(after.kind)}: {escaped(after.why)})"
    evidence = [f"validation {escaped(record.validation[:12])}" if record.validation else "no validation"]
    if record.restores:
        evidence = [f"rolled back to record {record.restores}"]
    if one.before is not None and one.before.target is not None:
        evidence.append(f"before it: {escaped(one.before.target.run)}/{escaped(one.before.target.name)}")
    if said := compared(record.comparison):
        evidence.append(said)
    evidence += [f"**forced** although {escaped(reason)}" for reason in record.forced]
    name = f"{escaped(record.alias)} {record.number}"
    return name, _time(record.at), until, escaped(record.by), escaped(record.why), "; ".join(evidence)


def _lineage(card: ModelCard) -> list[str]:
    lines = [f"- made from {code(ref)}" for ref in card.manifest.members]
    lines += [f"- continues {code(ref)}{'' if there else ', which is gone'}" for ref, there in card.lineage[:_LAST]]
    if len(card.lineage) > _LAST:
        lines.append(f"- and {len(card.lineage) - _LAST:,} before these")
    if forks := len(card.manifest.forks):
        lines.append(f"- on the way here {forks:,} {'branch was' if forks == 1 else 'branches were'} abandoned")
    return lines or ["It continues nothing."]


def _loading(card: ModelCard) -> list[str]:
    manifest = card.manifest
    root = json.dumps(printable(PurePath(card.location).name or "runs"), ensure_ascii=False)
    part = "model" if "model" in manifest.parts else next(iter(manifest.parts), "model")
    now = next((one.record.alias for one in card.alias_periods if one.holds), None)
    ref = f"{manifest.run}/{manifest.id}"
    lines = [
        "import peakpoint as pp",
        "",
        f'weights = pp.load("{ref}", root={root})["{part}"]  # every byte is compared with its digest',
    ]
    if now is not None:
        lines.append(f'weights = pp.load("@{now}", root={root})["{part}"]  # what {now} is then')
    lines = [printable(line) for line in lines]
    tensors = [name for name in manifest.parts.get(part, ()) if name.endswith(".safetensors")]
    plain = f"Any reader of safetensors opens {', '.join(map(code, tensors))} in its directory." if tensors else ""
    return ["```python", *(line.replace("```", "` ` `") for line in lines), "```", *(["", plain] if plain else [])]


def _files(card: ModelCard) -> list[str]:
    part_of = {file: part for part, files in card.manifest.parts.items() for file in files}
    rows = [
        (
            escaped(one.name),
            escaped(part_of.get(one.name, "")),
            str(len(one.tensors)),
            size(one.size),
            escaped(one.digest),
        )
        for one in card.manifest.files
    ]
    rows.append(("manifest.json", "", "", "", card.manifest_digest))
    return _table(("file", "part", "tensors", "size", "BLAKE3"), rows)
