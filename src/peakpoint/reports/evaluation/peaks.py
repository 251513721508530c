"""The best value of a metric beside the last, and whether chance alone explains the difference."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from msgspec import structs

from peakpoint.errors import ConfigError
from peakpoint.format.events import Reported
from peakpoint.reports.evaluation import noise as noises
from peakpoint.reports.evaluation.noise import Noise
from peakpoint.reports.evaluation.run_data import RunData, ref_of
from peakpoint.rules import Mode, Rule, ranking_metrics
from peakpoint.rules.history import Smoothing, smoothing_windows
from peakpoint.rules.peaks import Peak, peaks

Verdict = Literal["peak", "within noise", "still improving", "noise unknown", "one value", "not finite"]
COMPANION = "_se"


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """The number of examples that each value of a metric was measured on.

    Args:
        by_metric: of metrics that are proportions of examples, such as an accuracy.
        default: of every other metric that is to be maximised.
        percent: the values are percentages, from 0 to 100, instead of fractions from 0 to 1.

    Raises:
        ConfigError: a number below 1.
    """

    by_metric: Mapping[str, int] = field(default_factory=dict)
    default: int | None = None
    percent: bool = False

    def __post_init__(self) -> None:
        for name, count in (*self.by_metric.items(), ("n_eval", 1 if self.default is None else self.default)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ConfigError(f"{name}: the number of examples must be a whole number of at least 1, not {count!r}")
        if self.percent and self.default is None and not self.by_metric:
            raise ConfigError("percent tells how to read the metrics that n_eval is given for: pass n_eval, too")

    def of(self, metric: str, mode: Mode) -> int | None:
        """Return the number for a metric; None when it was not given."""
        return self.by_metric.get(metric, self.default if mode == "max" else None)

    @property
    def perfect(self) -> float:
        """The value when all examples are right."""
        return 100.0 if self.percent else 1.0

    def share(self, metric: str, value: float) -> float:
        """Return a value as a fraction.

        Raises:
            ConfigError: the value cannot be a proportion.
        """
        if 0 <= value <= self.perfect:
            return value / self.perfect
        hint = "" if self.percent else "; if these are percentages, pass --percent"
        raise ConfigError(
            f"metric {metric!r} is {value:g} somewhere, which is not a proportion of examples, from 0 to "
            f"{self.perfect:g}{hint}; if n_eval is about other metrics, name them (--n-eval METRIC=N)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPeak:
    """The best value of one metric of one run beside the last.

    Attributes:
        run: the run's name.
        peak: best and last; of means over ``window`` reports when that is not 1.
        window: over how many reports the values are averaged.
        noise: the standard error of one value; None when it cannot be estimated.
        by_chance: how far the best of so many equal evaluations lies above the others on average, in the metric's unit.
        margin: the smallest difference that is evidence for a peak.
        contenders: reports within the margin of the best, itself included; None when the noise is not known.
        points: ``peak.lost`` in percentage points; None unless the metric is a proportion.
        verdict: in two words.
        why: in a sentence.
        aside: what the curve's own scatter shows besides; "" when it agrees.
        saved: whether the best moment became a checkpoint.
        damaged: whether that checkpoint cannot be read, or is lost.
        checkpoint: ref of the best moment's checkpoint; None when it does not exist.
        nearest: ref of the best checkpoint that exists, and its value; None when none has a value.
    """

    run: str
    peak: Peak
    window: int
    noise: Noise | None
    by_chance: float | None
    margin: float | None
    contenders: int | None
    points: float | None
    verdict: Verdict
    why: str
    aside: str
    saved: bool
    damaged: bool
    checkpoint: str | None
    nearest: tuple[str, float] | None

    @property
    def label(self) -> str:
        """The metric, with the number of values in the mean."""
        return self.peak.metric if self.window == 1 else f"{self.peak.metric} (mean of {self.window})"


def result_metrics(rules: Iterable[Rule], sparsity: str) -> tuple[tuple[str, Mode], ...]:
    """Return the metrics that rules rank by, without the sparsity, which is not a result."""
    return tuple(pair for pair in ranking_metrics(rules) if pair[0] != sparsity)


def run_peaks(data: RunData, metric: str, mode: Mode, examples: Examples) -> list[RunPeak]:
    """Return the peak of a metric and, where rules smooth it, of its means; none without a finite value."""
    raw_peaks = peaks(data.history, [(metric, mode)])
    if not raw_peaks:
        return []
    noise = noise_of(data, metric, mode, (raw_peaks[0].best_report, raw_peaks[0].last_report), examples)
    results = [_run_peak(data, raw_peaks[0], 1, noise, data.history, examples)]
    for _, window in sorted(pair for pair in smoothing_windows(data.rules) if pair[0] == metric):
        means = list(_means(data.history, metric, window))
        smoothed_peaks = peaks(means, [(metric, mode)])
        results += [_run_peak(data, peak, window, _averaged(noise, window), means, examples) for peak in smoothed_peaks]
    return results


def noise_of(data: RunData, metric: str, mode: Mode, reports: Sequence[int], examples: Examples) -> Noise | None:
    """Return the standard error of one value: by the number of examples, as reported, or from the curve's scatter.

    Args:
        data: the run.
        metric: which metric.
        mode: its direction.
        reports: numbers of the reports whose values are of interest; their mean counts.
        examples: the numbers of examples, as far as they were given.
    """
    metrics = [report.metrics for report in data.history if report.report in reports]
    count = examples.of(metric, mode)
    if count is not None:
        shares = [examples.share(metric, value) for value in data.series(metric)]
        values = [values[metric] for values in metrics if math.isfinite(values.get(metric, math.nan))]
        share = sum(examples.share(metric, value) for value in values) / len(values) if values else max(shares)
        se = noises.of_proportion(share, count) * examples.perfect
        return Noise(se=se, source=f"a proportion of {count} examples")
    errors = [values.get(metric + COMPANION, math.nan) for values in metrics]
    errors = [error for error in errors if 0 <= error < math.inf]
    if any(errors):  # a standard error of 0 says nothing
        se = math.sqrt(sum(error**2 for error in errors) / len(errors))
        return Noise(se=se, source=f"reported as {metric}{COMPANION}")
    return noises.of_curve(data.series(metric))


def _averaged(noise: Noise | None, window: int) -> Noise | None:
    """Return the noise of a mean of ``window`` independent values."""
    return None if noise is None else replace(noise, se=noise.se / math.sqrt(window))


def _means(history: Sequence[Reported], metric: str, window: int) -> Iterator[Reported]:
    smoothing = Smoothing(frozenset({(metric, window)}))
    for report in history:
        smoothing.report(report.metrics)
        [mean] = smoothing.means().values()
        if math.isfinite(report.metrics.get(metric, math.nan)) and math.isfinite(mean):
            yield structs.replace(report, metrics={metric: mean})


def _run_peak(
    data: RunData, peak: Peak, window: int, noise: Noise | None, reports: Sequence[Reported], examples: Examples
) -> RunPeak:
    margin = contenders = None
    if noise is not None:
        margin = noise.margin(peak.count)
        values = (report.metrics.get(peak.metric, math.nan) for report in reports)
        contenders = sum(abs(value - peak.best) <= margin for value in values)
    verdict, why = _verdict(peak, margin, peak.count + window - 1)
    checkpoint = data.kept.get(peak.best_report)
    nearest = data.best_checkpoint(peak.metric, peak.mode) if window == 1 else None
    proportion = examples.of(peak.metric, peak.mode) is not None and math.isfinite(peak.lost)
    return RunPeak(
        run=data.name,
        peak=peak,
        window=window,
        noise=noise,
        by_chance=None if noise is None else noise.se * noises.expected_best(peak.count),
        margin=margin,
        contenders=contenders,
        points=peak.lost / examples.perfect * 100 if proportion else None,
        verdict=verdict,
        why=why,
        aside=_aside(peak, verdict, _averaged(noises.of_curve(data.series(peak.metric)), window)),
        saved=peak.best_report in data.saved,
        damaged=peak.best_report in data.damaged,
        checkpoint=None if checkpoint is None else ref_of(checkpoint),
        nearest=None if nearest is None else (ref_of(nearest), nearest.metrics[peak.metric]),
    )


def _verdict(peak: Peak, margin: float | None, count: int) -> tuple[Verdict, str]:
    """Return the verdict and its reason; ``count`` is the number of single values."""
    if not math.isfinite(peak.last):
        return "not finite", f"the last value is {peak.last}"
    if peak.count == 1:
        return "one value", "there is only one value"
    if peak.best_report == peak.last_report:
        return "still improving", "the last value is the best"
    if not peak.lost:
        return "within noise", "the last value equals the best"
    if margin is None:
        reason = (
            f"{count} values are too few to estimate noise"
            if count < noises.LEAST_VALUES
            else "the last values hardly vary, or much less than the earlier ones (annealed learning rate?), so noise "
            "cannot be estimated from them"
        )
        return "noise unknown", f"{reason}; pass --n-eval N, or report {peak.metric}_se"
    reach = f"chance alone explains a difference of up to {margin:.3g} among {peak.count} equally good values"
    return ("peak" if peak.lost > margin else "within noise"), reach


def _aside(peak: Peak, verdict: Verdict, scatter: Noise | None) -> str:
    """Say where the curve's scatter disagrees: all reports use the same examples, and training itself fluctuates."""
    if scatter is None or not peak.lost:
        return ""
    declined = peak.lost > scatter.margin(peak.count)
    if verdict == "within noise" and declined:
        return (
            f"from report to report the curve fluctuates by only {scatter.se:.2g}: the best is better on these "
            "examples, but may not be on others"
        )
    if verdict == "peak" and not declined:
        return (
            f"the best is better than the last, but the curve fluctuates by {scatter.se:.2g} from report to report: "
            "the last may be an unlucky moment rather than a decline"
        )
    return ""
