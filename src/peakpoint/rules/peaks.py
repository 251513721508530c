"""Peak against last: how far a run fell from its best."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from peakpoint.format.events import Reported
from peakpoint.rules import Mode


@dataclass(frozen=True, slots=True)
class Peak:
    """One metric of one run.

    Attributes:
        metric: its name.
        mode: whether larger (``"max"``) or smaller (``"min"``) is better.
        best: the best finite value that was reported.
        best_step: where.
        best_epoch: where; None outside epochs.
        last: the last value that was reported; may be NaN.
        last_step: where.
        last_epoch: where; None outside epochs.
        best_report: the report's number in the run.
        last_report: the report's number in the run.
        count: finite values that were reported.
        missing: values that were NaN or infinite.
    """

    metric: str
    mode: Mode
    best: float
    best_step: int
    best_epoch: int | None
    last: float
    last_step: int
    last_epoch: int | None
    best_report: int
    last_report: int
    count: int
    missing: int

    @property
    def lost(self) -> float:
        """How much worse the last value is than the best, in the metric's unit; never negative, may be NaN."""
        difference = self.best - self.last if self.mode == "max" else self.last - self.best
        # negative only when the last is an infinity, which is no improvement
        return math.nan if difference < 0 else difference


def peaks(history: Sequence[Reported], metrics: Iterable[tuple[str, Mode]]) -> list[Peak]:
    """Return the peak of each metric; metrics that never had a finite value are left out.

    Args:
        history: the reports, earliest first; among equal values the earliest counts as the best.
        metrics: metrics with their directions.
    """
    results = []
    for metric, mode in metrics:
        reports = [report for report in history if metric in report.metrics]
        finite = [report for report in reports if math.isfinite(report.metrics[metric])]
        if not finite:
            continue
        sign = 1.0 if mode == "max" else -1.0
        best = max(finite, key=lambda report: sign * report.metrics[metric])
        last = reports[-1]
        moments = [(report.metrics[metric], report.step, report.epoch) for report in (best, last)]
        counts = (len(finite), len(reports) - len(finite))
        results.append(Peak(metric, mode, *moments[0], *moments[1], best.report, last.report, *counts))
    return results


_LONG_AGO = datetime.min.replace(tzinfo=UTC)


def extend_peaks(
    earlier_peaks: Iterable[Peak],
    missing: Mapping[str, int],
    history: Sequence[Reported],
    metrics: Iterable[tuple[str, Mode]],
) -> tuple[list[Peak], dict[str, int]]:
    """Return what ``peaks`` says of a longer history, from its earlier answer and the reports since.

    Args:
        earlier_peaks: its earlier answer.
        missing: how many values were not finite of metrics that it left out.
        history: the further reports.
        metrics: as before; a metric that is new begins here.

    Returns:
        The peaks, and ``missing`` as it is now.
    """
    peaks_by_metric = {(peak.metric, peak.mode): peak for peak in earlier_peaks}
    extended, never_finite = [], {}
    for metric, mode in metrics:
        previous = peaks_by_metric.get((metric, mode))
        values = [report.metrics[metric] for report in history if metric in report.metrics]
        infinite = sum(not math.isfinite(value) for value in values) + (
            previous.missing if previous else missing.get(metric, 0)
        )
        updated = peaks([*_stand_ins(previous), *history], [(metric, mode)])
        if updated:
            finite = sum(map(math.isfinite, values)) + (previous.count if previous else 0)
            extended.append(replace(updated[0], count=finite, missing=infinite))
        elif infinite:
            never_finite[metric] = infinite
    return extended, never_finite


def _stand_ins(peak: Peak | None) -> list[Reported]:
    """Two reports that stand for all that a peak was found among."""
    if peak is None:
        return []
    best = (peak.best_report, peak.best_step, peak.best_epoch, peak.best)
    last = (peak.last_report, peak.last_step, peak.last_epoch, peak.last)
    return [
        Reported(at=_LONG_AGO, report=report, step=step, epoch=epoch, metrics={peak.metric: value})
        for report, step, epoch, value in (best, last)
    ]
