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
        lost = self.best - self.last if self.mode == "max" else self.last - self.best
        return math.nan if lost < 0 else lost  # negative only when the last is an infinity, which is no improvement


def peaks(history: Sequence[Reported], watched: Iterable[tuple[str, Mode]]) -> list[Peak]:
    """The peak of each watched metric; metrics that never had a finite value are left out.

    Args:
        history: the reports, earliest first; among equal values the earliest counts as the best.
        watched: metrics with their directions.
    """
    found = []
    for metric, mode in watched:
        having = [report for report in history if metric in report.metrics]
        finite = [report for report in having if math.isfinite(report.metrics[metric])]
        if not finite:
            continue
        sign = 1.0 if mode == "max" else -1.0
        best = max(finite, key=lambda report: sign * report.metrics[metric])
        last = having[-1]
        found.append(
            Peak(
                metric,
                mode,
                best.metrics[metric],
                best.step,
                best.epoch,
                last.metrics[metric],
                last.step,
                last.epoch,
                best.report,
                last.report,
                len(finite),
                len(having) - len(finite),
            )
        )
    return found


_LONG_AGO = datetime.min.replace(tzinfo=UTC)


def extend_peaks(
    before: Iterable[Peak], missing: Mapping[str, int], history: Sequence[Reported], watched: Iterable[tuple[str, Mode]]
) -> tuple[list[Peak], dict[str, int]]:
    """What ``peaks`` says of a longer history, from what it said before and the reports since.

    Args:
        before: what it said.
        missing: how many values were not finite of metrics that it left out.
        history: the further reports.
        watched: as before; a metric that was not watched then begins here.

    Returns:
        The peaks, and ``missing`` as it is now.
    """
    known = {(peak.metric, peak.mode): peak for peak in before}
    found, left_out = [], {}
    for metric, mode in watched:
        earlier = known.get((metric, mode))
        values = [report.metrics[metric] for report in history if metric in report.metrics]
        odd = sum(not math.isfinite(value) for value in values) + (
            earlier.missing if earlier else missing.get(metric, 0)
        )
        now = peaks([*_stand_ins(earlier), *history], [(metric, mode)])
        if now:
            finite = sum(map(math.isfinite, values)) + (earlier.count if earlier else 0)
            found.append(replace(now[0], count=finite, missing=odd))
        elif odd:
            left_out[metric] = odd
    return found, left_out


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
