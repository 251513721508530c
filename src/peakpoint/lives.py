"""The lives of checkpoints as the journal tells them, gone ones too; and what other rules would have done.

Nothing here decides anything: it replays what was recorded, with the same rules as the trainer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from peakpoint import retention
from peakpoint.format.events import Event, Opened, Removed, Reported, Saved, Started, Undone
from peakpoint.format.manifest import Forks, Manifest
from peakpoint.journal import history
from peakpoint.notes import Smoothing, windows
from peakpoint.rules import Claim, Mode, Moment, Record, Rule, claims, parse, ranked, wanted, watched


@dataclass(frozen=True, slots=True)
class Life:
    """One checkpoint from its commit to its end.

    Attributes:
        saved: the commit.
        record: what rules looked at.
        removed: the end; None when it exists.
        beaten: for one that was removed: each rule in force, with what it claimed instead.
    """

    saved: Saved
    record: Moment
    removed: Removed | None
    beaten: tuple[tuple[str, tuple[str, ...]], ...] = ()


def lives(events: Iterable[Event]) -> list[Life]:
    """Every checkpoint that a run ever had, earliest first."""
    branch = Branch({}, ())
    places: dict[str | None, tuple[Branch, Saved]] = {}
    texts: tuple[str, ...] = ()
    found: dict[str, Life] = {}
    for event in events:
        match event:
            case Opened():
                texts = event.rules
            case Started():
                newest = max((saved.sequence for _, saved in places.values()), default=0)
                origin, saved = places.get(event.checkpoint, (branch, None))
                branch = origin.continued(event, saved, newest)
            case Reported():
                branch.reports[event.report] = event
            case Saved():
                places[event.checkpoint] = (branch, event)
                found[event.checkpoint] = Life(event, moment_of(event, branch), None)
            case Removed() if event.checkpoint in found:
                life = found[event.checkpoint]  # said before, when that removal came to nothing
                there = [one for one in found.values() if one.removed is None or one is life]
                names = {other.record.id: other.saved.name for other in there}
                others = [other.record for other in there]
                beaten = tuple((text, _instead(text, others, names, event.checkpoint)) for text in texts)
                found[event.checkpoint] = Life(life.saved, life.record, event, beaten)
            case Undone(checkpoint=checkpoint, parts=()) if checkpoint in found:
                life = found[checkpoint]
                found[checkpoint] = Life(life.saved, life.record, None)
            case _:
                pass
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Branch:
    """The history that a checkpoint belongs to.

    Attributes:
        reports: by their numbers.
        forks: see ``Manifest``.
    """

    reports: dict[int, Reported]
    forks: Forks

    def continued(self, start: Started, saved: Saved | None, newest: int) -> "Branch":
        """What goes on from a checkpoint of this branch, or from nothing (see ``Manifest.forks``)."""
        last = start.report if saved is None else saved.report
        reports = {number: report for number, report in self.reports.items() if number <= last}
        if saved is not None:
            fork = ((saved.sequence, newest + 1),) if newest > saved.sequence else ()
            return Branch(reports, (*self.forks, *fork))
        if start.checkpoint is None:
            return Branch(reports, ((0, newest + 1),) if newest else ())
        return Branch(reports, () if start.report == 0 else self.forks)


def moment_of(saved: Saved, branch: Branch) -> Moment:
    """What rules look at, of a checkpoint that was committed on a branch."""
    report = branch.reports.get(saved.report)
    return Moment(
        id=saved.checkpoint,
        sequence=saved.sequence,
        step=0 if report is None else report.step,
        epoch=None if report is None else report.epoch,
        metrics={} if report is None else report.metrics,
        created_at=saved.at,
        forks=branch.forks,
        size_bytes=saved.size_bytes,
    )


def _instead(text: str, records: Sequence[Record], names: Mapping[str, str], own: str) -> tuple[str, ...]:
    """What a rule claimed when a checkpoint went, newest first."""
    rule = parse(text)
    if windows([rule]):
        return ("it ranks by smoothed values, which are not recorded",)
    reasons = rule.claims(records)
    order = sorted((record for record in records if record.id in reasons), key=lambda record: -record.sequence)
    return tuple(f"{names[record.id]}: {reasons[record.id]}" for record in order if record.id != own)


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
class Peak:
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
    peaks: tuple[Peak, ...]

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
    smoothing = Smoothing(windows(rules))
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
            metrics={**report.metrics, **smoothing.derived()},
            created_at=report.at,
            size_bytes=size_bytes,
        )
        moments.append(moment)
        if wanted(rules, existing, moment):
            saves += 1
            existing.append(moment)
            most = max(most, len(existing))
            existing = _retain(existing, rules)
    why = claims(rules, existing)
    kept = tuple(Kept(moment, why.get(moment.id, (retention.NEWEST,))) for moment in existing)
    metrics = watched([*rules, *also])
    return Replay(tuple(rules), len(moments), saves, kept, most, size_bytes, tuple(_peaks(moments, existing, metrics)))


def _retain(existing: list[Moment], rules: Sequence[Rule]) -> list[Moment]:
    kept = retention.kept_ids(existing, rules, {existing[-1].id})
    return [moment for moment in existing if moment.id in kept]


def _peaks(moments: Sequence[Moment], kept: Sequence[Moment], metrics: Iterable[tuple[str, Mode]]) -> Iterable[Peak]:
    for metric, mode in metrics:
        ranking = ranked(moments, metric, mode)
        if ranking:
            best = ranking[0]
            survives = any(moment.metrics.get(metric) == best.metrics[metric] for moment in kept)
            yield Peak(metric, mode, next(moment for moment in moments if moment.id == best.id), survives)


def typical_size(manifests: Sequence[Manifest]) -> int:
    """What a checkpoint of a run takes: the mean of those that exist, 0 when there are none."""
    return sum(manifest.size_bytes for manifest in manifests) // len(manifests) if manifests else 0


__all__ = ["Branch", "Kept", "Life", "Peak", "Replay", "lives", "moment_of", "replay", "typical_size"]
