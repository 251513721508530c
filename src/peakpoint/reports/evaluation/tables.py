"""What was found, as tables of text that a terminal, a page or a file shows in its own way."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peakpoint.format.amounts import moment_label, size_text
from peakpoint.reports.evaluation.compressed import CompressedComparison, ModelSize
from peakpoint.reports.evaluation.downsample import sparkline, thin
from peakpoint.reports.evaluation.groups import Grouping
from peakpoint.reports.evaluation.noise import Interval
from peakpoint.reports.evaluation.peaks import RunPeak
from peakpoint.reports.evaluation.run_data import RunData
from peakpoint.reports.evaluation.sparsity import BestAtTarget, Tradeoff

if TYPE_CHECKING:
    from peakpoint.reports.evaluation import Evaluation

PEAKS = "Peak against last"
CURVE = "curve"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTable:
    """Rows of text; nothing is escaped yet.

    Attributes:
        title: what it shows.
        columns: the heads; one that begins with ``>`` stands over numbers.
        rows: the cells.
        notes: how to read it, a sentence each.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """Each head, and whether numbers stand below it."""
        return [(column.removeprefix(">"), column.startswith(">")) for column in self.columns]

    def without(self, head: str) -> "ReportTable":
        """The same without a column."""
        left = [at for at, (title, _) in enumerate(self.heads) if title != head]
        rows = tuple(tuple(cells[at] for at in left) for cells in self.rows)
        return replace(self, columns=tuple(self.columns[at] for at in left), rows=rows)


def printable(text: str) -> str:
    r"""Text from users without what moves a cursor, reorders a line or cannot be seen.

    Example:
        >>> printable("val" + chr(0x9b) + "acc")
        'val\\x9bacc'
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def number(value: float | None) -> str:
    """Five significant digits; nothing for None."""
    return "" if value is None else f"{value:.5g}"


def signed(value: float) -> str:
    """Three significant digits with their sign."""
    return f"{value:+.3g}" if math.isfinite(value) else str(value)


def tables(found: "Evaluation") -> list[ReportTable]:
    """Every table that has a row."""
    materials = {one.name: one for one in found.runs}
    every = [
        _table("Runs", [_run_row(one, found.optimizers[one.name]) for one in found.runs]),
        _table(PEAKS, [_peak_row(one, materials[one.run]) for one in found.peaks], _peak_notes(found.peaks)),
        *(_group(grouping) for grouping in found.groups if len(grouping.groups) > 1),
        *(table for one in found.tradeoffs for table in _tradeoff(one)),
        *map(_comparison, found.comparisons),
    ]
    return [table for table in every if table.rows]


Row = Sequence[tuple[str, str]]
"""Each head with its cell."""


def _table(title: str, rows: Iterable[Row], notes: Iterable[str] = ()) -> ReportTable:
    listed = list(rows)
    columns = tuple(head for head, _ in listed[0]) if listed else ()
    cells = tuple(tuple(cell for _, cell in row) for row in listed)
    return ReportTable(title=title, columns=columns, rows=cells, notes=tuple(notes))


def _run_row(one: RunData, optimizer: str) -> Row:
    last = one.history[-1] if one.history else None
    return (
        ("run", one.name),
        ("optimizer", optimizer),
        (">reports", str(len(one.history))),
        (">last at", moment_label(last.step, last.epoch) if last else ""),
        (">saved / kept", f"{len(one.saved)} / {len(one.checkpoints)}"),
        (">size", size_text(sum(one.packed.get(manifest.id, manifest.size_bytes) for manifest in one.checkpoints))),
        ("ended", _ended(one)),
    )


def _ended(material: RunData) -> str:
    if material.writer is not None:
        return f"not yet: being written by {material.writer}"
    if material.ended is None:
        return "no word of an end: killed?" if material.history else ""
    return "in good order" if material.ended == "closed" else material.ended


def _peak_row(one: RunPeak, material: RunData) -> Row:
    peak, noise = one.peak, one.noise
    lost = "nothing" if peak.lost == 0 else f"{peak.lost:.3g}" if math.isfinite(peak.lost) else "?"
    chance = "" if one.margin is None or one.by_chance is None else f"{one.by_chance:.2g}, {one.margin:.2g}"
    points = list(enumerate(material.series(peak.metric)))
    return (
        ("run", one.run),
        ("metric", f"{one.label} {peak.mode}"),
        (CURVE, sparkline([value for _, value in thin(points, 200)], 12) if one.window == 1 else ""),
        (">best", number(peak.best) + (f" ± {noise.se:.2g}" if noise else "")),
        (">at", moment_label(peak.best_step, peak.best_epoch)),
        (">last", number(peak.last)),
        (">at", moment_label(peak.last_step, peak.last_epoch)),
        (">lost", lost),
        (">by chance", chance),
        (">as good", "" if one.contenders is None else f"{one.contenders} of {peak.count}"),
        ("verdict", one.verdict),
        ("checkpoint", _where(one, material)),
    )


def _where(one: RunPeak, material: RunData) -> str:
    """A short ref of the best moment's checkpoint, or what there is instead."""
    short = {f"{each.run}/{each.name}": f"{each.run}/{each.id[:8]}" for each in material.checkpoints}
    if one.checkpoint is not None:
        return short[one.checkpoint]
    gone = "removed" if one.saved else "never saved"
    if one.nearest is None:
        return gone
    ref, value = one.nearest
    if value == one.peak.best:
        return f"{gone}; {short[ref]} is as good"
    return f"{gone}; the best kept is {short[ref]} with {number(value)}"


