"""The changelog of production: changes of aliases, refused releases, and validations."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from peakpoint.errors import ConfigError, CorruptError, FormatError, NotFoundError, StoreError
from peakpoint.format import layout
from peakpoint.format.events import Promoted
from peakpoint.format.metrics import metrics_to_json
from peakpoint.reports.changelog.entries import FORCED, ChangelogEntry
from peakpoint.repository import aliases, journal, releases, validations
from peakpoint.repository.alias_holders import newest_of_all
from peakpoint.repository.aliases import AliasRecord, AliasTarget
from peakpoint.repository.run import Run
from peakpoint.store import Store

RecordedChange = tuple[str, Promoted]
"""The change of an alias that a journal tells of, with the run of the journal."""


def of_aliases(store: Store, changes: Collection[RecordedChange]) -> Iterator[ChangelogEntry]:
    """Yield every change of every alias, and damage: unreadable records, and those that differ from the journals."""
    newest, unread = newest_of_all(store)
    names = sorted(newest.keys() | unread.keys())
    for alias in names:
        try:
            history = aliases.history(store, alias)
        except (NotFoundError, StoreError):
            if alias in unread:
                yield ChangelogEntry(at=None, kind="damage", alias=alias, why=f"cannot be read: {unread[alias]}")
            continue
        records = {record.number: record for record in history.records}
        for record in history.records:
            yield _change(record, records.get(record.number - 1))
        for text in history.damage:
            yield ChangelogEntry(at=None, kind="damage", alias=alias, why=text)
        unreadable = set(aliases.numbers(store, alias)) - records.keys()
        of_alias = [change for change in changes if change[1].alias == alias and change[1].record not in unreadable]
        yield from _broken(of_alias, {record.number: record.digest for record in history.records})
    absent = [change for change in changes if unread.keys().isdisjoint(_directories_of(change[1].alias))]
    yield from _broken([change for change in absent if change[1].alias not in names], {})


def _directories_of(alias: str) -> tuple[str, str, str]:
    """What has to be listed to find an alias, as ``newest_of_all`` names it."""
    return layout.ALIASES, alias.partition("/")[0], alias


def _broken(changes: Iterable[RecordedChange], digests: Mapping[int, str]) -> Iterator[ChangelogEntry]:
    for run, change in changes:
        if change.record is not None and digests.get(change.record) != change.digest:
            problem = "was changed since" if change.record in digests else "is missing"
            key = layout.alias_key(change.alias, change.record)
            why = f"{key} {problem}: the journal of {run} says that it was made"
            yield ChangelogEntry(at=None, kind="damage", run=run, alias=change.alias, why=why)


def _change(record: AliasRecord, previous: AliasRecord | None) -> ChangelogEntry:
    target, previous_target = record.target, None if previous is None else previous.target
    details: dict[str, Any] = {"record": record.number}
    if previous is None and record.number > 1:
        details["former"] = "not known: the record before cannot be read"
    if target is not None:
        details |= {"id": target.checkpoint, "manifest": target.manifest}
    if previous_target is not None:
        details |= {"former_id": previous_target.checkpoint, "former_run": previous_target.run}
    evidence = {
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
        checkpoint=_ref(target),
        alias=record.alias,
        by=record.by,
        why=record.why,
        before=_ref(previous_target),
        after=_ref(target),
        details=details | {name: value for name, value in evidence.items() if value},
    )


def _ref(target: AliasTarget | None) -> str | None:
    return None if target is None else f"{target.run}/{target.name}"


def of_validations(run: Run) -> Iterator[ChangelogEntry]:
    """Yield every validation of a run's checkpoints, also of those that were removed."""
    for checkpoint in validations.checkpoints_with(run.store, run.name):
        records, damage = validations.readable(run.store, run.name, checkpoint)
        for text in damage.values():
            yield ChangelogEntry(at=None, kind="damage", run=run.name, why=text, details={"id": checkpoint})
        for record in records:
            failures = [f"{finding.check}: {finding.said}" for finding in record.failures]
            yield ChangelogEntry(
                at=record.at,
                kind="validated",
                run=run.name,
                checkpoint=f"{run.name}/{record.name}",
                alias=record.alias,
                by=record.by,
                why="; ".join(failures),
                after="passed" if record.passed else "failed",
                details={
                    "id": checkpoint,
                    "number": record.number,
                    "digest": record.digest,
                    "failures": failures,
                    "checks": len(record.findings),
                    "metrics": metrics_to_json(record.metrics),
                    "against": record.against,
                },
            )


def recorded_changes(run: Run, contents: journal.JournalContents) -> list[RecordedChange]:
    """Return the changes of aliases that the journal of a run tells of."""
    promoted = [event for event in contents.events if isinstance(event, Promoted)]
    return [(run.name, event) for event in promoted if event.record is not None and event.digest is not None]


def of_releases(store: Store) -> Iterator[ChangelogEntry]:
    """Yield releases that an earlier version put on record as refused; promotions stand in the aliases' records."""
    for release in releases.release_ids(store):
        try:
            record = releases.read_release(store, release)
        except (ConfigError, CorruptError, FormatError) as error:
            yield ChangelogEntry(at=None, kind="damage", why=str(error))
            continue
        if record.outcome == "refused":
            yield ChangelogEntry(
                at=record.at,
                kind="refused",
                run=record.candidate.run,
                checkpoint=_ref(record.candidate),
                alias=record.alias,
                by=record.by,
                why="; ".join(record.reasons),
                before=_ref(record.former),
                details={"release": release, "id": record.candidate.checkpoint, "validation": record.validation},
            )
