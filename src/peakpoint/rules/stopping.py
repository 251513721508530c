"""When to stop: a pure function of the reported history.

Nothing is kept between two starts of a run but that history, so a restart changes nothing and changed arguments apply
at once.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from peakpoint.errors import ConfigError
from peakpoint.format.metrics import is_number
from peakpoint.format.names import check_metric
from peakpoint.rules import Mode, check_mode
from peakpoint.rules.record import ArgumentCheck, check_whole


@dataclass(frozen=True, slots=True)
class EarlyStopping(metaclass=ArgumentCheck):
    """Says to stop when a metric has not improved for a while, has reached its goal, or has gone astray.

    Args:
        metric: the metric that decides; reports without it do not count.
        mode: ``"max"`` or ``"min"``. Required.
        patience: the loop stops at this many reports in a row without an improvement. At least 1.
        min_delta: a change must be larger than this to be an improvement; not negative, in the metric's own unit.
        relative: ``min_delta`` is a fraction of the best value so far instead.
        warmup: leave this many reports out of account at the beginning.
        goal: stop at a report that is at least as good as this.
        diverged: stop at a report that is worse than this; an infinity in the wrong direction is.
        stop_on_nan: stop at a NaN or an infinity; otherwise it is a report without an improvement.

    Raises:
        ConfigError: an argument that cannot be.

    Source: patience, min_delta and warm-up (``start_from_epoch``) as in Keras 3, ``keras.callbacks.EarlyStopping``;
    goal and divergence as Lightning 2.6's ``stopping_threshold`` and ``divergence_threshold``. docs/guide.md lists the
    differences; tests/rules/test_stopping_peers.py runs all three on the same curves.

    Example:
        >>> rule = EarlyStopping("val_loss", "min", patience=2)
        >>> rule.verdict([{"val_loss": 1.0}, {"val_loss": 1.1}])
        >>> rule.verdict([{"val_loss": 1.0}, {"val_loss": 1.1}, {"val_loss": 1.2}])
        'val_loss has not improved on 1 by more than 0 for 2 reports (patience 2)'
        >>> EarlyStopping("acc", "max", goal=0.9).verdict([{"acc": 0.95}])
        'acc has reached its goal: 0.95 is at least 0.9'
    """

    usage: ClassVar[str] = 'EarlyStopping("val_loss", "min", patience=10)'
    metric: str
    mode: Mode
    patience: int = 10
    min_delta: float = 0.0
    relative: bool = False
    warmup: int = 0
    goal: float | None = None
    diverged: float | None = None
    stop_on_nan: bool = False

    def __post_init__(self) -> None:
        check_metric(self.metric)
        check_mode("EarlyStopping", self.mode)
        check_whole("EarlyStopping", "patience", self.patience)
        check_whole("EarlyStopping", "warmup", self.warmup, 0)
        if not is_number(self.min_delta) or self.min_delta < 0:
            raise ConfigError(f"EarlyStopping: min_delta must be a number of at least 0, not {self.min_delta!r}")
        for name in ("goal", "diverged"):
            value = getattr(self, name)
            if value is not None and not is_number(value):
                raise ConfigError(f"EarlyStopping: {name} must be a finite number, not {value!r}")
        for name in ("relative", "stop_on_nan"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"EarlyStopping: {name} must be True or False, not {getattr(self, name)!r}")
        if self.goal is not None and self.diverged is not None and not self._better(self.goal, self.diverged):
            raise ConfigError(
                f"EarlyStopping: the goal {self.goal!r} must be better ({self.mode}) than diverged={self.diverged!r}"
            )

    def _better(self, value: float, reference: float) -> bool:
        return value > reference if self.mode == "max" else value < reference

    def verdict(self, history: Iterable[Mapping[str, float]]) -> str | None:
        """Return why to stop, None to go on.

        Args:
            history: the metrics of each report, earliest first. NaN and infinities never are improvements.
        """
        state = StoppingState(self)
        for metrics in history:
            state.report(metrics)
        return state.why


class StoppingState:
    """The verdict on a history that grows, in constant time for each report.

    Args:
        rule: the arguments.

    Attributes:
        why: why to stop; None to go on. Judges the last report with the metric: a later improvement takes it back.
    """

    def __init__(self, rule: EarlyStopping) -> None:
        self._rule = rule
        self._best, self._waited, self._reports = math.nan, 0, 0
        self.why: str | None = None

    def report(self, metrics: Mapping[str, float]) -> None:
        """Take the next report into account."""
        rule = self._rule
        if rule.metric not in metrics:
            return
        self._reports += 1
        if self._reports <= rule.warmup:
            return
        value = metrics[rule.metric]
        if self._improves(value):
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        self.why = self._judge(value)

    def _improves(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if math.isnan(self._best):
            return True
        gain = value - self._best if self._rule.mode == "max" else self._best - value
        minimum = self._rule.min_delta * abs(self._best) if self._rule.relative else self._rule.min_delta
        return gain > minimum

    def _judge(self, value: float) -> str | None:
        rule, bound = self._rule, "at least" if self._rule.mode == "max" else "at most"
        finite = math.isfinite(value)
        if rule.stop_on_nan and not finite:
            return f"{rule.metric} is {value}"
        if rule.goal is not None and finite and not rule._better(rule.goal, value):  # noqa: SLF001 - of this module
            return f"{rule.metric} has reached its goal: {value:g} is {bound} {rule.goal:g}"
        if rule.diverged is not None and rule._better(rule.diverged, value):  # noqa: SLF001
            return f"{rule.metric} has diverged: {value:g} is worse than {rule.diverged:g}"
        if self._waited < rule.patience:
            return None
        if math.isnan(self._best):
            return (
                f"{rule.metric} has not improved: no finite value for {self._waited} reports (patience {rule.patience})"
            )
        delta = f"{rule.min_delta:.3g} of it" if rule.relative else f"{rule.min_delta:g}"
        return (
            f"{rule.metric} has not improved on {self._best:g} by more than {delta} "
            f"for {self._waited} reports (patience {rule.patience})"
        )
