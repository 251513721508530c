"""Audit: everything in a repository that does not belong there, or is not as it was written.

Incomplete saves are what a crash leaves behind (``"litter"``): harmless, and deleted by ``clean``. Damage is bytes that
changed: reported, never touched. Foreign files are neither: Peakpoint did not write them and does not delete them.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial

from peakpoint.errors import ConflictError, FormatError, NotFoundError, StoreError
from peakpoint.format import layout
from peakpoint.format.manifest import Manifest
from peakpoint.format.sealed import digest
from peakpoint.repository import aliases, run_audit
from peakpoint.repository.findings import Audit, AuditFinding
from peakpoint.repository.journal import warn_remarks
from peakpoint.repository.provenance import Clock, utc_now
from peakpoint.repository.root import Repository
from peakpoint.store import Store

__all__ = ["Audit", "AuditFinding", "audit", "clean"]

_INDEX = "catalogue.sqlite"  # with the log and the shared memory of SQLite, and one that was damaged
_OF_A_REPOSITORY = {
    layout.REPOSITORY,
    f"{layout.RUNS}/",
    _INDEX,
    f"{_INDEX}-wal",
    f"{_INDEX}-shm",
    f"{layout.ALIASES}/",
    f"{layout.RELEASES}/",
    layout.POLICY,
}
_DAMAGED_INDEX = re.compile(r"catalogue\.damaged-[0-9a-f]{8}\.sqlite(-wal|-shm)?")
_TOP = (layout.RUNS, layout.ALIASES, layout.RELEASES)
_RELEASE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\.json")
_LOCK_NOTE = b"{}"


def audit(
    repository: Repository,
    *,
    deep: bool = False,
    progress: Callable[[Manifest], None] = lambda _: None,
    clock: Clock = utc_now,
) -> Audit:
    """Check everything, change nothing.

    Args:
        repository: to be checked.
        deep: compare every byte of every file with its digest, not only sizes.
        progress: called with each manifest when its files have been checked.
        clock: says which checkpoints in the trash are due for deletion.
    """
    result, store = Audit(deep=deep), repository.store
    blocked = run_audit.blocked_directories(store, "", _TOP)
    result.findings += [*blocked, *_outside_runs(store, deeper=not blocked)]
    for run in () if blocked else _runs(store):
        result.runs += 1
        now, busy = clock(), run_audit.writer(store, run)
        look_again = partial(run_audit.findings_of_run, store, run, Audit(deep=False), now, lambda _: None)
        first_look = run_audit.findings_of_run(store, run, result, now, progress)
        findings = _lasting(store, first_look, look_again, layout.run_prefix(run))
        result.findings += _without_writes_of(busy or run_audit.writer(store, run), run, findings)
    foreign = {finding.where for finding in result.of_kind("foreign")}
    result.findings = [
        finding for finding in result.findings if finding.kind != "litter" or finding.where not in foreign
    ]
    return result


def _runs(store: Store) -> list[str]:
    return [child.removesuffix("/") for child in store.children(layout.RUNS) if child.endswith("/")]


def _lasting(
    store: Store, findings: Iterable[AuditFinding], look_again: Callable[[], Iterable[AuditFinding]], where: str
) -> list[AuditFinding]:
    """Leave out what comes and goes while others work; of damage the first look is sure."""
    first = list(run_audit.until_refused(store, findings, where))
    sure = {"damage", "unread"}
    settled = all(finding.kind in sure for finding in first)
    second = set[AuditFinding]() if settled else set(run_audit.until_refused(store, look_again(), where))
    return [finding for finding in first if finding.kind in sure or finding in second]


def _without_writes_of(busy: str | None, run: str, findings: list[AuditFinding]) -> list[AuditFinding]:
    """Leave out the unfinished work of who writes the run."""
    if busy is None:
        return findings
    finding = AuditFinding(
        "busy", layout.run_prefix(run), f"being written by {busy}; its unfinished writes are not listed"
    )
    return [finding, *(finding for finding in findings if finding.kind != "litter")]


def _outside_runs(store: Store, *, deeper: bool) -> Iterator[AuditFinding]:
    """Look at the root, and at each of the directories in it; one that cannot be read hides no other."""
    looks = {"": partial(_of_root, store)}
    if deeper:
        looks |= {
            layout.ALIASES: partial(_aliases, store),
            layout.RELEASES: partial(_releases, store),
            layout.RUNS: partial(run_audit.strays, store, layout.RUNS, None),
        }
    for where, look in looks.items():
        yield from _lasting(store, look(), look, where)


def _of_root(store: Store) -> Iterator[AuditFinding]:
    indexes = {child for child in store.children("") if _DAMAGED_INDEX.fullmatch(child)} - store.foreign("").keys()
    yield from run_audit.strays(store, "", _OF_A_REPOSITORY | indexes)
    for key in sorted(indexes):
        yield AuditFinding("foreign", key, "a damaged catalogue that was set aside; it can be deleted")


def _releases(store: Store) -> Iterator[AuditFinding]:
    records = {child for child in store.children(layout.RELEASES) if _RELEASE.fullmatch(child)}
    yield from run_audit.strays(store, layout.RELEASES, records)


def _families(store: Store) -> dict[str, list[str]]:
    """Return the aliases of the repository, each of which may be a family, with the aliases of the family."""
    return {name: aliases.directories(store, name) for name in aliases.directories(store)}


def _aliases(store: Store) -> Iterator[AuditFinding]:
    """Find damaged records of aliases, missing checkpoints, and what else is in the directories of aliases."""
    families = aliases.directories(store)
    yield from run_audit.strays(store, layout.ALIASES, {f"{name}/" for name in families})
    for family in families:
        yield from run_audit.until_refused(store, _family(store, family), layout.alias_prefix(family))


def _family(store: Store, family: str) -> Iterator[AuditFinding]:
    """Look at the directory of an alias, and at those of a family in it."""
    nested = aliases.directories(store, family)
    for name in (family, *nested):
        numbers = aliases.numbers(store, name)
        keys = [key(name, number) for number in numbers for key in (layout.alias_key, layout.told_key)]
        expected = {key.rpartition("/")[2] for key in keys}
        expected |= {f"{alias.rpartition('/')[2]}/" for alias in nested} if name == family else set()
        yield from run_audit.strays(store, layout.alias_prefix(name), expected)
        if numbers:
            for sentence in aliases.history(store, name).damage:
                yield AuditFinding("damage", layout.alias_prefix(name), sentence)
            yield from _target(store, name)


def _target(store: Store, name: str) -> Iterator[AuditFinding]:
    """Find whether the checkpoint that an alias points at is missing or was changed."""
    try:
        record = aliases.newest(store, name)
    except FormatError:
        return  # its damage is found in the history
    if not isinstance(record, aliases.AliasRecord) or record.target is None:
        return
    key, target = layout.alias_key(name, record.number), record.target
    try:
        manifest_digest = digest(store.get(layout.manifest_key(target.run, target.name)))
    except NotFoundError:
        manifest_digest = None
    except (FormatError, StoreError) as error:
        yield AuditFinding("damage", key, f"{name} points at a checkpoint whose manifest is not a file: {error}")
        return
    if manifest_digest == target.manifest:
        return
    newest = aliases.newest(store, name)
    if newest is not None and newest.number != record.number:
        yield from _target(store, name)  # it has moved on, and what it pointed at may be removed
        return
    what = "does not exist" if manifest_digest is None else "has another manifest than when it was promoted"
    yield AuditFinding("damage", key, f"{name} points at {target.run}/{target.name}, a checkpoint that {what}")


def clean(repository: Repository, *, clock: Clock = utc_now) -> list[AuditFinding]:
    """Delete all incomplete saves, except in runs that are being written.

    Args:
        repository: to be cleaned.
        clock: says which checkpoints in the trash are due for deletion.

    Returns:
        What was deleted.
    """
    store = repository.store
    deleted: list[AuditFinding] = []
    if run_audit.blocked_directories(store, "", _TOP):
        return deleted
    for prefix in _directories_outside_runs(store):
        with contextlib.suppress(StoreError):  # the same
            deleted += run_audit.delete(store, run_audit.unfinished_writes(store, prefix))
    for run in _runs(store):
        # held by somebody, or what cannot be held or read, which the audit names
        with contextlib.suppress(ConflictError, FormatError, StoreError):
            deleted += _clean_run(store, run, clock())
    warn_remarks(store)
    return deleted


def _clean_run(store: Store, run: str, now: datetime) -> list[AuditFinding]:
    if run_audit.blocked_directories(store, layout.run_prefix(run), run_audit.DIRECTORIES):
        return []
    hold = store.hold(layout.writer_lock(run), _LOCK_NOTE)
    try:
        return run_audit.clean_run(store, run, now)
    finally:
        hold.release()


def _directories_outside_runs(store: Store) -> list[str]:
    names: list[str] = []
    with contextlib.suppress(StoreError):  # the same
        names += [name for family, nested in _families(store).items() for name in (family, *nested)]
    return ["", layout.RUNS, layout.ALIASES, *map(layout.alias_prefix, names), layout.RELEASES]
