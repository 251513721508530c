"""The results as tables of text, which a terminal, a page or a file shows in its own way."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from peakpoint.format.amounts import moment_label, size_text
from peakpoint.format.names import listing
from peakpoint.reports.evaluation.compressed import CompressedComparison, ModelSize
from peakpoint.reports.evaluation.downsample import sparkline, thin
from peakpoint.reports.evaluation.groups import Grouping, RunGroup
from peakpoint.reports.evaluation.noise import Interval
from peakpoint.reports.evaluation.peaks import RunPeak
from peakpoint.reports.evaluation.result import Evaluation
from peakpoint.reports.evaluation.run_data import RunData
from peakpoint.reports.evaluation.sparsity import BestAtTarget, SparsityPoint, Tradeoff

PEAKS = "Best against last"
CURVE = "curve"
MOST_RUNS = 20  # shown at once
_MOST_SETTINGS = 8
NOISE_UNKNOWN = "unknown: pass --n-eval"

Row = Sequence[tuple[str, str]]
"""Each head with its cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTable:
    """Rows of text, not escaped yet.

    Attributes:
        title: of the whole table.
        columns: the heads; one that begins with ``>`` stands over numbers.
        rows: the cells.
        notes: sentences that say how to read it.
        at_once: how many rows are shown at once, the others on demand; None for all.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    at_once: int | None = None

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """Each head, and whether numbers stand below it."""
        return [(column.removeprefix(">"), column.startswith(">")) for column in self.columns]

    @property
    def parts(self) -> list[tuple[tuple[str, ...], ...]]:
        """The rows that are shown at once and, if there are any, the others."""
        return [rows for rows in (self.rows[: self.at_once], self.rows[self.at_once or len(self.rows) :]) if rows]

    def without(self, head: str) -> "ReportTable":
        """Return the table without a column."""
        remaining = [index for index, (title, _) in enumerate(self.heads) if title != head]
        rows = tuple(tuple(cells[index] for index in remaining) for cells in self.rows)
        return replace(self, columns=tuple(self.columns[index] for index in remaining), rows=rows)


def number(value: float | None) -> str:
    """Format a number with five significant digits, None as nothing."""
    return "" if value is None else f"{value:.5g}"


def signed(value: float) -> str:
    """Format a difference with three significant digits and its sign."""
    return f"{value:+.3g}" if math.isfinite(value) else str(value)


def interval_text(interval: Interval | None) -> str:
    """Format an interval as ``"-0.02 (-0.05 to +0.01)"``, None as nothing."""
    if interval is None:
        return ""
    return f"{signed(interval.difference)} ({signed(interval.low)} to {signed(interval.high)})"


def tables(evaluation: Evaluation) -> list[ReportTable]:
    """Return every table that has a row."""
    runs = {run.name: run for run in evaluation.runs}
    run_peaks, settings = _best_first(evaluation.peaks), _telling_settings(evaluation.runs)
    candidates = [
        replace(
            _table(
                PEAKS,
                [_peak_row(run_peak, runs[run_peak.run]) for run_peak in run_peaks],
                _peak_notes(evaluation.peaks),
            ),
            at_once=_rows_of_first_runs(run_peaks),
        ),
        *(_group_table(grouping) for grouping in evaluation.groups if len(grouping.groups) > 1),
        *(table for tradeoff in evaluation.tradeoffs for table in (_target_table(tradeoff), _front_table(tradeoff))),
        *map(_comparison_table, evaluation.comparisons),
        replace(
            _table("Runs", [_run_row(run, evaluation.optimizers[run.name], settings) for run in evaluation.runs]),
            at_once=MOST_RUNS,
        ),
    ]
    return [table for table in candidates if table.rows]


def _table(title: str, rows: Iterable[Row], notes: Iterable[str] = ()) -> ReportTable:
    listed = list(rows)
    columns = tuple(head for head, _ in listed[0]) if listed else ()
    cells = tuple(tuple(cell for _, cell in row) for row in listed)
    return ReportTable(title=title, columns=columns, rows=cells, notes=tuple(notes))


# --- runs and their peaks -----------------------------------------------------------------------------------------


def _best_first(run_peaks: Sequence[RunPeak]) -> list[RunPeak]:
    """Order peaks by run: the best by its first metric first; the rows of a run stay together."""
    metrics = list(dict.fromkeys((run_peak.peak.metric, run_peak.peak.mode) for run_peak in run_peaks))
    places: dict[str, tuple[int, float]] = {}
    for run_peak in run_peaks:
        peak = run_peak.peak
        value = -peak.best if peak.mode == "max" else peak.best
        places.setdefault(run_peak.run, (metrics.index((peak.metric, peak.mode)), value))
    return sorted(run_peaks, key=lambda run_peak: places[run_peak.run])


def _rows_of_first_runs(run_peaks: Sequence[RunPeak]) -> int:
    """Count the rows of the first runs, which are shown at once."""
    first = list(dict.fromkeys(run_peak.run for run_peak in run_peaks))[:MOST_RUNS]
    return sum(run_peak.run in first for run_peak in run_peaks)


def _telling_settings(runs: Sequence[RunData]) -> list[str]:
    """Return the names of the settings in which runs differ; all of a single run."""
    texts = [run.settings.texts() for run in runs]
    names = dict.fromkeys(name for settings in texts for name in settings)
    return [name for name in names if len(runs) == 1 or len({settings.get(name) for settings in texts}) > 1]


def _settings_text(run: RunData, names: Sequence[str]) -> str:
    texts = run.settings.texts()
    return listing([f"{name} {texts[name]}" for name in names if name in texts], _MOST_SETTINGS)


def _run_row(run: RunData, optimizer: str, settings: Sequence[str]) -> Row:
    last = run.history[-1] if run.history else None
    sizes = [run.packed.get(checkpoint.id, checkpoint.size_bytes) for checkpoint in run.checkpoints]
    return (
        ("run", run.name),
        ("optimizer", optimizer),
        *([("settings", _settings_text(run, settings))] if settings else []),
        (">reports", str(len(run.history))),
        (">last report", moment_label(last.step, last.epoch) if last else ""),
        (">saved / kept", f"{len(run.saved)} / {len(run.checkpoints)}"),
        (">size", size_text(sum(sizes))),
        ("ended", _ended(run)),
    )


def _ended(run: RunData) -> str:
    if run.writer is not None:
        return f"running: being written by {run.writer}"
    if run.ended is None:
        return "no end recorded (killed?)" if run.history else ""
    return "finished" if run.ended == "closed" else run.ended


def _peak_row(run_peak: RunPeak, run: RunData) -> Row:
    peak, noise = run_peak.peak, run_peak.noise
    lost = "nothing" if peak.lost == 0 else f"{peak.lost:.3g}" if math.isfinite(peak.lost) else "?"
    curve = thin(list(enumerate(run.series(peak.metric))), 200) if run_peak.window == 1 else ()
    return (
        ("run", run_peak.run),
        ("metric", f"{run_peak.label} {peak.mode}"),
        (CURVE, sparkline([value for _, value in curve], 12)),
        (">best", number(peak.best) + (f" ± {noise.se:.2g}" if noise else "")),
        (">best at", moment_label(peak.best_step, peak.best_epoch)),
        (">last", number(peak.last)),
        (">last at", moment_label(peak.last_step, peak.last_epoch)),
        (">lost", lost),
        (">luck, mean", "" if run_peak.by_chance is None else f"{run_peak.by_chance:.2g}"),
        (">luck, 95 %", "" if run_peak.margin is None else f"{run_peak.margin:.2g}"),
        (">within noise of best", "" if run_peak.contenders is None else f"{run_peak.contenders} of {peak.count}"),
        ("verdict", NOISE_UNKNOWN if run_peak.verdict == "noise unknown" else run_peak.verdict),
        ("checkpoint", _best_checkpoint(run_peak, run)),
    )


def _best_checkpoint(run_peak: RunPeak, run: RunData) -> str:
    """Return a short ref of the best moment's checkpoint, or say what exists instead."""
    short = {f"{checkpoint.run}/{checkpoint.name}": f"{run.name}/{checkpoint.id[:8]}" for checkpoint in run.checkpoints}
    if run_peak.checkpoint is not None:
        return short[run_peak.checkpoint]
    fate = "damaged" if run_peak.damaged else "removed" if run_peak.saved else "never saved"
    if run_peak.nearest is None:
        return fate
    ref, value = run_peak.nearest
    if value == run_peak.peak.best:
        return f"{fate}; {short[ref]} has the same value"
    return f"{fate}; the best kept is {short[ref]} with {number(value)}"


