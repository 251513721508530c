"""When to stop: a pure function of the reported history.

Nothing is counted between reports, so a restart changes nothing and a changed patience applies at once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peakpoint.errors import ConfigError
from peakpoint.names import check_metric
from peakpoint.rules import Mode, check_mode


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """Says to stop when a metric has not improved for a while.

    Args:
        metric: the metric to watch; reports without it do not count.
        mode: ``"max"`` or ``"min"``. Required.
        patience: the loop stops at this many reports in a row without an improvement. At least 1.
        min_delta: a change must be larger than this to be an improvement; not negative, in the metric's own unit.

    Raises:
        ConfigError: an argument that cannot be.

    Example:
        >>> rule = EarlyStopping("val_loss", "min", patience=2)
        >>> rule.verdict([{"val_loss": 1.0}, {"val_loss": 1.1}])
        >>> rule.verdict([{"val_loss": 1.0}, {"val_loss": 1.1}, {"val_loss": 1.2}])
        'val_loss has not improved on 1 by more than 0 for 2 reports (patience 2)'
    """

    metric: str
    mode: Mode
    patience: int = 10
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        check_metric(self.metric)
        check_mode("EarlyStopping", self.mode)
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise ConfigError(f"EarlyStopping: patience must be a whole number of at least 1, not {self.patience!r}")
        if not 0 <= self.min_delta < math.inf:
            raise ConfigError(f"EarlyStopping: min_delta must be a number of at least 0, not {self.min_delta!r}")

    def verdict(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """Why to stop, or None to go on.

        Args:
            history: the metrics of each report, earliest first. NaN and infinities never are improvements.
        """
        best, waited = math.nan, 0
        for metrics in history:
            if self.metric not in metrics:
                continue
            value = metrics[self.metric]
            gain = value - best if self.mode == "max" else best - value
            if math.isfinite(value) and (math.isnan(best) or gain > self.min_delta):
                best, waited = value, 0
            else:
                waited += 1
        if waited < self.patience:
            return None
        return (
            f"{self.metric} has not improved on {best:g} by more than {self.min_delta:g} "
            f"for {waited} reports (patience {self.patience})"
        )
