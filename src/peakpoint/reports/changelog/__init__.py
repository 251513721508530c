"""The changelog: everything that was done in a repository, from its records alone.

::

    import peakpoint as pp
    from peakpoint.reports import changelog

    for entry in changelog.entries(pp.open("runs"), since=changelog.since("7d")):
        print(entry.at, entry.kind, entry.checkpoint, entry.why)

``runs`` reads the journals, ``claims`` computes the claims that rules gave up, ``production`` reads aliases, releases
and validations; ``markdown`` writes all of it as a page.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta

from peakpoint.errors import ConfigError
from peakpoint.format.amounts import read_time
from peakpoint.format.names import did_you_mean
from peakpoint.reports.changelog import production, runs
from peakpoint.reports.changelog.entries import FORCED, KINDS, PRODUCTION, ChangelogEntry, Kind
from peakpoint.repository import journal as journals
from peakpoint.repository.provenance import Clock, utc_now
from peakpoint.repository.root import Repository
from peakpoint.repository.run import Run

__all__ = ["FORCED", "KINDS", "PRODUCTION", "ChangelogEntry", "Kind", "entries", "since", "until"]

_LONG_AGO = datetime.min.replace(tzinfo=UTC)


def entries(
    repository: Repository,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    only: Sequence[str] | None = None,
    kinds: Collection[str] | None = None,
) -> list[ChangelogEntry]:
    """Return everything that was done, earliest first, each thing once.

    Damaged records are entries themselves. They come first whatever the period, because the time of the damage is not
    known. One journal is in memory at a time, beside the entries.

    Args:
        since: the first moment of the period.
        until: the first moment after the period.
        only: names of runs; entries of other runs, and of none, are left out. A change of an alias belongs to the runs
            of its new and of its former checkpoint.
        kinds: of ``KINDS``, or ``"forced"`` for changes of aliases that were refused and made with force.

    Raises:
        NotFoundError: there is no such run.
        ConfigError: an unknown kind, a time without zone, or a period that ends before it begins.

    Example:
        >>> import tempfile, peakpoint as pp
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"x": 1}, keep=[pp.Best("acc", "max")]) as ckpt:
        ...     for step, value in enumerate((0.5, 0.7), 1):
        ...         _ = ckpt.report(step=step, acc=value)
        >>> [entry.kind for entry in entries(pp.open(root))]
        ['begun', 'saved', 'saved', 'claim lost', 'removed', 'ended']
    """
    _check(since, until, kinds or ())
    selected = [
        entry for entry in _all_entries(repository, only) if _is_within(entry, since, until) and _is_of(entry, kinds)
    ]
    # stable: entries of one moment stay in the order of the records
    return sorted(selected, key=lambda entry: runs.aware(entry.at) if entry.at else _LONG_AGO)


def _check(since: datetime | None, until: datetime | None, kinds: Collection[str]) -> None:
    names = (*KINDS, FORCED)
    for kind in kinds:
        if kind not in names:
            raise ConfigError(f"{kind!r} is not a kind of entry{did_you_mean(kind, names)}; kinds: {', '.join(names)}")
    for moment in (since, until):
        if moment is not None and moment.tzinfo is None:
            raise ConfigError(f"{moment.isoformat()} has no time zone: add +00:00 for UTC")
    if since is not None and until is not None and until <= since:
        raise ConfigError(
            f"the period from {since.isoformat()} until {until.isoformat()} is empty: give an earlier since"
        )


def _all_entries(repository: Repository, only: Sequence[str] | None) -> Iterator[ChangelogEntry]:
    errors: dict[str, str] = {}
    if only is None:
        of_runs, errors = repository.read_runs(_of_run)
    else:
        of_runs = {name: _of_run(repository.run(name)) for name in dict.fromkeys(only)}
    for run, why in errors.items():
        yield ChangelogEntry(at=None, kind="damage", run=run, why=f"the run cannot be read: {why}")
    recorded_changes: list[production.RecordedChange] = []
    for run_entries, changes in of_runs.values():
        yield from run_entries
        recorded_changes += changes
    store = repository.store
    for entry in (*production.of_aliases(store, recorded_changes), *production.of_releases(store)):
        if only is None or entry.run in only or entry.details.get("former_run") in only:
            yield entry


def _of_run(run: Run) -> tuple[list[ChangelogEntry], list[production.RecordedChange]]:
    """Return the entries of a run, and the changes of aliases that its journal tells of."""
    journal = journals.read(run.store, run.name)
    run_entries = [*runs.entries(run, journal), *production.of_validations(run)]
    return run_entries, production.recorded_changes(run, journal)


def _is_within(entry: ChangelogEntry, since: datetime | None, until: datetime | None) -> bool:
    if entry.at is None:
        return True
    moment = runs.aware(entry.at)
    return (since is None or since <= moment) and (until is None or moment < until)


def _is_of(entry: ChangelogEntry, kinds: Collection[str] | None) -> bool:
    return not kinds or entry.kind in kinds or (FORCED in kinds and entry.forced)


def since(text: str, *, clock: Clock = utc_now) -> datetime:
    """Read the beginning of a period: a time in ISO 8601, a date, or a duration such as ``"7d"`` back from now.

    Times without a zone are in UTC, as everything that Peakpoint prints. A date means its first moment.

    Raises:
        ConfigError: any other text.

    Example:
        >>> since("2026-11-20").isoformat(), since("2026-11-20T08:00+01:00").isoformat()
        ('2026-11-20T00:00:00+00:00', '2026-11-20T07:00:00+00:00')
    """
    return read_time("--since", text, clock())


def until(text: str, *, clock: Clock = utc_now) -> datetime:
    """Read the end of a period, which is not part of it; as ``since``, but a date means the end of that day.

    Raises:
        ConfigError: any other text.

    Example:
        >>> until("2026-11-20").isoformat(), until("2026-11-20T08:00").isoformat()
        ('2026-11-21T00:00:00+00:00', '2026-11-20T08:00:00+00:00')
    """
    moment = read_time("--until", text, clock())
    with contextlib.suppress(ValueError, OverflowError):
        date.fromisoformat(text)
        return moment + timedelta(days=1)
    return moment