def _peak_notes(run_peaks: Sequence[RunPeak]) -> Iterator[str]:
    with_noise = [run_peak for run_peak in run_peaks if run_peak.margin is not None]
    if with_noise:
        yield (
            "Luck: the gap that chance alone makes between the best of so many equally good values and the others on "
            "average (mean), and the gap to the last that it exceeds in 1 of 20 cases (95 %). Within noise of best: "
            "reports whose value is nearer to the best than that. The best was picked for being the best, so expect "
            "less of it on new data."
        )
    for source in dict.fromkeys(run_peak.noise.source for run_peak in with_noise if run_peak.noise):
        yield f"± of {_metrics_with(source, with_noise)} is the standard error of one value: {source}."
    runs = defaultdict(list)
    for run_peak in run_peaks:
        sentence = run_peak.why if run_peak.verdict in ("noise unknown", "not finite") else run_peak.aside
        if sentence:
            runs[run_peak.label, sentence].append(run_peak.run)
    for (label, sentence), names in runs.items():
        yield f"{listing(names)}, {label}: {sentence}."


def _metrics_with(source: str, run_peaks: Iterable[RunPeak]) -> str:
    """Name the metrics whose noise has this source, with their runs where other runs have another source."""
    sources: defaultdict[str, dict[str, str | None]] = defaultdict(dict)
    for run_peak in run_peaks:
        sources[run_peak.label][run_peak.run] = run_peak.noise.source if run_peak.noise else None
    parts = []
    for label, by_run in sources.items():
        runs = [run for run, run_source in by_run.items() if run_source == source]
        if runs:
            parts.append(label if len(runs) == len(by_run) else f"{label} in {listing(runs)}")
    return "; ".join(parts)


