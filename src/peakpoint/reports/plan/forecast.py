"""A forecast of what a training will write and keep.

The run is simulated with the rules themselves: every report is put to them, and after every save retention decides, as
in a training. The metrics are not known beforehand, so the run is simulated once under each of ``ASSUMPTIONS``.
"""

import itertools
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from peakpoint.errors import ConfigError
from peakpoint.format import layout
from peakpoint.format.events import Reported
from peakpoint.format.manifest import FileRecord, Manifest
from peakpoint.format.names import did_you_mean
from peakpoint.reports.plan.curves import ASSUMPTIONS, AssumedMetrics
from peakpoint.reports.plan.intervals import Failures
from peakpoint.reports.plan.sizes import REST, Sizes, check_whole, from_state, stalled_seconds
from peakpoint.rules import BestAtSparsity, Budget, Every, Pareto, Rule, check_rules
from peakpoint.rules.simulate import simulate, simulated_checkpoint, with_smoothed

MOST_REPORTS = 20_000  # every one is put to every rule
MOST_WITH_PARETO = 500  # whose work grows with the square of what it keeps

# The size of an archive, as a fraction of its checkpoints: docs/performance.md measures it on consecutive checkpoints
# of a small transformer with AdamW. It depends on how close checkpoints are.
ARCHIVE_RATIO = {"float32": 0.76, "bfloat16": 0.49}
_START = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """The simulated run under one assumption about the metrics.

    Attributes:
        name: of the assumption, in ``ASSUMPTIONS``.
        assumption: in a sentence.
        saves: checkpoints that are written in all.
        kept: checkpoints at the end.
        whole: how many of these still have all their parts.
        most: checkpoints at most at one time.
        bytes_kept: at the end; shared files count once.
        bytes_most: at most at one time.
        bytes_written: by all saves, without the files that a save shares with the checkpoint before.
        claims: how many checkpoints each rule claims at the end.
        gaps: reports between two saves, from the beginning to the end.
    """

    name: str
    assumption: str
    saves: int
    kept: int
    whole: int
    most: int
    bytes_kept: int
    bytes_most: int
    bytes_written: int
    claims: Mapping[str, int]
    gaps: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run will write and keep.

    Attributes:
        sizes: of one checkpoint.
        rules: in their text form.
        outlooks: one for each assumption about the metrics, the likely one first; a single one if no rule looks at
            metrics.
        idle: rules that claim nothing under any assumption.
        epoch_seconds: of one epoch without saves; None when it is not known.
    """

    sizes: Sizes
    rules: tuple[str, ...]
    epochs: int
    reports: int
    outlooks: tuple[Outlook, ...]
    idle: tuple[str, ...]
    epoch_seconds: float | None

    @property
    def likely(self) -> Outlook:
        """The outlook of metrics that rise and then degrade."""
        return self.outlooks[0]

    def span(self, figure: str) -> tuple[int, int]:
        """Return the least and the most of a figure over all outlooks, such as ``"bytes_kept"``."""
        values = [getattr(outlook, figure) for outlook in self.outlooks]
        return min(values), max(values)

    @property
    def naive_bytes(self) -> int:
        """The size of a whole checkpoint of every epoch, written and kept."""
        return self.epochs * self.sizes.bytes

    def overhead(self, failures: Failures) -> float | None:
        """Return the expected time that saves and failures cost under these rules, as a fraction of the work.

        Each stretch of work between two saves counts by itself; see ``Failures.overhead``. None when the time of an
        epoch is not known.
        """
        seconds = self._report_seconds
        if seconds is None:
            return None
        gaps = self.likely.gaps
        return sum(gap * (1 + failures.overhead(gap * seconds)) for gap in gaps) / sum(gaps) - 1

    def waits(self, failures: Failures) -> bool:
        """Whether a save has to wait for the one before; False when the time of an epoch is not known."""
        seconds = self._report_seconds
        return seconds is not None and min(self.likely.gaps) * seconds + failures.stall < failures.durable

    @property
    def _report_seconds(self) -> float | None:
        """The time of work between two reports."""
        return None if self.epoch_seconds is None else self.epoch_seconds * self.epochs / self.reports


def forecast(
    state: Mapping[str, Any] | Sizes,
    *,
    keep: Iterable[Rule],
    epochs: int,
    reports_per_epoch: int = 1,
    steps_per_epoch: int | None = None,
    epoch_time: timedelta | None = None,
    sparsity: Mapping[int, float] | None = None,
    seed: int = 0,
) -> Forecast:
    """Forecast what a run will write and keep under some rules.

    Args:
        state: the state for ``Checkpointer``, before the first step or after it; or sizes.
        steps_per_epoch: optimizer steps; rules that count steps need it.
        epoch_time: the time of an epoch without saves; rules that go by time need it.
        sparsity: epoch to the sparsity that is reached there, for rules that look at it; straight lines in between.
        seed: of the metrics that rise and then degrade.

    Raises:
        ConfigError: an impossible argument, or a rule that needs one that is missing.

    Example:
        >>> import torch, peakpoint as pp
        >>> plan = pp.forecast({"model": torch.nn.Linear(1000, 1000)}, keep=[pp.Last(3)], epochs=100)
        >>> [(part.name, part.bytes) for part in plan.sizes.parts]
        [('model', 4008096), ('rest', 13800)]
        >>> plan.likely.kept, plan.likely.saves, plan.naive_bytes
        (3, 100, 402189600)
    """
    sizes = state if isinstance(state, Sizes) else from_state(state)
    rules, sparsity = check_rules(keep), sparsity or {}
    seconds = None if epoch_time is None else epoch_time.total_seconds()
    _check_length(rules, epochs, reports_per_epoch, steps_per_epoch, seconds)
    _check_rules(rules, sizes, steps_per_epoch, seconds, sparsity)
    reports = epochs * reports_per_epoch
    assumed = AssumedMetrics(rules, reports, reports_per_epoch, sparsity, seed)
    run = _PlannedRun(rules, sizes, reports_per_epoch, steps_per_epoch or 1, (seconds or 60.0) / reports_per_epoch)
    simulations = [run.simulate(name, assumed.metrics(name)) for name in assumed.names]
    claiming = set().union(*(claiming for _, claiming in simulations))
    return Forecast(
        sizes=sizes,
        rules=tuple(rule.text for rule in rules),
        epochs=epochs,
        reports=reports,
        outlooks=tuple(outlook for outlook, _ in simulations),
        idle=tuple(rule.text for rule in rules if rule.text not in claiming and not isinstance(rule, Budget)),
        epoch_seconds=seconds,
    )


def _check_length(
    rules: Sequence[Rule], epochs: int, reports_per_epoch: int, steps_per_epoch: int | None, seconds: float | None
) -> None:
    if not rules:
        raise ConfigError("no rules: give some, such as Last(3)")
    check_whole("epochs", epochs)
    check_whole("reports_per_epoch", reports_per_epoch)
    check_whole("steps_per_epoch", 1 if steps_per_epoch is None else steps_per_epoch)
    reports = epochs * reports_per_epoch
    limit = MOST_WITH_PARETO if any(isinstance(rule, Pareto) for rule in rules) else MOST_REPORTS
    if reports > limit:
        raise ConfigError(
            f"{reports} reports are more than the {limit} that a plan simulates under these rules: plan fewer epochs"
        )
    if seconds is not None and seconds <= 0:
        raise ConfigError(f"epoch_time is {seconds} seconds; it must be above 0")


def _check_rules(
    rules: Sequence[Rule], sizes: Sizes, steps: int | None, seconds: float | None, sparsity: Mapping[int, float]
) -> None:
    """Refuse rules that depend on something that is not given."""
    for rule in rules:
        if steps is None and ((isinstance(rule, Every) and rule.steps) or getattr(rule, "warmup", 0)):
            raise ConfigError(
                f"rule {rule.text} counts steps: say how many an epoch has, with steps_per_epoch (--steps-per-epoch)"
            )
        if seconds is None and isinstance(rule, Every) and rule.minutes:
            raise ConfigError(
                f"rule {rule.text} goes by time: say how long an epoch takes, with epoch_time (--epoch-time 5min)"
            )
        if isinstance(rule, BestAtSparsity) and not sparsity:
            raise ConfigError(
                f"rule {rule.text} looks at {rule.sparsity!r}, which a plan does not know: say which sparsity is "
                "reached at which epoch, with sparsity (--sparsity 0:0,50:0.9)"
            )
        _check_parts(rule, [part.name for part in sizes.parts if part.name != REST])
    for epoch, value in sparsity.items():
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0 or not 0 <= value <= 1:
            raise ConfigError(f"sparsity {epoch!r}:{value!r} must be an epoch, at least 0, and a number from 0 to 1")


def _check_parts(rule: Rule, parts: Sequence[str]) -> None:
    for part in rule.needs or ():
        if part not in parts:
            near = did_you_mean(part, parts)
            raise ConfigError(f"rule {rule.text} needs a part {part!r}; the parts are {', '.join(parts)}{near}")


# --- simulating ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _PlannedRun:
    rules: tuple[Rule, ...]
    sizes: Sizes
    reports_per_epoch: int
    steps_per_epoch: int
    report_seconds: float

    def simulate(self, name: str, metrics: Iterable[Mapping[str, float]]) -> tuple[Outlook, set[str]]:
        """Simulate the run; return also the rules that have claimed anything."""
        reports = self._checkpoints(metrics)
        existing: tuple[Manifest, ...] = ()
        claims: Counter[str] = Counter()
        claiming: set[str] = set()
        saved_at, most, bytes_most, written = [0], 0, 0, 0
        for save in simulate(self.rules, reports):
            claiming.update(claim.rule for claim in save.claims)
            saved_at.append(save.checkpoint.report)
            written += save.checkpoint.size_bytes - (_frozen(save.checkpoint.files) if len(saved_at) > 2 else 0)
            most, bytes_most = max(most, len(save.before)), max(bytes_most, _on_disk(save.before))
            existing = save.existing
            claims = Counter(claim.rule for reasons in save.plan.keep.values() for claim in reasons)
        ends = [*saved_at, len(reports)] if len(reports) > saved_at[-1] else saved_at
        parts = len(reports[0].parts)
        outlook = Outlook(
            name=name,
            assumption=ASSUMPTIONS[name],
            saves=len(saved_at) - 1,
            kept=len(existing),
            whole=sum(len(checkpoint.parts) == parts for checkpoint in existing),
            most=most,
            bytes_kept=_on_disk(existing),
            bytes_most=bytes_most,
            bytes_written=written,
            claims={rule.text: claims[rule.text] for rule in self.rules if not isinstance(rule, Budget)},
            gaps=tuple(end - begin for begin, end in itertools.pairwise(ends)),
        )
        return outlook, claiming

    def _checkpoints(self, metrics: Iterable[Mapping[str, float]]) -> list[Manifest]:
        """Each report as the checkpoint that it could become."""
        parts, files = _files(self.sizes)
        return [
            simulated_checkpoint(
                number,
                number * self.steps_per_epoch // self.reports_per_epoch,
                (number - 1) // self.reports_per_epoch,
                values,
                _START + timedelta(seconds=number * self.report_seconds),
                parts,
                files,
            )
            for number, values in enumerate(with_smoothed(self.rules, metrics), 1)
        ]


_SHARED = "+frozen.safetensors"


def _files(sizes: Sizes) -> tuple[dict[str, tuple[str, ...]], tuple[FileRecord, ...]]:
    """The parts and files of a checkpoint, as in a manifest."""
    parts: dict[str, tuple[str, ...]] = {}
    files = []
    for part in sizes.parts:
        if part.name == REST:
            files.append(FileRecord(name=layout.STATE, size=part.bytes, digest=""))
            continue
        by_name = {f"{part.name}.safetensors": part.bytes - part.frozen, f"{part.name}{_SHARED}": part.frozen}
        files_of_part = [FileRecord(name=name, size=size, digest="") for name, size in by_name.items() if size]
        parts[part.name] = tuple(file.name for file in files_of_part)
        files += files_of_part
    return parts, tuple(files)


def _frozen(files: Iterable[FileRecord]) -> int:
    return sum(file.size for file in files if file.name.endswith(_SHARED))


def _on_disk(checkpoints: Sequence[Manifest]) -> int:
    """The bytes of all files; shared files count once."""
    shared = {file.name: file for checkpoint in checkpoints for file in checkpoint.files}
    return sum(checkpoint.size_bytes - _frozen(checkpoint.files) for checkpoint in checkpoints) + _frozen(
        shared.values()
    )


# --- from a run that exists ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often a run reports.

    Attributes:
        epochs: how many it has reached; 0 outside epochs.
        reports_per_epoch: the median, 1 outside epochs.
        steps: between two reports, the median; None for fewer than two reports.
        seconds: of work between two reports, the median; None for fewer than two reports.
    """

    epochs: int
    reports_per_epoch: int
    steps: float | None
    seconds: float | None


def pace(reports: Sequence[Reported], manifests: Iterable[Manifest] = (), saved: Collection[int] = ()) -> Pace:
    """Measure how often a run reports; the time for which saves stalled the loop is not work.

    Args:
        reports: those that count, earliest first.
        manifests: the checkpoints of the run, which record their stalls.
        saved: the numbers of the reports that were saved; where the checkpoint was removed, the mean stall is assumed.
    """
    counts = Counter(report.epoch for report in reports if report.epoch is not None)
    pairs = list(itertools.pairwise(reports))
    stalls = {manifest.report: stalled_seconds(manifest) for manifest in manifests}
    mean_stall = statistics.fmean(stalls.values()) if stalls else 0.0
    work = [
        (later.at - earlier.at).total_seconds()
        - stalls.get(earlier.report, mean_stall if earlier.report in saved else 0.0)
        for earlier, later in pairs  # a report is written down before it is saved
    ]
    return Pace(
        epochs=max(counts, default=-1) + 1,
        reports_per_epoch=round(statistics.median(counts.values())) if counts else 1,
        steps=statistics.median(later.step - earlier.step for earlier, later in pairs) if pairs else None,
        seconds=max(0.0, statistics.median(work)) if work else None,
    )
