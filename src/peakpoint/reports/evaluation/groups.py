"""Runs side by side: by optimizer, or by their names."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from peakpoint.errors import ConfigError, NotFoundError
from peakpoint.format.names import did_you_mean, listing
from peakpoint.format.settings import SETTING
from peakpoint.reports.evaluation.noise import CONFIDENCE, Interval, welch
from peakpoint.reports.evaluation.peaks import RunPeak
from peakpoint.reports.evaluation.run_data import RunData
from peakpoint.rules import Mode

UNKNOWN = "(not known)"
NO_MATCH = "(no match)"
LEFT_OVER = (UNKNOWN, NO_MATCH)
"""Groups of runs that have nothing in common; nothing is compared with them."""

_OTHERS_IN_OPTIM = ("torch.optim.lr_scheduler.", "torch.optim.swa_utils.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunGroup:
    """What the runs of one kind came to.

    Attributes:
        name: what they have in common.
        runs: their names.
        best: the mean over runs of the best value.
        best_spread: the standard deviation of it; None for one run.
        best_of_all: the best value of any of the runs.
        last: the mean of the last value; may be NaN.
        lost: the mean of what was lost since the best; may be NaN.
        values: the mean number of values of a run; the best of more values is better by chance.
        against: the difference of ``best`` to that of the group with the best mean, with its interval; None for that
            group, and where there are not two runs in each, or none of them differ.
    """

    name: str
    runs: tuple[str, ...]
    best: float
    best_spread: float | None
    best_of_all: float
    last: float
    lost: float
    values: float
    against: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """One metric, by groups; the group with the best mean comes first, runs of no group last.

    Attributes:
        by: what the runs are grouped by.
        metric: which metric.
        mode: its direction.
        groups: at least one.
        note: how to read it.
    """

    by: str
    metric: str
    mode: Mode
    groups: tuple[RunGroup, ...]
    note: str


def group_key(by: str) -> Callable[[RunData], str]:
    r"""Return what says to which group a run belongs.

    Args:
        by: ``"optimizer"``; a setting such as ``"config.lr"``; or a regular expression with one group, which is
            searched for in the run's name.

    Raises:
        ConfigError: it is neither.

    Example:
        >>> from types import SimpleNamespace as Run
        >>> group_key(r"-(\w+)-seed")(Run(name="resnet50-adamw-seed1"))
        'adamw'
    """
    if by == "optimizer":
        return lambda run: optimizer_of(run.state)
    if is_setting(by):
        return lambda run: run.settings.texts().get(by.removeprefix(SETTING), UNKNOWN)
    try:
        pattern = re.compile(by)
    except re.error as error:
        raise ConfigError(f"--group-by {by!r} is not a regular expression: {error}") from error
    if pattern.groups != 1:
        raise ConfigError(
            f"--group-by {by!r} must be optimizer, a setting such as config.lr, or a regular expression with exactly "
            "one group, such as "
            r"'-(sgd|adamw)-'"
        )

    def matched_group(run: RunData) -> str:
        match = pattern.search(run.name)
        return (match and match[1]) or NO_MATCH

    return matched_group


def is_setting(by: str) -> bool:
    """Whether runs are grouped by one of their settings; a regular expression has a group, and so a parenthesis."""
    return by.startswith(SETTING) and "(" not in by


def check_setting(runs: Sequence[RunData], by: str) -> None:
    """Refuse to group by a setting that no run has.

    Raises:
        NotFoundError: names near ones.
    """
    names = sorted({SETTING + name for run in runs for name in run.settings.flat()})
    if runs and is_setting(by) and by not in names:
        settings = f"settings: {listing(names, 20) or 'none'}"
        raise NotFoundError(f"--group-by: no run here has a setting {by}{did_you_mean(by, names)}; {settings}")


def optimizer_of(state: Mapping[str, str]) -> str:
    """Name the classes of the optimizers among the parts: those of torch.optim, and parts that are called so.

    Example:
        >>> optimizer_of({"model": "torch.nn.modules.linear.Linear", "optimizer": "torch.optim.adamw.AdamW"})
        'AdamW'
    """
    names = [
        kind.rpartition(".")[2]
        for part, kind in state.items()
        if (kind.startswith("torch.optim.") and not kind.startswith(_OTHERS_IN_OPTIM)) or part.startswith("optim")
    ]
    return " + ".join(names) or UNKNOWN


def compare_groups(runs: Sequence[RunData], run_peaks: Sequence[RunPeak], by: str) -> list[Grouping]:
    """Group the peaks by metric and kind of run; metrics of a single run are left out."""
    key = group_key(by)
    kinds = {run.name: key(run) for run in runs}
    metrics: defaultdict[tuple[str, Mode], defaultdict[str, list[RunPeak]]] = defaultdict(lambda: defaultdict(list))
    for run_peak in run_peaks:
        if run_peak.window == 1:
            metrics[run_peak.peak.metric, run_peak.peak.mode][kinds[run_peak.run]].append(run_peak)
    return [
        _grouping(by, metric, mode, members)
        for (metric, mode), members in metrics.items()
        if sum(map(len, members.values())) > 1
    ]


def _grouping(by: str, metric: str, mode: Mode, members: Mapping[str, list[RunPeak]]) -> Grouping:
    sign = -1 if mode == "max" else 1
    ordered = sorted(
        members,
        key=lambda name: (name in LEFT_OVER, sign * mean(run_peak.peak.best for run_peak in members[name]), name),
    )
    # each pair could have been the one that is looked at: Bonferroni. Source: Dunn, JASA 56, 1961
    pairs = max(1, math.comb(len(ordered), 2))
    confidence = 1 - (1 - CONFIDENCE) / pairs
    first = [run_peak.peak.best for run_peak in members[ordered[0]]]
    groups = []
    for name in ordered:
        best_values = [run_peak.peak.best for run_peak in members[name]]
        groups.append(
            RunGroup(
                name=name,
                runs=tuple(run_peak.run for run_peak in members[name]),
                best=mean(best_values),
                best_spread=_spread(best_values),
                best_of_all=max(best_values) if mode == "max" else min(best_values),
                last=mean(run_peak.peak.last for run_peak in members[name]),
                lost=mean(run_peak.peak.lost for run_peak in members[name]),
                values=mean(run_peak.peak.count for run_peak in members[name]),
                against=None if name == ordered[0] else welch(best_values, first, confidence),
            )
        )
    return Grouping(by=by, metric=metric, mode=mode, groups=tuple(groups), note=_note(groups, pairs))


def _spread(values: Sequence[float]) -> float | None:
    try:
        return stdev(values) if len(values) > 1 else None
    except OverflowError:  # values near the largest numbers
        return math.inf


def _note(groups: Sequence[RunGroup], pairs: int) -> str:
    if len(groups) == 1:
        return "all runs are in one group: there is nothing to compare"
    counts = [group.values for group in groups]
    unequal = ""
    if max(counts) > 1.1 * min(counts):
        unequal = (
            f"; runs have {min(counts):.3g} to {max(counts):.3g} values on average, and the best of more values is "
            "better by chance"
        )
    single = [group.name for group in groups if len(group.runs) == 1 and group.name != NO_MATCH]
    if single:
        return (
            f"only one run of {listing(single)}: the difference may come from the seed; train each kind with several "
            f"seeds{unequal}"
        )
    together = f", which hold together for all {pairs} pairs" if pairs > 1 else ""
    return f"95 % confidence intervals (Welch){together}; one that includes 0 shows no difference{unequal}"
