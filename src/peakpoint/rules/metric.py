"""Rules that rank checkpoints by metrics."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from peakpoint.errors import ConfigError
from peakpoint.format.metrics import is_number
from peakpoint.format.names import check_metric
from peakpoint.rules.record import (
    CheckpointRecord,
    Mode,
    NeedsParts,
    Reasons,
    by_sequence,
    check_mode,
    check_whole,
    moment_text,
    ranked,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRule(NeedsParts):
    """A rule that ranks by metrics; these arguments are common to all of them.

    Args:
        min_epoch: leave out checkpoints of earlier epochs (indices, from 0), and those outside epochs.
        warmup: leave out checkpoints of earlier steps.
        pending: also claim the newest checkpoints that have no value yet, at most this many, so that an evaluation
            elsewhere finds them; see ``Run.record``.
    """

    min_epoch: int | None = None
    warmup: int = 0
    pending: int = 0

    def _check(self) -> None:
        self._check_parts()
        rule = type(self).__name__
        if self.min_epoch is not None:
            check_whole(rule, "min_epoch", self.min_epoch, 0)
        check_whole(rule, "warmup", self.warmup, 0)
        check_whole(rule, "pending", self.pending, 0)

    @property
    def _options(self) -> str:
        options = {
            "min_epoch": self.min_epoch,
            "warmup": self.warmup or None,
            "pending": self.pending or None,
        }
        return "".join(f":{name}={value}" for name, value in options.items() if value is not None) + self._parts_text

    def considered(self, records: Iterable[CheckpointRecord]) -> list[CheckpointRecord]:
        """The records that count."""
        return [
            record
            for record in records
            if record.step >= self.warmup
            and (self.min_epoch is None or (record.epoch is not None and record.epoch >= self.min_epoch))
        ]

    def _waiting(self, records: Sequence[CheckpointRecord], metrics: Sequence[str]) -> Reasons:
        """The newest records that have no value of some metric at all; NaN is a value."""
        if not self.pending:
            return {}
        unmeasured = [record for record in by_sequence(records) if not all(name in record.metrics for name in metrics)]
        return {
            record.id: f"{', '.join(name for name in metrics if name not in record.metrics)} is not measured yet "
            f"({position} of at most {self.pending} kept for that)"
            for position, record in enumerate(reversed(unmeasured[-self.pending :]), 1)
        }


def smoothed_name(metric: str, window: int) -> str:
    """The name under which a record carries the mean of the last ``window`` values of a metric.

    No metric that is reported can have such a name.
    """
    return f"{metric}:smooth{window}"


@dataclass(frozen=True, slots=True)
class SingleMetricRule(MetricRule):
    """A rule that ranks by one metric.

    Args:
        mode: ``"max"`` when larger is better, ``"min"`` when smaller is. Required.
    """

    metric: str
    mode: Mode

    def _check(self) -> None:
        check_metric(self.metric)
        check_mode(type(self).__name__, self.mode)
        MetricRule._check(self)  # noqa: SLF001 - super() knows no class with slots

    @property
    def ranks_by(self) -> tuple[tuple[str, Mode], ...]:
        """The metric, with its direction."""
        return ((self.metric, self.mode),)


@dataclass(frozen=True, slots=True)
class Best(SingleMetricRule):
    """Claims the checkpoint with the best value of one metric.

    Args:
        mode: ``"max"`` when larger is better, ``"min"`` when smaller is. Required.
        smooth: rank by the mean of the last ``smooth`` reported values, at least 1; a single lucky evaluation then does
            not win. Reports before there are so many values do not count.
        min_epoch, warmup, pending, parts: see ``MetricRule`` and ``NeedsParts``.

    Raises:
        ConfigError: a mode or a name that cannot be.

    Example:
        >>> Best("val_accuracy", "max").text
        'best:val_accuracy:max'
        >>> Best("val_accuracy", "max", smooth=5, min_epoch=10).text
        'best:val_accuracy:max:smooth=5:min_epoch=10'
    """

    usage: ClassVar[str] = 'Best("val_accuracy", "max") or Best("val_loss", "min")'
    smooth: int = 1

    def __post_init__(self) -> None:
        self._check()
        check_whole("Best", "smooth", self.smooth)

    @property
    def text(self) -> str:
        """The compact form that ``parse`` reads."""
        smooth = "" if self.smooth == 1 else f":smooth={self.smooth}"
        return f"best:{self.metric}:{self.mode}{smooth}{self._options}"

    def claims(self, records: Sequence[CheckpointRecord]) -> Reasons:
        """The best record and its margin."""
        considered = self.considered(records)
        key, label = self.metric, self.metric
        if self.smooth > 1:
            key, label = smoothed_name(self.metric, self.smooth), f"{self.metric} over {self.smooth} reports"
            if any(self.metric in record.metrics and key not in record.metrics for record in considered):
                raise ValueError(
                    f"the records have no {key!r}, the mean of {self.metric!r} over {self.smooth} reports, which "
                    "Checkpointer and peakpoint keep add to them"
                )
        ranking = ranked(considered, key, self.mode)
        waiting = self._waiting(considered, (self.metric,))
        if not ranking:
            return waiting
        best = ranking[0]
        reason = f"best {label} ({self.mode}): {best.metrics[key]:.6g}"
        if len(ranking) > 1:
            reason += f", next {ranking[1].metrics[key]:.6g} at {moment_text(ranking[1])}"
        return {best.id: reason} | waiting


@dataclass(frozen=True, slots=True)
class TopK(SingleMetricRule):
    """Claims the ``k`` checkpoints with the best values of one metric.

    Args:
        mode: ``"max"`` or ``"min"``. Required.
        k: how many, at least 1.
        min_epoch, warmup, pending, parts: see ``MetricRule`` and ``NeedsParts``.

    Raises:
        ConfigError: an argument that cannot be.

    Example:
        >>> TopK("val_loss", "min", 3).text
        'topk:val_loss:min:3'
    """

    usage: ClassVar[str] = 'TopK("val_loss", "min", 3)'
    k: int

    def __post_init__(self) -> None:
        self._check()
        check_whole("TopK", "k", self.k)

    @property
    def text(self) -> str:
        """The compact form that ``parse`` reads."""
        return f"topk:{self.metric}:{self.mode}:{self.k}{self._options}"

    def claims(self, records: Sequence[CheckpointRecord]) -> Reasons:
        """The first ``k`` of the ranking, each with its rank."""
        considered = self.considered(records)
        ranking = ranked(considered, self.metric, self.mode)[: self.k]
        return {
            record.id: f"rank {rank} of the best {self.k} by {self.metric} ({self.mode}): "
            f"{record.metrics[self.metric]:.6g}"
            for rank, record in enumerate(ranking, 1)
        } | self._waiting(considered, (self.metric,))


def _number(rule: str, name: str, value: object, minimum: float, maximum: float) -> float:
    if not (isinstance(value, int | float) and is_number(value) and minimum <= value <= maximum):
        raise ConfigError(f"{rule}: {name} must be a number from {minimum:g} to {maximum:g}, not {value!r}")
    return float(value)


@dataclass(frozen=True, slots=True)
class BestAtSparsity(SingleMetricRule):
    """Claims the best checkpoint at each sparsity target.

    A checkpoint belongs to the target that is nearest to its sparsity (to the lower of two that are equally near), if
    that is within the tolerance.

    Args:
        mode: ``"max"`` or ``"min"``. Required.
        targets: sparsities, from 0 (dense) to 1; sorted, each once.
        tolerance: how far from a target is still at it, from 0 to 1.
        sparsity: the metric that holds the actual sparsity.
        min_epoch, warmup, pending, parts: see ``MetricRule`` and ``NeedsParts``.

    Raises:
        ConfigError: an argument that cannot be.

    Example:
        >>> BestAtSparsity("val_accuracy", "max", targets=(0.5, 0.9)).text
        'best-at:val_accuracy:max:sparsity:0.5,0.9:0.01'
    """

    usage: ClassVar[str] = 'BestAtSparsity("val_accuracy", "max", targets=(0.5, 0.9))'
    targets: tuple[float, ...] = (0.5, 0.7, 0.9)
    tolerance: float = 0.01
    sparsity: str = "sparsity"

    def __post_init__(self) -> None:
        self._check()
        check_metric(self.sparsity)
        targets: object = self.targets
        if isinstance(targets, str) or not isinstance(targets, Iterable) or not (target_list := list(targets)):
            raise ConfigError(f"BestAtSparsity: targets are numbers such as (0.5, 0.9), not {targets!r}")
        numbers = sorted({_number("BestAtSparsity", "targets", target, 0, 1) for target in target_list})
        object.__setattr__(self, "targets", tuple(numbers))
        object.__setattr__(self, "tolerance", _number("BestAtSparsity", "tolerance", self.tolerance, 0, 1))

    @property
    def text(self) -> str:
        """The compact form that ``parse`` reads."""
        targets = ",".join(f"{target!r}" for target in self.targets)
        return f"best-at:{self.metric}:{self.mode}:{self.sparsity}:{targets}:{self.tolerance!r}{self._options}"

    def target_of(self, record: CheckpointRecord) -> float | None:
        """The target that a record belongs to, None when it is near none."""
        actual = record.metrics.get(self.sparsity, math.nan)
        if not math.isfinite(actual):
            return None
        target = min(self.targets, key=lambda target: (abs(target - actual), target))
        # 0.51 is at 0.5 with a tolerance of 0.01, whatever binary fractions say
        return target if abs(target - actual) <= self.tolerance + 1e-12 else None

    def claims(self, records: Sequence[CheckpointRecord]) -> Reasons:
        """The best of each target, with its actual sparsity."""
        considered = self.considered(records)
        reasons = self._waiting(considered, (self.metric, self.sparsity))
        for target in self.targets:
            near = [record for record in considered if self.target_of(record) == target]
            ranking = ranked(near, self.metric, self.mode)
            if ranking:
                best = ranking[0]
                reason = (
                    f"best {self.metric} ({self.mode}) at {self.sparsity} {target:g}: {best.metrics[self.metric]:.6g} "
                    f"at {best.metrics[self.sparsity]:.6g}"
                )
                if len(ranking) > 1:
                    reason += f", next {ranking[1].metrics[self.metric]:.6g} at {moment_text(ranking[1])}"
                reasons[best.id] = reason
        return reasons


@dataclass(frozen=True, slots=True)
class Pareto(MetricRule):
    """Claims the checkpoints that no other beats in every objective.

    One checkpoint beats another when it is at least as good in all objectives and better in one. Of several that are
    equal in all, the earliest is claimed.

    Args:
        objectives: metric name to ``"max"`` or ``"min"``; at least two, and a value is needed in each.
        min_epoch, warmup, pending, parts: see ``MetricRule`` and ``NeedsParts``.

    Raises:
        ConfigError: an argument that cannot be.

    Example:
        >>> Pareto({"val_accuracy": "max", "sparsity": "max"}).text
        'pareto:val_accuracy:max:sparsity:max'
    """

    usage: ClassVar[str] = 'Pareto({"val_accuracy": "max", "sparsity": "max"})'
    objectives: Mapping[str, Mode] | tuple[tuple[str, Mode], ...]

    def __post_init__(self) -> None:
        objectives = self.objectives.items() if isinstance(self.objectives, Mapping) else self.objectives
        try:
            pairs = tuple((name, mode) for name, mode in objectives)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f'Pareto takes objectives such as {{"accuracy": "max", "sparsity": "max"}}, not {self.objectives!r}'
            ) from error
        for name, mode in pairs:
            check_metric(name)
            check_mode("Pareto", mode)
        if len({name for name, _ in pairs}) < 2 or len({name for name, _ in pairs}) < len(pairs):
            raise ConfigError("Pareto needs two objectives or more, each once; for one use Best")
        object.__setattr__(self, "objectives", pairs)
        self._check()

    @property
    def ranks_by(self) -> tuple[tuple[str, Mode], ...]:
        """The objectives, with their directions."""
        return tuple(self.objectives.items()) if isinstance(self.objectives, Mapping) else self.objectives

    @property
    def text(self) -> str:
        """The compact form that ``parse`` reads."""
        return "pareto:" + ":".join(f"{name}:{mode}" for name, mode in self.ranks_by) + self._options

    def claims(self, records: Sequence[CheckpointRecord]) -> Reasons:
        """The front, each with its values."""
        considered = self.considered(records)
        names = [name for name, _ in self.ranks_by]
        complete = [
            record for record in considered if all(math.isfinite(record.metrics.get(name, math.nan)) for name in names)
        ]
        signs = [-1.0 if mode == "max" else 1.0 for _, mode in self.ranks_by]
        points = {
            record.id: tuple(sign * record.metrics[name] for sign, name in zip(signs, names, strict=True))
            for record in complete
        }
        # sorted so, nobody is beaten by a later one
        front: list[CheckpointRecord] = []
        for record in sorted(complete, key=lambda record: (points[record.id], record.sequence)):
            point = points[record.id]
            if not any(all(a <= b for a, b in zip(points[rival.id], point, strict=True)) for rival in front):
                front.append(record)
        objectives = " and ".join(f"{name} ({mode})" for name, mode in self.ranks_by)
        return {
            record.id: f"Pareto-optimal in {objectives}: {', '.join(f'{record.metrics[name]:.6g}' for name in names)} "
            f"({len(front)} of {len(complete)} checkpoints are)"
            for record in front
        } | self._waiting(considered, names)
