"""Rules played over a history: what others would have kept, and what it would have taken."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peakpoint.format.events import Event
from peakpoint.format.manifest import Manifest
from peakpoint.rules import Claim, Mode, Moment, Rule, claims, moment_claims, ranked, ranking_metrics
from peakpoint.rules.history import Smoothing, history, smoothing_windows
from peakpoint.rules.retention import NEWEST, kept_ids


@dataclass(frozen=True, slots=True)
class Kept:
    """A moment that would have been kept.

    Attributes:
        moment: which.
        claims: why.
    """

    moment: Moment
    claims: tuple[Claim, ...]


@dataclass(frozen=True, slots=True)
class SimulatedPeak:
    """The best moment of a run by one metric, saved or not.

    Attributes:
        metric: the metric.
        mode: its direction.
        moment: where it was reached.
        survives: whether a checkpoint of it, or of an equal value, would be there at the end.
    """

    metric: str
    mode: Mode
    moment: Moment
    survives: bool


@dataclass(frozen=True, slots=True)
class Replay:
    """What a set of rules would have done.

    Attributes:
        rules: the rules.
        reports: how many moments there were.
        saves: how many of them would have been saved.
        kept: what would be there at the end, earliest first.
        most: the largest number of checkpoints at any time.
        size_bytes: of one checkpoint, as assumed.
        peaks: of every metric that rules rank by.
    """

    rules: tuple[Rule, ...]
    reports: int
    saves: int
    kept: tuple[Kept, ...]
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


def replay(events: Sequence[Event], rules: Sequence[Rule], size_bytes: int, also: Iterable[Rule] = ()) -> Replay:
    """Play the recorded history of a run under ``rules``, as the trainer would have.

    Args:
        events: the journal; the present history counts, abandoned branches do not.
        rules: any rules.
        size_bytes: what one checkpoint takes.
        also: other rules whose metrics are of interest.
    """
    smoothing = Smoothing(smoothing_windows(rules))
    existing: list[Moment] = []
    moments: list[Moment] = []
    saves, most = 0, 0
    for number, report in enumerate(history(events), 1):
        smoothing.report(report.metrics)
        moment = Moment(
            id=str(number),
            sequence=number,
            step=report.step,
            epoch=report.epoch,
            metrics={**report.metrics, **smoothing.means()},
            created_at=report.at,
            size_bytes=size_bytes,
        )
        moments.append(moment)
        if moment_claims(rules, existing, moment):
            saves += 1
            existing.append(moment)
            most = max(most, len(existing))
            existing = _retain(existing, rules)
    why = claims(rules, existing)
    kept = tuple(Kept(moment, why.get(moment.id, (NEWEST,))) for moment in existing)
    metrics = ranking_metrics([*rules, *also])
    return Replay(tuple(rules), len(moments), saves, kept, most, size_bytes, tuple(_peaks(moments, existing, metrics)))


def _retain(existing: list[Moment], rules: Sequence[Rule]) -> list[Moment]:
    kept = kept_ids(existing, rules, {existing[-1].id})
    return [moment for moment in existing if moment.id in kept]


def _peaks(
    moments: Sequence[Moment], kept: Sequence[Moment], metrics: Iterable[tuple[str, Mode]]
) -> Iterable[SimulatedPeak]:
    for metric, mode in metrics:
        ranking = ranked(moments, metric, mode)
        if ranking:
            best = ranking[0]
            survives = any(moment.metrics.get(metric) == best.metrics[metric] for moment in kept)
            yield SimulatedPeak(metric, mode, next(moment for moment in moments if moment.id == best.id), survives)


def typical_size(manifests: Sequence[Manifest]) -> int:
    """What a checkpoint of a run takes: the mean of those that exist, 0 when there are none."""
    return sum(manifest.size_bytes for manifest in manifests) // len(manifests) if manifests else 0
