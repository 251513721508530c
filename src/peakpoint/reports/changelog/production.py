"""What was done with aliases: promoted, rolled back, retired, refused; and the validations that it rests on."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peakpoint.errors import ConfigError, CorruptError, FormatError
from peakpoint.format import layout
from peakpoint.format.events import Promoted
from peakpoint.format.metrics import metrics_to_json
from peakpoint.reports.changelog.entries import FORCED, ChangelogEntry
from peakpoint.repository import aliases, journal, releases, validations
from peakpoint.repository.aliases import AliasRecord
from peakpoint.repository.releases import ReleaseRecord
from peakpoint.repository.run import Run
from peakpoint.store import Store


@dataclass(frozen=True, slots=True)
class Promise:
    """What the journal of a run says of the record of an alias."""

    run: str
    alias: str
    record: int
    digest: str


def of_aliases(store: Store, promises: Collection[Promise]) -> Iterator[ChangelogEntry]:
    """Every change of every alias; damage of its history; records that the journals speak of and that are not there."""
    for alias in aliases.names(store):
        found = aliases.history(store, alias)
        records = {record.number: record for record in found.records}
        for record in found.records:
            yield _change(record, records.get(record.number - 1))
        for text in found.damage:
            yield ChangelogEntry(at=None, kind="damage", alias=alias, why=text)
        promised = [promise for promise in promises if promise.alias == alias]
        unreadable = set(aliases.numbers(store, alias)) - records.keys()
        yield from _broken(promised, {one.number: one.digest for one in found.records}, unreadable)
    known = set(aliases.names(store))
    yield from _broken([promise for promise in promises if promise.alias not in known], {}, set())


def _broken(
    promises: Collection[Promise], there: Mapping[int, str], unreadable: Collection[int]
) -> Iterator[ChangelogEntry]:
    for one in promises:
        if one.record in unreadable or there.get(one.record) == one.digest:
            continue  # told already, or as it was
        what = "was changed since" if one.record in there else "is missing"
        why = f"{layout.alias_key(one.alias, one.record)} {what}: the journal of {one.run} says that it was made"
        yield ChangelogEntry(at=None, kind="damage", run=one.run, alias=one.alias, why=why)


def _change(record: AliasRecord, former: AliasRecord | None) -> ChangelogEntry:
    target = record.target
    before = None if former is None or former.target is None else _ref(former)
    details: dict[str, Any] = {"record": record.number}
    if former is None and record.number > 1:
        details["former"] = "not known: the record before cannot be read"
    if target is not None:
        details |= {"id": target.checkpoint, "manifest": target.manifest}
    if former is not None and former.target is not None:
        details |= {"former_id": former.target.checkpoint, "former_run": former.target.run}
    more = {
        "restores": record.restores,
        "validation": record.validation,
        FORCED: list(record.forced),
        "comparison": record.comparison,
        "release": record.release,
    }
    return ChangelogEntry(
        at=record.at,
        kind=record.kind,
        run=None if target is None else target.run,
        checkpoint=None if target is None else _ref(record),
        alias=record.alias,
        by=record.by,
        why=record.why,
        before=before,
        after=None if target is None else _ref(record),
        details=details | {name: value for name, value in more.items() if value},
    )


def _ref(record: AliasRecord) -> str:
    assert record.target is not None
    return f"{record.target.run}/{record.target.name}"


def of_validations(run: Run) -> Iterator[ChangelogEntry]:
    """Every validation of a run's checkpoints, gone ones too."""
    for checkpoint in validations.checkpoints_with(run.store, run.name):
        found, damage = validations.readable(run.store, run.name, checkpoint)
        for text in damage:
            yield ChangelogEntry(at=None, kind="damage", run=run.name, why=text, details={"id": checkpoint})
        for one in found:
            said = [f"{finding.check}: {finding.said}" for finding in one.failures]
            details = {
                "id": checkpoint,
                "number": one.number,
                "digest": one.digest,
                "failures": said,
                "checks": len(one.findings),
                "metrics": metrics_to_json(one.metrics),
                "against": one.against,
            }
            yield ChangelogEntry(
                at=one.at,
                kind="validated",
                run=run.name,
                checkpoint=f"{run.name}/{one.name}",
                alias=one.alias,
                by=one.by,
                why="; ".join(said),
                after="passed" if one.passed else "failed",
                details=details,
            )


def promises(run: Run, reading: journal.JournalContents) -> list[Promise]:
    """The records of aliases that the journal of a run says were made."""
    return [
        Promise(run.name, event.alias, event.record, event.digest)
        for event in reading.events
        if isinstance(event, Promoted) and event.record is not None and event.digest is not None
    ]


def of_releases(store: Store) -> Iterator[ChangelogEntry]:
    """Releases that an earlier version put on record as refused; promotions stand in the records of the aliases."""
    for release in releases.release_ids(store):
        try:
            record = releases.read_release(store, release)
        except (ConfigError, CorruptError, FormatError) as error:
            yield ChangelogEntry(at=None, kind="damage", why=str(error))
            continue
        if record.outcome == "refused":
            yield _refused(record, release)


def _refused(record: ReleaseRecord, release: str) -> ChangelogEntry:
    candidate, former = record.candidate, record.former
    return ChangelogEntry(
        at=record.at,
        kind="refused",
        run=candidate.run,
        checkpoint=f"{candidate.run}/{candidate.name}",
        alias=record.alias,
        by=record.by,
        why="; ".join(record.reasons),
        before=None if former is None else f"{former.run}/{former.name}",
        details={"release": release, "id": candidate.checkpoint, "validation": record.validation},
    )
