"""Sentences about what a report lacks, or what in it is doubtful."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from peakpoint.format.names import listing, no_part
from peakpoint.reports.evaluation.compressed import CheckpointPair
from peakpoint.reports.evaluation.peaks import Examples, RunPeak
from peakpoint.reports.evaluation.run_data import RunData, ref_of
from peakpoint.rules import Mode

Metrics = tuple[tuple[str, Mode], ...]
"""Metrics with their directions."""


def doubted_percentages(runs: Iterable[RunData], modes: Mapping[str, Mode], examples: Examples) -> Iterator[str]:
    """Name metrics that are called percentages and look like fractions."""
    for run in runs if examples.percent else ():
        for metric, mode in modes.items():
            if examples.of(metric, mode) is not None and 0 < max(run.series(metric), default=0) <= 1:
                yield (
                    f"{run.name}: {metric} is never above 1, which --percent reads as at most 1 %; if it is a "
                    "fraction, leave --percent out: its ±, verdict and intervals are wrong otherwise"
                )


def missing_parts(pairs: Iterable[CheckpointPair], part: str) -> Iterator[str]:
    """Name the runs whose checkpoints were not compared because they lack the part."""
    sides = [side for pair in pairs for side in (pair.compressed, pair.original)]
    lacking = {run.name: checkpoint for run, checkpoint in sides if part not in checkpoint.parts}
    for name, checkpoint in lacking.items():
        message = no_part(part, checkpoint.parts, where=ref_of(checkpoint))
        yield f"{name}: compressed is not compared with original. {message}"


def run_remarks(
    runs: Sequence[RunData], peaks: Sequence[RunPeak], metrics: Mapping[str, Metrics], *, metrics_were_named: bool
) -> Iterator[str]:
    """Say what is missing of each run.

    Args:
        runs: those that were evaluated.
        peaks: the results.
        metrics: those that were looked at, by run.
        metrics_were_named: by the user; otherwise rules tell.
    """
    with_peaks = {run_peak.run for run_peak in peaks}
    for run in runs:
        yield from (f"{run.name}: {remark}" for remark in run.remarks)
        if not run.history:
            yield f"{run.name} has no reports yet"
        elif not run.metrics:
            yield f"{run.name}: none of its reports has a metric"
        elif not metrics[run.name]:
            yield f"{run.name}: no rule ranks by a metric; pass --metric NAME:max, of {', '.join(run.metrics[:10])}"
        elif run.name not in with_peaks:
            names = ", ".join(name for name, _ in metrics[run.name])
            yield f"{run.name} has no finite value of {names}" + ("" if metrics_were_named else " yet")
        if run.abandoned:
            count = sum(map(len, run.abandoned))
            yield (
                f"{run.name}: {count} report{'s' if count > 1 else ''} of abandoned branches left out "
                "(the run was continued from before them)"
            )
    yield from _metrics_not_shown(runs, metrics)
    for run_peak in peaks:
        peak = run_peak.peak
        if peak.missing and run_peak.window == 1:
            yield f"{run_peak.run}: {peak.missing} values of {peak.metric} are NaN or infinite, and left out"


def _metrics_not_shown(runs: Sequence[RunData], metrics: Mapping[str, Metrics]) -> Iterator[str]:
    for name, mode in dict.fromkeys(itertools.chain(*metrics.values())):
        hidden = [
            run.name for run in runs if metrics[run.name] and run.series(name) and name not in dict(metrics[run.name])
        ]
        if hidden:
            yield (
                f"{name} of {listing(hidden)} is in no picture or table: no rule there ranks by it; "
                f"--metric {name}:{mode} shows it of all runs"
            )
