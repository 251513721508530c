"""What the ranks of a training report at one moment, and what holds for all of them."""

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from peakpoint.errors import ConfigError, ConflictError

REDUCTIONS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "max": max,
    "min": min,
    "sum": sum,
}


@dataclass(frozen=True, slots=True)
class RankReport:
    """The report of one rank.

    Attributes:
        values: its metrics.
        request: the reason to save whatever the rules say; None without one.
        reduce: how the metrics of all ranks become one; None for those of rank 0.
        step: as it was given to the report; None where it is counted.
        epoch: the epoch's index; None outside epochs.
        signal: a signal of preemption that has arrived there.
    """

    values: Mapping[str, float]
    request: str | None
    reduce: str | None
    step: int | None
    epoch: int | None
    signal: signal.Signals | None


def metrics_of(reports: Sequence[RankReport]) -> Mapping[str, float]:
    """Return the metrics that hold for all ranks.

    Raises:
        ConflictError: the ranks report other steps or epochs, or only some ask for a save or a reduction.
        ConfigError: metrics are reduced that some rank does not report.
    """
    first = reports[0]
    for rank, report in enumerate(reports):
        for attribute, value, first_value in (
            ("step", report.step, first.step),
            ("epoch", report.epoch, first.epoch),
            ("save", report.request, first.request),
            ("reduce", report.reduce, first.reduce),
        ):
            if value != first_value:
                raise ConflictError(
                    f"the ranks report different moments: {attribute} is {value!r} on rank {rank} and "
                    f"{first_value!r} on rank 0; make the same report on every rank"
                )
        if first.reduce is not None and report.values.keys() != first.values.keys():
            raise ConfigError(
                f"reduce={first.reduce!r} needs the same metrics of every rank: rank {rank} reports "
                f"{', '.join(report.values) or 'none'}, and rank 0 {', '.join(first.values) or 'none'}"
            )
    if first.reduce is None:
        return first.values
    return {name: _reduced([report.values[name] for report in reports], first.reduce) for name in first.values}


def _reduced(values: Sequence[float], how: str) -> float:
    return math.nan if any(map(math.isnan, values)) else float(REDUCTIONS[how](values))


def first_signal(reports: Sequence[RankReport]) -> signal.Signals | None:
    """Return the signal of the first rank that has got one."""
    return next((report.signal for report in reports if report.signal is not None), None)