# --- groups, sparsity, compressed models --------------------------------------------------------------------------


def _group_table(grouping: Grouping) -> ReportTable:
    rows = [_group_row(grouping, group) for group in grouping.groups]
    note = f"{grouping.note[:1].upper()}{grouping.note[1:]}."
    return _table(f"{grouping.metric} ({grouping.mode}) by {grouping.by}", rows, [note])


def _group_row(grouping: Grouping, group: RunGroup) -> Row:
    spread = "" if group.best_spread is None else f" ± {group.best_spread:.2g}"
    difference = "best mean" if group is grouping.groups[0] else interval_text(group.against) or "unknown"
    return (
        ("optimizer" if grouping.by == "optimizer" else "group", group.name),
        (">runs", str(len(group.runs))),
        (">mean best ± spread", number(group.best) + spread),
        (">best run", number(group.best_of_all)),
        (">mean last", number(group.last)),
        (">mean lost", number(group.lost)),
        (">difference to the first", difference),
    )


def _target_table(tradeoff: Tradeoff) -> ReportTable:
    without_dense = {best.run for best in tradeoff.targets} - {point.run for point in tradeoff.dense}
    return _table(
        f"{tradeoff.metric} ({tradeoff.mode}) at each target of {tradeoff.sparsity}",
        [_target_row(best, tradeoff) for best in tradeoff.targets],
        [f"{run} has no dense checkpoint to compare with." for run in sorted(without_dense)],
    )


