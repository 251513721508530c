"""Best against last, and whether the difference is more than chance."""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from peakpoint.errors import ConfigError
from peakpoint.format.events import Reported
from peakpoint.reports.evaluation import noise as noises
from peakpoint.reports.evaluation.noise import Noise
from peakpoint.reports.evaluation.run_data import RunData, ref_of
from peakpoint.rules import Mode, Rule, ranked, ranking_metrics
from peakpoint.rules.history import smoothing_windows
from peakpoint.rules.peaks import Peak, peaks

Verdict = Literal["peak", "within noise", "still improving", "noise unknown", "one value", "not finite"]
COMPANION = "_se"


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """How many examples each value of a metric was measured on, and what the metric is.

    Args:
        by_metric: the number, for metrics that are proportions of examples, such as an accuracy.
        default: the number for every metric that is to be maximised and has none of its own.
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
            raise ConfigError("percent only says how to read the metrics that n_eval is given for; give n_eval, too")

    def of(self, metric: str, mode: Mode) -> int | None:
        """The number for a metric; None when nothing is known."""
        return self.by_metric.get(metric, self.default if mode == "max" else None)

    @property
    def whole(self) -> float:
        """What all examples right look like."""
        return 100.0 if self.percent else 1.0

    def share(self, metric: str, value: float) -> float:
        """A value as a fraction.

        Raises:
            ConfigError: it is none.
        """
        if 0 <= value <= self.whole:
            return value / self.whole
        hint = "" if self.percent else "; if these are percentages say so (--percent)"
        raise ConfigError(
            f"metric {metric!r} is {value:g} somewhere: no proportion of examples, from 0 to {self.whole:g}{hint}; "
            "if n_eval is about other metrics, name them (--n-eval METRIC=N)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPeak:
    """One metric of one run: the peak, and what to think of it.

    Attributes:
        run: the run's name.
        peak: best against last; of means over ``window`` reports when that is not 1.
        window: over how many reports the values are averaged.
        noise: the standard error of one value; None when nothing says.
        by_chance: how far the best of so many equal evaluations lies above the others on average, in the metric's unit.
        margin: a smaller difference than this is no evidence that the best is better than the last.
        contenders: reports within the margin of the best, itself included; None when the noise is not known.
        points: ``peak.lost`` in percentage points; None unless the metric was said to be a proportion.
        verdict: in two words.
        why: in a sentence.
        aside: what the curve's own scatter says besides; "" when it says the same.
        saved: whether the best moment became a checkpoint.
        checkpoint: ref of the best moment's checkpoint; None when there is none now.
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
    checkpoint: str | None
    nearest: tuple[str, float] | None

    @property
    def label(self) -> str:
        """The metric, with the number of values in the mean."""
        return self.peak.metric if self.window == 1 else f"{self.peak.metric} (mean of {self.window})"


def directions(rules: Iterable[Rule], sparsity: str) -> tuple[tuple[str, Mode], ...]:
    """The metrics that rules rank by; the sparsity itself is no result."""
    return tuple(pair for pair in ranking_metrics(rules) if pair[0] != sparsity)


def run_peaks(material: RunData, metric: str, mode: Mode, examples: Examples) -> list[RunPeak]:
    """The peak of a metric and, where rules smooth it, of its means; nothing when it has no finite value."""
    found = peaks(material.history, [(metric, mode)])
    if not found:
        return []
    noise = noise_of(material, metric, mode, (found[0].best_report, found[0].last_report), examples)
    values = material.series(metric)
    judged = [_judged(material, found[0], 1, noise, values, examples)]
    for _, window in sorted(pair for pair in smoothing_windows(material.rules) if pair[0] == metric):
        means = _means(material.history, metric, window)
        for peak in peaks(means, [(metric, mode)]):
            steadier = _averaged(noise, window)
            averaged = [mean.metrics[metric] for mean in means]
            judged.append(_judged(material, peak, window, steadier, averaged, examples))
    return judged


