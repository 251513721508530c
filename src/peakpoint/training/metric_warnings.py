"""Warnings of metrics that are missing from a report or not finite, once each."""

import math
from collections.abc import Iterable, Mapping

from peakpoint.format.names import did_you_mean
from peakpoint.rules import Rule, ranking_metrics
from peakpoint.rules.stopping import EarlyStopping
from peakpoint.training.outcome import WarnOnce


class MetricWarnings:
    """Warns of reports that rules or early stopping cannot use."""

    def __init__(self, in_force: Iterable[Rule], stop: EarlyStopping | None) -> None:
        # a rule with pending= allows its metric to be measured later
        ranked = ranking_metrics(rule for rule in in_force if not getattr(rule, "pending", 0))
        self._needs = [(metric, "rules that rank by it skip") for metric, _ in ranked]
        self._needs += [] if stop is None else [(stop.metric, "early stopping does not count")]
        self._warn_once = WarnOnce()

    def check(self, values: Mapping[str, float], step: int) -> None:
        """Warn of the metrics of one report."""
        for metric, value in values.items():
            if not math.isfinite(value):
                self._warn_once(f"finite {metric}", f"{metric} is {value} at step {step}: it never counts as best")
        present_names = ", ".join(values) or "no metrics"
        for metric, effect in self._needs:
            if metric not in values:
                self._warn_once(
                    f"{effect} {metric}",
                    f"the report at step {step} has no {metric!r}: {effect} such reports; it has {present_names}"
                    f"{did_you_mean(metric, list(values))}",
                )
