"""The page of a model card, from the template ``card.md.jinja``: needs Jinja2 and PyYAML."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from peakpoint.errors import printable
from peakpoint.format.amounts import size_text
from peakpoint.format.events import Reported
from peakpoint.reports.card.front_matter import front_matter
from peakpoint.reports.card.values import MARK, AliasPeriod, ModelCard
from peakpoint.reports.changelog.markdown import code, compared, escaped
from peakpoint.rules import ranking_metrics
from peakpoint.rules.peaks import peaks

_LAST = 10  # ancestors in the lineage, and reports in the table that stands for a picture
_DIRECTIONS = {"max": "larger is better", "min": "smaller is better"}


class Markdown(str):
    """Text that is Markdown already: everything else that the template prints is escaped."""

    __slots__ = ()


def markdown(card: ModelCard, picture: str | None = None) -> str:
    """Render a card.

    Args:
        card: what ``gather`` found.
        picture: the path of the curve, relative to the page; without it a table of reports takes its place.
    """
    manifest, by = card.manifest, card.manifest.written_by
    part = "model" if "model" in manifest.parts else next(iter(manifest.parts), "model")
    metrics = [name for name, _ in ranking_metrics(card.run_data.rules)] or list(manifest.metrics)
    template = _environment().get_template("card.md.jinja")
    page = template.render(
        card=card,
        mark=Markdown(MARK),
        front_matter=Markdown(to_yaml(front_matter(card)).rstrip()),
        about=Markdown(card.description.about.strip()),
        picture=None if picture is None else Markdown(picture),
        unknown="not recorded",
        versions=_listed({name: by[name] for name in ("peakpoint", "python", "torch") if name in by}),
        signed=", ".join(f"with the key {signature.fingerprint or '?'}" for signature in card.signatures),
        metrics=list(dict.fromkeys([*manifest.metrics, *card.measured_later, *card.evaluated])),
        directions={name: _DIRECTIONS[mode] for name, mode in ranking_metrics(card.run_data.rules)},
        curves=metrics[:4],
        reports=list(_reports(card)),
        longest=_LAST,
        ref=f"{manifest.run}/{manifest.id}",
        root=PurePath(card.location).name or "runs",
        part=part,
        tensor_files=[name for name in manifest.parts.get(part, ()) if name.endswith(".safetensors")],
        part_of={file: part for part, files in manifest.parts.items() for file in files},
    )
    return page.rstrip() + "\n"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("peakpoint.reports.card", ""),
        autoescape=False,  # noqa: S701 - `finalize` escapes for Markdown, which HTML's escapes would not
        finalize=lambda value: value if isinstance(value, Markdown) else escaped(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "basename": lambda path: PurePath(path).name,
        "code": lambda text: Markdown(code(text)),
        "evidence": _evidence,
        "listed": _listed,
        "literal": _literal,
        "number": lambda value: "" if value is None else f"{value:.6g}",
        "size": size_text,
        "time": "{:%Y-%m-%d %H:%M} UTC".format,
    }
    return environment


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _literal(text: str) -> Markdown:
    """A string literal of Python, for a block of code: it cannot end the block."""
    return Markdown(json.dumps(printable(text), ensure_ascii=False).replace("```", "` ` `"))


def _reports(card: ModelCard) -> Iterator[tuple[Reported, list[str], bool]]:
    """The reports of the table: which metrics have their peak there, and whether it is this checkpoint's."""
    history, manifest = card.run_data.history, card.manifest
    peaks_at: dict[int, list[str]] = {}
    for peak in peaks(history, ranking_metrics(card.run_data.rules)):
        peaks_at.setdefault(peak.best_report, []).append(peak.metric)
    listed = {report.report for report in history[-_LAST:]} | peaks_at.keys() | {manifest.report}
    for report in history:
        if report.report in listed:
            is_this_checkpoint = (report.report, report.step) == (manifest.report, manifest.step)
            yield report, peaks_at.get(report.report, []), is_this_checkpoint


def _evidence(period: AliasPeriod) -> Markdown:
    record, previous = period.record, period.previous
    evidence = [f"validation {escaped(record.validation[:12])}" if record.validation else "no validation"]
    if record.restores:
        evidence = [f"rolled back to record {record.restores}"]
    if previous is not None and previous.target is not None:
        evidence.append(f"before it: {escaped(previous.target.run)}/{escaped(previous.target.name)}")
    if comparison := compared(record.comparison):
        evidence.append(comparison)
    evidence += [f"**forced** despite: {escaped(reason)}" for reason in record.forced]
    return Markdown("; ".join(evidence))


def to_yaml(members: dict[str, Any]) -> str:
    r"""Write front matter. What a terminal would not print as it is, is escaped.

    Example:
        >>> print(to_yaml({"name": "a: b", "numbers": [1, 1e-05], "of": "é\x85"}), end="")
        name: 'a: b'
        numbers:
        - 1
        - 1.0e-05
        of: "\xE9\N"
    """
    text = _dumped(members, allow_unicode=True)
    return text if text.replace("\n", "").isprintable() else _dumped(members, allow_unicode=False)


def _dumped(members: dict[str, Any], *, allow_unicode: bool) -> str:
    return str(yaml.safe_dump(members, sort_keys=False, allow_unicode=allow_unicode, width=math.inf))
