"""Metrics of a run that has not happened: what a plan assumes."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence

from peakpoint.rules import BestAtSparsity, Mode, Pareto, Rule, ranking_metrics

_PEAK = 0.65  # of the run, where a curve that rises and then degrades has its best
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
    """Metrics of a run that has not happened.

    Args:
        rules: they say which metrics there are, and in which direction.
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
        self._modes: dict[str, Mode] = {}
        for metric, mode in ranking_metrics(rules):
            self._modes.setdefault(metric, mode)
        by_sparsity = {rule.sparsity for rule in rules if isinstance(rule, BestAtSparsity)}
        self._sparsities = (by_sparsity or {"sparsity"}) if sparsity else set()
        self._points = sorted(sparsity.items())
        self._reports, self._per_epoch, self._seed = reports, per_epoch, seed
        trading = ["trades off"] if any(isinstance(rule, Pareto) for rule in rules) else []
        self.names = ["likely", "never improves", "always improves", *trading] if self._modes else ["any"]

    def metrics(self, name: str) -> Iterator[dict[str, float]]:
        """The metrics of each report, under one assumption."""
        noise = random.Random(self._seed)  # noqa: S311 - a curve, and no secret
        for number in range(self._reports):
            sparsity = self._sparsity(number // self._per_epoch)
            if name == "trades off":
                sparsity += number * _STEP
            values = {
                metric: (1 if mode == "max" else -1) * self._good(name, number, place, noise)
                for place, (metric, mode) in enumerate(self._modes.items())
            }
            if name == "trades off" and self._ranked_sparsity:
                values |= self._traded(sparsity)
            yield values | dict.fromkeys(self._sparsities, sparsity)

    @property
    def _ranked_sparsity(self) -> str | None:
        """The first metric that rules rank by and that the schedule gives."""
        return next((metric for metric in self._modes if metric in self._sparsities), None)

    def _traded(self, sparsity: float) -> dict[str, float]:
        """The other metrics, where one of them is the sparsity of the schedule: every second loses what it gains."""
        sign = 1 if self._modes[self._ranked_sparsity or ""] == "max" else -1
        others = [(metric, mode) for metric, mode in self._modes.items() if metric not in self._sparsities]
        return {
            metric: (1 if mode == "max" else -1) * (-1 if place % 2 == 0 else 1) * sign * sparsity
            for place, (metric, mode) in enumerate(others)
        }

    def _good(self, name: str, number: int, place: int, noise: random.Random) -> float:
        """How good the value of a metric is."""
        match name:
            case "never improves":
                return -float(number)
            case "always improves":
                return float(number)
            case "trades off":
                return float(number) if place % 2 == 0 else -float(number)
            case _:
                at = (number + 1) / self._reports
                peak = 1 - math.exp(-5 * min(at, _PEAK)) - 0.3 * max(0.0, at - _PEAK)
                return peak + noise.gauss(0, 0.01)

    def _sparsity(self, epoch: int) -> float:
        before = [point for point in self._points if point[0] <= epoch]
        after = [point for point in self._points if point[0] > epoch]
        if not before or not after:
            return (before[-1:] or after[:1] or [(0, 0.0)])[0][1]
        (left, low), (right, high) = before[-1], after[0]
        return low + (high - low) * (epoch - left) / (right - left)