def noise_of(material: RunData, metric: str, mode: Mode, reports: Sequence[int], examples: Examples) -> Noise | None:
    """The standard error of one value: from the number of examples, as it was reported, or from the curve's scatter.

    Args:
        material: the run.
        metric: which metric.
        mode: its direction.
        reports: numbers of the reports whose values are of interest; their mean counts.
        examples: what is known of the evaluation.
    """
    chosen = [report for report in material.history if report.report in set(reports)]
    count = examples.of(metric, mode)
    if count is not None:
        shares = [examples.share(metric, value) for value in material.series(metric)]
        values = [value for one in chosen if math.isfinite(value := one.metrics.get(metric, math.nan))]
        share = sum(examples.share(metric, value) for value in values) / len(values) if values else max(shares)
        se = noises.of_proportion(share, count) * examples.whole
        return Noise(se=se, source=f"a proportion of {count} examples")
    said = [one.metrics.get(metric + COMPANION, math.nan) for one in chosen]
    said = [value for value in said if math.isfinite(value) and value >= 0]
    if any(said):  # 0 says nothing
        return Noise(
            se=math.sqrt(sum(value**2 for value in said) / len(said)), source=f"reported as {metric}{COMPANION}"
        )
    return noises.of_curve(material.series(metric))


def _averaged(noise: Noise | None, window: int) -> Noise | None:
    """The noise of a mean of ``window`` values, each on its own."""
    return None if noise is None else replace(noise, se=noise.se / math.sqrt(window))


def _means(history: Sequence[Reported], metric: str, window: int) -> list[Reported]:
    last = deque[float](maxlen=window)
    means = []
    for report in history:
        value = report.metrics.get(metric, math.nan)
        if math.isfinite(value):
            last.append(value)
            if len(last) == window:
                means.append(replace(report, metrics={metric: math.fsum(one / window for one in last)}))
    return means


def _judged(
    material: RunData, peak: Peak, window: int, noise: Noise | None, values: Sequence[float], examples: Examples
) -> RunPeak:
    margin = None if noise is None else noise.margin(peak.count)
    contenders = None
    if margin is not None:
        contenders = sum(abs(value - peak.best) <= margin for value in values)
    verdict, why = _verdict(peak, noise, margin, peak.count + window - 1)
    manifest = material.kept.get(peak.best_report)
    ranking = ranked(material.checkpoints, peak.metric, peak.mode) if window == 1 else []
    there = [one for one in material.checkpoints if ranking and one.id == ranking[0].id]
    proportion = examples.of(peak.metric, peak.mode) is not None and math.isfinite(peak.lost)
    return RunPeak(
        run=material.name,
        peak=peak,
        window=window,
        noise=noise,
        by_chance=None if noise is None else noise.se * noises.expected_best(peak.count),
        margin=margin,
        contenders=contenders,
        points=peak.lost / examples.whole * 100 if proportion else None,
        verdict=verdict,
        why=why,
        aside=_aside(peak, verdict, _averaged(noises.of_curve(material.series(peak.metric)), window)),
        saved=peak.best_report in material.saved,
        checkpoint=None if manifest is None else ref_of(manifest),
        nearest=(ref_of(there[0]), there[0].metrics[peak.metric]) if there else None,
    )


def _verdict(peak: Peak, noise: Noise | None, margin: float | None, count: int) -> tuple[Verdict, str]:
    """What to call it, and why; ``count`` is the number of single values."""
    if not math.isfinite(peak.last):
        return "not finite", f"the last value is {peak.last}"
    if peak.count == 1:
        return "one value", "there is one value, which is best and last"
    if peak.best_report == peak.last_report:
        return "still improving", "the best is the last"
    if not peak.lost:
        return "within noise", "the last value is as good as the best"
    if noise is None or margin is None:
        why = (
            f"{count} values are too few to show their noise"
            if count < noises.LEAST_VALUES
            else "the last values scatter hardly, or far less than others (a learning rate that decays?)"
        )
        return "noise unknown", f"{why}; give --n-eval, or report {peak.metric}_se"
    if peak.lost > margin:
        return "peak", f"chance alone would make a difference of up to {margin:.3g} among {peak.count} equal values"
    return "within noise", f"chance alone makes a difference of up to {margin:.3g} among {peak.count} equal values"


def _aside(peak: Peak, verdict: Verdict, wobble: Noise | None) -> str:
    """Two things that ``n_eval`` does not know: the examples are the same every time, and training itself wobbles."""
    if wobble is None or not peak.lost:
        return ""
    declined = peak.lost > wobble.margin(peak.count)
    if verdict == "within noise" and declined:
        return (
            f"the curve wobbles by {wobble.se:.2g} only: on these same examples the best is better, "
            "on others it may not be"
        )
    if verdict == "peak" and not declined:
        return (
            f"the best is better than the last, but training wobbles by {wobble.se:.2g} from one report to the next: "
            "the last may have been an unlucky moment rather than the end of a decline"
        )
    return ""