def _peak_notes(peaks: Iterable[RunPeak]) -> Iterator[str]:
    known = [one for one in peaks if one.margin is not None]
    if known:
        yield (
            "All in the metric's unit. By chance: how far the best of so many equal values lies above the others on "
            "average, and how far it lies above the last in 19 of 20 cases. As good: how many are that near the best. "
            "The best was chosen for being the best, so expect less of it on new data."
        )
    for source in dict.fromkeys(one.noise.source for one in known if one.noise):
        yield f"± of {_which(known, source)} is the standard error of one value: {source}."
    runs: dict[tuple[str, str], list[str]] = {}
    for one in peaks:
        text = one.why if one.verdict in ("noise unknown", "not finite") else one.aside
        if text:
            runs.setdefault((one.label, text), []).append(one.run)
    for (label, text), names in runs.items():
        yield f"{few(names)}, {label}: {text}."


def _which(known: Iterable[RunPeak], source: str) -> str:
    """The metrics whose noise has this source, with their runs where it is not that of all."""
    runs: dict[str, dict[str, bool]] = {}
    for one in known:
        runs.setdefault(one.label, {})[one.run] = one.noise is not None and one.noise.source == source
    return "; ".join(
        label if all(having.values()) else f"{label} in {few([run for run, has in having.items() if has])}"
        for label, having in runs.items()
        if any(having.values())
    )


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are.

    Example:
        >>> few(["a", "b", "c", "d", "e", "f", "g"])
        'a, b, c, d, e and 2 more'
    """
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _group(grouping: Grouping) -> ReportTable:
    by = grouping.by if grouping.by == "optimizer" else "group"
    rows = [
        (
            (by, group.name),
            (">runs", str(len(group.runs))),
            (
                ">mean best ± spread",
                number(group.best) + ("" if group.best_spread is None else f" ± {group.best_spread:.2g}"),
            ),
            (">best run", number(group.best_of_all)),
            (">mean last", number(group.last)),
            (">mean lost", number(group.lost)),
            (
                ">against the first",
                "the best mean" if group is grouping.groups[0] else interval_text(group.against) or "not known",
            ),
        )
        for group in grouping.groups
    ]
    note = f"{grouping.note[:1].upper()}{grouping.note[1:]}."
    return _table(f"{grouping.metric} ({grouping.mode}) by {grouping.by}", rows, [note])


def interval_text(interval: Interval | None) -> str:
    """``"-0.02 (-0.05 to +0.01)"``."""
    if interval is None:
        return ""
    return f"{signed(interval.difference)} ({signed(interval.low)} to {signed(interval.high)})"


def _tradeoff(found: Tradeoff) -> Iterator[ReportTable]:
    without = {at.run for at in found.targets} - {spot.run for spot in found.dense}
    notes = [f"{run} has no dense checkpoint to compare with." for run in sorted(without)]
    rows = [_target_row(at, found) for at in found.targets]
    yield _table(f"{found.metric} ({found.mode}) at each {found.sparsity}", rows, notes)
    front = sorted((spot for spot in found.spots if spot.on_front), key=lambda spot: spot.sparsity)
    yield _table(
        f"The front of {found.metric} ({found.mode}) and {found.sparsity} (max)",
        [
            (
                (f">{found.sparsity}", number(one.sparsity)),
                (f">{found.metric}", number(one.value)),
                (">at", moment_label(one.step, one.epoch)),
                ("checkpoint", one.ref),
            )
            for one in front
        ],
        [f"{len(front)} of {len(found.spots)} checkpoints: no other is at least as good in both and better in one."],
    )


def _target_row(at: BestAtTarget, found: Tradeoff) -> Row:
    spot = at.spot
    cost = "" if at.cost is None or spot in found.dense else signed(-at.cost if found.mode == "max" else at.cost)
    return (
        ("run", at.run),
        (f">{found.sparsity} wanted", f"{at.target:g} ± {at.tolerance:g}"),
        (">has", "" if spot is None else number(spot.sparsity)),
        (f">best {found.metric}", "" if spot is None else number(spot.value)),
        (">against dense", cost),
        ("checkpoint", "none at this sparsity" if spot is None else spot.ref),
    )


def _comparison(found: CompressedComparison) -> ReportTable:
    one, other = found.original, found.compressed
    rows = [("checkpoint", one.ref, other.ref, "")]
    for item in found.differences:
        both = number(item.original), number(item.compressed)
        rows.append((item.metric, *both, interval_text(item.interval) or signed(item.compressed - item.original)))
    rows += _weight_rows(one, other)
    sources: dict[str, list[str]] = {}
    for item in found.differences:
        if item.interval is not None:
            sources.setdefault(item.source, []).append(item.metric)
    notes = [
        f"The interval of {few(metrics)} is one of 95 %, as if each was measured on other examples: {source}."
        for source, metrics in sources.items()
    ]
    if any(weight.nonzero is not None for weight in (one, other)):
        notes.append(
            "As sparse storage: an estimate, a bit for each parameter and the values that are not zero; no such file "
            "was written."
        )
    counted = dict.fromkeys(weight.source for weight in (one, other))
    notes += [f"Non-zero parameters of {one.part}: {source}." for source in counted]
    columns = ("", "original", "compressed", ">difference or share")
    return ReportTable(
        title=f"Compressed against original: {found.why}", columns=columns, rows=tuple(rows), notes=tuple(notes)
    )


def _weight_rows(one: ModelSize, other: ModelSize) -> Iterator[tuple[str, str, str, str]]:
    figures: tuple[tuple[str, str, Callable[[int], str]], ...] = (
        (f"parameters of {one.part}", "parameters", "{:,}".format),
        ("not zero", "nonzero", "{:,}".format),
        (f"bytes of {one.part}", "part_bytes", size_text),
        ("as sparse storage (estimate)", "sparse_bytes", size_text),
        ("all files", "files_bytes", size_text),
        ("in the archive", "packed_bytes", size_text),
    )
    for what, name, show in figures:
        before, after = getattr(one, name), getattr(other, name)
        if name != "packed_bytes" or before is not None or after is not None:
            shown = ["not known" if count is None else show(count) for count in (before, after)]
            share = f"{after / before:.1%}" if before and after is not None else ""
            yield what, shown[0], shown[1], share
