"""What a training will write and keep, before it runs.

The run is played with the rules themselves: every report is put to ``rules.moment_claims``, and after every save
``retention.plan`` says what goes, as in a training. What is not known beforehand are the metrics, so the run is played
several times, with metrics that never improve, that always improve, and that rise and then degrade.
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

# What `peakpoint archive` leaves of a byte, as docs/performance.md measures it on consecutive checkpoints of a small
# transformer with AdamW. How much it is depends on how close checkpoints are.
ARCHIVE_RATIO = {"float32": 0.76, "bfloat16": 0.49}
_START = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What the rules do if the metrics go in one way.

    Attributes:
        name: the assumption in a word.
        assumption: the assumption in a sentence.
        saves: checkpoints that are written in all.
        kept: checkpoints at the end.
        whole: how many of these still have all their parts.
        most: checkpoints at most at one time.
        bytes_kept: bytes at the end; what checkpoints share counts once.
        bytes_most: bytes at most at one time.
        bytes_written: bytes of all saves; what was shared with the checkpoint before is not written.
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
        epochs: how long the run is.
        reports: how many reports it makes.
        outlooks: one for each assumption about the metrics; one for all if no rule looks at metrics.
        idle: rules that claim nothing under any assumption.
        epoch_seconds: of one epoch, None when it is not known.
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
        """The outlook of a curve that rises and then degrades."""
        return self.outlooks[0]

    def span(self, what: str) -> tuple[int, int]:
        """The least and the most of a figure over all outlooks, such as ``"bytes_kept"``."""
        values = [getattr(outlook, what) for outlook in self.outlooks]
        return min(values), max(values)

    @property
    def naive_bytes(self) -> int:
        """What a whole checkpoint of every epoch would take, written and kept."""
        return self.epochs * self.sizes.bytes

    def overhead(self, failures: Failures) -> float | None:
        """The expected time that saves and failures cost under these rules, as a fraction of the work.

        Each stretch of work between two saves counts by itself; see ``Failures.overhead``. None when the time of an
        epoch is not known.
        """
        one = self._report_seconds
        if one is None:
            return None
        gaps = self.likely.gaps
        return sum(gap * (1 + failures.overhead(gap * one)) for gap in gaps) / sum(gaps) - 1

    def waits(self, failures: Failures) -> bool:
        """Whether a save has to wait for the one before somewhere; False when the time of an epoch is not known."""
        one = self._report_seconds
        return one is not None and min(self.likely.gaps) * one + failures.stall < failures.durable

    @property
    def _report_seconds(self) -> float | None:
        """Of work, between two reports."""
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
    """What a run will write and keep under some rules, before it runs.

    Args:
        state: what would be given to ``Checkpointer``, before the first step or after it; or sizes.
        keep: the rules.
        epochs: how many.
        reports_per_epoch: how often the loop reports.
        steps_per_epoch: optimizer steps; rules that count steps need it.
        epoch_time: how long an epoch takes without the saves; rules that go by time need it.
        sparsity: epoch to the sparsity that is reached there, for rules that look at it; straight lines in between.
        seed: of the curve that rises and then degrades.

    Raises:
        ConfigError: an argument that cannot be, or a rule that needs one that is missing.

    Example:
        >>> import torch, peakpoint as pp
        >>> model = torch.nn.Linear(1000, 1000)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> found = pp.forecast({"model": model, "optimizer": optimizer}, keep=[pp.Last(3)], epochs=100)
        >>> [(part.name, part.bytes) for part in found.sizes.parts]
        [('model', 4008096), ('optimizer', 8012104), ('rest', 14250)]
        >>> found.likely.kept, found.likely.saves, found.naive_bytes
        (3, 100, 1203445000)
    """
    sizes = state if isinstance(state, Sizes) else from_state(state)
    rules = check_rules(keep)
    if not rules:
        raise ConfigError("no rules: give some, such as Last(3)")
    check_whole("epochs", epochs)
    check_whole("reports_per_epoch", reports_per_epoch)
    check_whole("steps_per_epoch", 1 if steps_per_epoch is None else steps_per_epoch)
    reports = epochs * reports_per_epoch
    most = MOST_WITH_PARETO if any(isinstance(rule, Pareto) for rule in rules) else MOST_REPORTS
    if reports > most:
        raise ConfigError(
            f"{reports} reports are more than the {most} that a plan plays under these rules; plan a part of the run"
        )
    seconds = None if epoch_time is None else epoch_time.total_seconds()
    if seconds is not None and seconds <= 0:
        raise ConfigError(f"epoch_time={epoch_time!r} must be above 0")
    _check_rules(rules, sizes, steps_per_epoch, seconds, sparsity)
    curves = AssumedMetrics(rules, reports, reports_per_epoch, sparsity or {}, seed)
    run = _Run(rules, sizes, reports_per_epoch, steps_per_epoch or 1, (seconds or 60.0) / reports_per_epoch)
    outlooks = tuple(run.play(name, curves.metrics(name)) for name in curves.names)
    wanting = set().union(*(outlook[1] for outlook in outlooks))
    return Forecast(
        sizes=sizes,
        rules=tuple(rule.text for rule in rules),
        epochs=epochs,
        reports=reports,
        outlooks=tuple(outlook[0] for outlook in outlooks),
        idle=tuple(rule.text for rule in rules if rule.text not in wanting and not isinstance(rule, Budget)),
        epoch_seconds=seconds,
    )


def _check_rules(
    rules: Sequence[Rule],
    sizes: Sizes,
    steps: int | None,
    seconds: float | None,
    sparsity: Mapping[int, float] | None,
) -> None:
    """Refuse rules that would look at what is not known."""
    have = [part.name for part in sizes.parts if part.name != REST]
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
                f"rule {rule.text} looks at {rule.sparsity!r}, which no metric of a plan gives: say which sparsity is "
                "reached at which epoch, with sparsity (--sparsity 0:0,50:0.9)"
            )
        for part in rule.needs or ():
            if part not in have:
                raise ConfigError(
                    f"rule {rule.text} needs a part {part!r}, and there are {', '.join(have)}{did_you_mean(part, have)}"
                )
    for epoch, value in (sparsity or {}).items():
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0 or not 0 <= value <= 1:
            raise ConfigError(f"sparsity {epoch!r}:{value!r} must be an epoch, at least 0, and a number from 0 to 1")


# --- playing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Run:
    rules: tuple[Rule, ...]
    sizes: Sizes
    per_epoch: int
    steps_per_epoch: int
    report_seconds: float

    def play(self, name: str, metrics: Iterable[Mapping[str, float]]) -> tuple[Outlook, set[str]]:
        """Play the run; also says which rules have claimed anything."""
        parts, files = _files(self.sizes)
        existing: tuple[Manifest, ...] = ()
        claimed: Counter[str] = Counter()
        wanting: set[str] = set()
        saved_at, most, bytes_most, written = [0], 0, 0, 0
        reports = [
            self._moment(number, values, parts, files)
            for number, values in enumerate(with_smoothed(self.rules, metrics), 1)
        ]
        for save in simulate(self.rules, reports):
            wanting.update(claim.rule for claim in save.claims)
            saved_at.append(save.checkpoint.report)
            written += save.checkpoint.size_bytes - (_frozen(files) if len(saved_at) > 2 else 0)
            most, bytes_most = max(most, len(save.before)), max(bytes_most, _on_disk(save.before))
            existing = save.existing
            claimed = Counter(claim.rule for claims in save.plan.keep.values() for claim in claims)
        ends = [*saved_at, len(reports)] if len(reports) > saved_at[-1] else saved_at
        outlook = Outlook(
            name=name,
            assumption=ASSUMPTIONS[name],
            saves=len(saved_at) - 1,
            kept=len(existing),
            whole=sum(one.parts.keys() == parts.keys() for one in existing),
            most=most,
            bytes_kept=_on_disk(existing),
            bytes_most=bytes_most,
            bytes_written=written,
            claims={rule.text: claimed[rule.text] for rule in self.rules if not isinstance(rule, Budget)},
            gaps=tuple(after - before for before, after in itertools.pairwise(ends)),
        )
        return outlook, wanting

    def _moment(
        self,
        number: int,
        metrics: Mapping[str, float],
        parts: Mapping[str, tuple[str, ...]],
        files: tuple[FileRecord, ...],
    ) -> Manifest:
        step = number * self.steps_per_epoch // self.per_epoch
        at = _START + timedelta(seconds=number * self.report_seconds)
        return simulated_checkpoint(number, step, (number - 1) // self.per_epoch, metrics, at, parts, files)


_SHARED = "+frozen.safetensors"


def _files(sizes: Sizes) -> tuple[dict[str, tuple[str, ...]], tuple[FileRecord, ...]]:
    """A checkpoint's parts and files, as a manifest tells them."""
    parts: dict[str, tuple[str, ...]] = {}
    files = []
    for part in sizes.parts:
        if part.name == REST:
            files.append(FileRecord(name=layout.STATE, size=part.bytes, digest=""))
            continue
        moving = FileRecord(name=f"{part.name}.safetensors", size=part.bytes - part.frozen, digest="")
        still = FileRecord(name=f"{part.name}{_SHARED}", size=part.frozen, digest="")
        own = [file for file in (moving, still) if file.size]
        parts[part.name] = tuple(file.name for file in own)
        files += own
    return parts, tuple(files)


