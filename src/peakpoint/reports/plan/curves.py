"""The metrics that a plan assumes for a run that has not happened."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence

from peakpoint.rules import BestAtSparsity, Pareto, Rule, ranking_metrics

_PEAK = 0.65  # of the run: the best of metrics that rise and then degrade
# What one report adds to a sparsity that the schedule holds still, so that no two are equal where they are traded; the
# reports of a plan with Pareto together add less than what BestAtSparsity lets pass at a tolerance of 0.
_STEP = 1e-15

ASSUMPTIONS = {
    "likely": "every metric rises, with noise, until 65 % of the run, and then degrades",
    "never improves": "the first report has the best of every metric",
    "always improves": "every report has the best of every metric so far",
    "trades off": "what one metric gains, the next one loses, at every report",
    "any": "no rule looks at metrics",
}


class AssumedMetrics:
    """The metrics of every report, under each assumption.

    Args:
        rules: they give the metrics and their directions.
        reports: how many.
        per_epoch: how many of them in an epoch.
        sparsity: epoch to sparsity.
        seed: of the noise.

    Attributes:
        names: the assumptions, of ``ASSUMPTIONS``; the likely one first.
    """

    def __init__(
        self, rules: Sequence[Rule], reports: int, per_epoch: int, sparsity: Mapping[int, float], seed: int
    ) -> None:
        self._signs: dict[str, int] = {}  # 1 where more is better
        for metric, mode in ranking_metrics(rules):
            self._signs.setdefault(metric, 1 if mode == "max" else -1)
        by_sparsity = {rule.sparsity for rule in rules if isinstance(rule, BestAtSparsity)}
        self._sparsities = (by_sparsity or {"sparsity"}) if sparsity else set()
        self._schedule = sorted(sparsity.items())
        self._reports, self._per_epoch, self._seed = reports, per_epoch, seed
        trading = ["trades off"] if any(isinstance(rule, Pareto) for rule in rules) else []
        self.names = ["likely", "never improves", "always improves", *trading] if self._signs else ["any"]

    def metrics(self, name: str) -> Iterator[dict[str, float]]:
        """Yield the metrics of each report, under one assumption."""
        noise = random.Random(self._seed)  # noqa: S311 - a curve, not a secret
        for number in range(self._reports):
            sparsity = self._sparsity(number // self._per_epoch)
            if name == "trades off":
                values, sparsity = self._traded(number, sparsity + number * _STEP)
            else:
                values = {metric: sign * self._quality(name, number, noise) for metric, sign in self._signs.items()}
            yield values | dict.fromkeys(self._sparsities, sparsity)

    def _traded(self, number: int, sparsity: float) -> tuple[dict[str, float], float]:
        """Every second metric gains what the others lose: against the sparsity of the schedule, if rules rank by it."""
        ranked = next((metric for metric in self._signs if metric in self._sparsities), None)
        if ranked is None:
            quality, metrics = float(number), list(self._signs)
        else:
            quality = -self._signs[ranked] * sparsity
            metrics = [metric for metric in self._signs if metric not in self._sparsities]
        return {
            metric: self._signs[metric] * (quality if place % 2 == 0 else -quality)
            for place, metric in enumerate(metrics)
        }, sparsity

    def _quality(self, name: str, number: int, noise: random.Random) -> float:
        """How good a metric is at a report: more is better."""
        if name != "likely":
            return float(number) if name == "always improves" else -float(number)
        progress = (number + 1) / self._reports
        curve = 1 - math.exp(-5 * min(progress, _PEAK)) - 0.3 * max(0.0, progress - _PEAK)
        return curve + noise.gauss(0, 0.01)

    def _sparsity(self, epoch: int) -> float:
        """The sparsity of the schedule, on straight lines between its points."""
        reached = [point for point in self._schedule if point[0] <= epoch]
        coming = [point for point in self._schedule if point[0] > epoch]
        if not reached or not coming:
            return (reached[-1:] or coming[:1] or [(0, 0.0)])[0][1]
        (begin, low), (end, high) = reached[-1], coming[0]
        return low + (high - low) * (epoch - begin) / (end - begin)