def _target_row(best: BestAtTarget, tradeoff: Tradeoff) -> Row:
    point, change = best.spot, ""
    if best.cost is not None and point not in tradeoff.dense:
        change = signed(-best.cost if tradeoff.mode == "max" else best.cost)
    return (
        ("run", best.run),
        (f">target {tradeoff.sparsity}", f"{best.target:g} ± {best.tolerance:g}"),
        (f">actual {tradeoff.sparsity}", "" if point is None else number(point.sparsity)),
        (f">best {tradeoff.metric}", "" if point is None else number(point.value)),
        (">change from dense", change),
        ("checkpoint", "none at this sparsity" if point is None else point.ref),
    )


def _front_table(tradeoff: Tradeoff) -> ReportTable:
    front = front_of(tradeoff)
    rows = [
        (
            (f">{tradeoff.sparsity}", number(point.sparsity)),
            (f">{tradeoff.metric}", number(point.value)),
            (">at", moment_label(point.step, point.epoch)),
            ("checkpoint", point.ref),
        )
        for point in front
    ]
    note = (
        f"{len(front)} of {len(tradeoff.spots)} checkpoints are Pareto-optimal: no other is at least as good in both "
        "and better in one."
    )
    return _table(f"Pareto front of {tradeoff.metric} ({tradeoff.mode}) and {tradeoff.sparsity} (max)", rows, [note])


def front_of(tradeoff: Tradeoff) -> list[SparsityPoint]:
    """Return the points on the Pareto front, the least sparse first."""
    return sorted((point for point in tradeoff.spots if point.on_front), key=lambda point: point.sparsity)


def _comparison_table(comparison: CompressedComparison) -> ReportTable:
    original, compressed = comparison.original, comparison.compressed
    rows = [("checkpoint", original.ref, compressed.ref, "")]
    metrics_by_source = defaultdict(list)
    for change in comparison.differences:
        difference = interval_text(change.interval) or signed(change.compressed - change.original)
        rows.append((change.metric, number(change.original), number(change.compressed), difference))
        if change.interval is not None:
            metrics_by_source[change.source].append(change.metric)
    rows += _size_rows(original, compressed)
    notes = [
        f"The 95 % interval of {listing(metrics)} assumes that both were measured on different examples: {source}."
        for source, metrics in metrics_by_source.items()
    ]
    if original.nonzero is not None or compressed.nonzero is not None:
        notes.append(
            "Sparse storage is an estimate: one bit a parameter, and the non-zero values; no such file was written."
        )
    sources = dict.fromkeys([original.source, compressed.source])
    notes += [f"Non-zero parameters of {original.part}: {source}." for source in sources]
    return ReportTable(
        title=f"Compressed against original: {comparison.why}",
        columns=("", "original", "compressed", ">difference or share"),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _size_rows(original: ModelSize, compressed: ModelSize) -> Iterator[tuple[str, str, str, str]]:
    figures: tuple[tuple[str, str, Callable[[int], str]], ...] = (
        (f"parameters of {original.part}", "parameters", "{:,}".format),
        ("non-zero", "nonzero", "{:,}".format),
        (f"bytes of {original.part}", "part_bytes", size_text),
        ("sparse storage (estimate)", "sparse_bytes", size_text),
        ("all files", "files_bytes", size_text),
        ("in the archive", "packed_bytes", size_text),
    )
    for title, field, show in figures:
        counts = getattr(original, field), getattr(compressed, field)
        if field != "packed_bytes" or counts != (None, None):
            share = f"{counts[1] / counts[0]:.1%}" if counts[0] and counts[1] is not None else ""
            cells = ["unknown" if count is None else show(count) for count in counts]
            yield title, cells[0], cells[1], share