def _frozen(files: Iterable[FileRecord]) -> int:
    return sum(file.size for file in files if file.name.endswith(_SHARED))


def _on_disk(manifests: Iterable[Manifest]) -> int:
    """Bytes of all files; those that are shared count once."""
    shared = {file.name: file.size for one in manifests for file in one.files if file.name.endswith(_SHARED)}
    return sum(one.size_bytes - _frozen(one.files) for one in manifests) + sum(shared.values())


# --- from a run that exists ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a run reports.

    Attributes:
        epochs: how many it has come to; 0 outside epochs.
        reports_per_epoch: the median, 1 outside epochs.
        steps: between two reports, the median; None when there are no two.
        seconds: of work between two reports, the median; None when there are no two.
    """

    epochs: int
    reports_per_epoch: int
    steps: float | None
    seconds: float | None


def pace(reports: Sequence[Reported], manifests: Iterable[Manifest] = (), saved: Collection[int] = ()) -> Pace:
    """How a run has reported. The time in which it stood still for saves is no work, and does not count.

    Args:
        reports: those that count, earliest first.
        manifests: its checkpoints, which know how long the loop stood still for them.
        saved: the numbers of the reports that were saved; those whose checkpoint is gone have stood still as long as
            the others on average.
    """
    counts = Counter(report.epoch for report in reports if report.epoch is not None)
    pairs = list(itertools.pairwise(reports))
    still = {one.report: stalled_seconds(one) for one in manifests}
    usual = statistics.fmean(still.values()) if still else 0.0
    work = [
        (after.at - before.at).total_seconds() - still.get(before.report, usual if before.report in saved else 0.0)
        for before, after in pairs  # a report is written down before it is saved
    ]
    return Pace(
        epochs=max(counts, default=-1) + 1,
        reports_per_epoch=round(statistics.median(counts.values())) if counts else 1,
        steps=statistics.median(after.step - before.step for before, after in pairs) if pairs else None,
        seconds=max(0.0, statistics.median(work)) if work else None,
    )
