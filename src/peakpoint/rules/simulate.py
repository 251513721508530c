"""Rules played over a run, recorded or assumed: what they would keep, and what it would take."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from peakpoint.format.events import Event
from peakpoint.format.manifest import FileRecord, Manifest
from peakpoint.rules import Claim, Mode, Rule, claims, moment_claims, ranked, ranking_metrics
from peakpoint.rules.history import Smoothing, history, smoothing_windows
from peakpoint.rules.retention import NEWEST, RetentionPlan, plan


@dataclass(frozen=True, slots=True)
class SimulatedSave:
    """A save of a simulated run, and what retention makes of it.

    Attributes:
        checkpoint: the new one.
        claims: why it is saved.
        before: the checkpoints before retention, the new one last.
        plan: what retention decides.
        existing: the checkpoints after it, without the parts that it drops.
    """

    checkpoint: Manifest
    claims: tuple[Claim, ...]
    before: tuple[Manifest, ...]
    plan: RetentionPlan
    existing: tuple[Manifest, ...]


def simulate(rules: Sequence[Rule], reports: Iterable[Manifest]) -> Iterator[SimulatedSave]:
    """Play rules over the reports of a run as a training does, and yield each save.

    Args:
        rules: the rules in force.
        reports: every report as the checkpoint that it could become, earliest first, smoothed metrics included.
    """
    existing: tuple[Manifest, ...] = ()
    for checkpoint in reports:
        reasons = moment_claims(rules, existing, checkpoint)
        if reasons:
            before = (*existing, checkpoint)
            decided = plan(before, rules)
            shrunk = {removal.manifest.id: removal.remaining for removal in decided.drop}
            existing = tuple(shrunk.get(manifest.id, manifest) for manifest in before if manifest.id in decided.keep)
            yield SimulatedSave(checkpoint, reasons, before, decided, existing)


def with_smoothed(rules: Sequence[Rule], reports: Iterable[Mapping[str, float]]) -> Iterator[dict[str, float]]:
    """Yield the metrics of each report together with those that rules smooth."""
    smoothing = Smoothing(smoothing_windows(rules))
    for metrics in reports:
        smoothing.report(metrics)
        yield {**metrics, **smoothing.means()}


def simulated_checkpoint(
    number: int,
    step: int,
    epoch: int | None,
    metrics: Mapping[str, float],
    at: datetime,
    parts: Mapping[str, tuple[str, ...]],
    files: tuple[FileRecord, ...],
) -> Manifest:
    """Return a report as the checkpoint that it could become; ``number`` is that of the report, from 1."""
    return Manifest(
        id=str(number),
        run="",
        name=str(number),
        sequence=number,
        report=number,
        step=step,
        epoch=epoch,
        metrics=metrics,
        reasons=(),
        asked=None,
        parts=parts,
        files=files,
        parent=None,
        forks=(),
        created_at=at,
        written_by={},
        timing={},
    )


# --- what other rules would have done -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeptReport:
    """A report whose checkpoint would be there at the end.

    Attributes:
        moment: the report.
        claims: why it is kept.
    """

    moment: Manifest
    claims: tuple[Claim, ...]


@dataclass(frozen=True, slots=True)
class SimulatedPeak:
    """The best report of a run by one metric, saved or not.

    Attributes:
        metric: the metric.
        mode: its direction.
        moment: where it was reached.
        survives: whether a checkpoint of it, or of an equal value, would be there at the end.
    """

    metric: str
    mode: Mode
    moment: Manifest
    survives: bool


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What a set of rules would have done.

    Attributes:
        rules: the rules.
        reports: how many reports there were.
        saves: how many of them would have been saved.
        kept: what would be there at the end, earliest first.
        most: the largest number of checkpoints at any time.
        size_bytes: of one checkpoint, as assumed.
        peaks: of every metric that rules rank by.
    """

    rules: tuple[Rule, ...]
    reports: int
    saves: int
    kept: tuple[KeptReport, ...]
    most: int
    size_bytes: int
    peaks: tuple[SimulatedPeak, ...]

    @property
    def bytes_kept(self) -> int:
        """Bytes at the end."""
        return len(self.kept) * self.size_bytes

    @property
    def bytes_written(self) -> int:
        """Bytes of all saves."""
        return self.saves * self.size_bytes


def what_if(events: Sequence[Event], rules: Sequence[Rule], size_bytes: int, also: Iterable[Rule] = ()) -> WhatIf:
    """Simulate other rules on the recorded history of a run.

    Args:
        events: the journal; the present history counts, abandoned branches do not.
        rules: any rules.
        size_bytes: what one checkpoint takes.
        also: other rules whose metrics are of interest.
    """
    past = history(events)
    files = (FileRecord(name="checkpoint", size=size_bytes, digest=""),)
    smoothed = with_smoothed(rules, (report.metrics for report in past))
    reports = [
        simulated_checkpoint(number, report.step, report.epoch, metrics, report.at, {}, files)
        for number, (report, metrics) in enumerate(zip(past, smoothed, strict=True), 1)
    ]
    saves, most = 0, 0
    existing: tuple[Manifest, ...] = ()
    for save in simulate(rules, reports):
        saves, most, existing = saves + 1, max(most, len(save.before)), save.existing
    reasons = claims(rules, existing)
    kept = tuple(KeptReport(manifest, reasons.get(manifest.id, (NEWEST,))) for manifest in existing)
    peaks = tuple(_peaks(reports, existing, ranking_metrics([*rules, *also])))
    return WhatIf(tuple(rules), len(reports), saves, kept, most, size_bytes, peaks)


def _peaks(
    reports: Sequence[Manifest], kept: Sequence[Manifest], metrics: Iterable[tuple[str, Mode]]
) -> Iterator[SimulatedPeak]:
    for metric, mode in metrics:
        ranking = ranked(reports, metric, mode)
        if ranking:
            best = reports[ranking[0].sequence - 1]
            survives = any(manifest.metrics.get(metric) == best.metrics[metric] for manifest in kept)
            yield SimulatedPeak(metric, mode, best, survives)


def typical_size(manifests: Sequence[Manifest]) -> int:
    """Return what a checkpoint of a run takes: the mean of those that exist, 0 when there are none."""
    return sum(manifest.size_bytes for manifest in manifests) // len(manifests) if manifests else 0
