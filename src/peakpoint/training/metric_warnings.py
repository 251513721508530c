"""Warnings of metrics that are missing from a report or not finite, and of rules that never keep anything."""

import math
from collections.abc import Iterable, Mapping

from peakpoint.format.names import did_you_mean, listing
from peakpoint.rules import BestAtSparsity, Budget, Rule, ranking_metrics
from peakpoint.rules.stopping import EarlyStopping
from peakpoint.training.outcome import WarnOnce
from peakpoint.training.position import Position

_SHOWN = 10


class MetricWarnings:
    """Warns of reports that rules or early stopping cannot use."""

    def __init__(self, in_force: Iterable[Rule], stop: EarlyStopping | None) -> None:
        in_force = tuple(in_force)
        # a rule with pending= allows its metric to be measured later
        ranked = ranking_metrics(rule for rule in in_force if not getattr(rule, "pending", 0))
        self._needs = [(metric, "rules that rank by it skip") for metric, _ in ranked]
        self._needs += [] if stop is None else [(stop.metric, "early stopping does not count")]
        self._warn_once = WarnOnce()
        claiming = [rule for rule in in_force if not isinstance(rule, Budget)]
        self._names_by_rule = [_names(rule) for rule in claiming]
        self._can_rank = not all(rule.ranks_by and not getattr(rule, "pending", 0) for rule in claiming)
        self._reports = 0
        self._reported: dict[str, None] = {}

    def note(self, values: Mapping[str, float]) -> None:
        """Take a report of the history into account."""
        self._reports += 1
        self._reported |= dict.fromkeys(values)
        finite = {name for name, value in values.items() if math.isfinite(value)}
        self._can_rank = self._can_rank or any(finite.issuperset(names) for names in self._names_by_rule)

    def check(self, values: Mapping[str, float], position: Position) -> tuple[str, ...]:
        """Warn of the metrics of one report, which has been noted.

        Returns:
            The reason to save the moment although no rule claims it, if there is one: while no rule can rank at all,
            the newest epoch is kept, or the report of each power of two.
        """
        step = position.step
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
        if self._can_rank or self._reports < 2:
            return ()
        names = dict.fromkeys(name for names in self._names_by_rule for name in names)
        problems = "; ".join(map(self._problem, names))
        end = "" if problems.endswith("?") else "."
        self._warn_once(
            "nothing is kept",
            f"no rule has kept a checkpoint in {self._reports} reports: {problems}{end} Until "
            "a rule can rank, every epoch that is complete is saved, and inside epochs reports 2, 4, 8, 16, ...; the "
            "newest of these is kept",
        )
        completes_epoch = position.epoch is not None and position.batches is None
        if completes_epoch or self._reports.bit_count() == 1:
            return ("the newest: no rule can rank yet",)
        return ()

    def _problem(self, metric: str) -> str:
        if metric in self._reported:
            return f"the rules rank by {metric}, which has had no finite value"
        reported = list(self._reported)
        names = listing(reported, _SHOWN) or "no metrics"
        return f"the rules rank by {metric!r}, and the reports have {names}{did_you_mean(metric, reported)}"


def _names(rule: Rule) -> tuple[str, ...]:
    """Return the metrics without which a rule cannot rank."""
    sparsity = (rule.sparsity,) if isinstance(rule, BestAtSparsity) else ()
    return tuple(name for name, _ in rule.ranks_by) + sparsity
