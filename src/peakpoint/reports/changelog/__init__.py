"""The changelog: an account of everything that was done in a repository, from its records alone.

::

    import peakpoint as pp
    from peakpoint.reports import changelog

    for entry in changelog.entries(pp.open("runs"), since=changelog.since("7d")):
        print(entry.at, entry.kind, entry.checkpoint, entry.why)

``runs`` tells of a run, ``claims`` of claims that rules have given up, ``production`` of aliases; ``markdown`` writes
it for people.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta

from peakpoint.errors import ConfigError
from peakpoint.format.amounts import read_duration
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
    """Everything that was done, earliest first, each thing once.

    Damaged records are entries themselves. They come first and are told whatever the period: nobody knows when it
    happened. One journal is in memory at a time, besides the entries.

    Args:
        repository: of which.
        since: nothing before this time.
        until: nothing at this time or after.
        only: the names of runs: what is about others, and what is about no run, is left out. A change of an alias is
            about the run of the new holder and that of the former one.
        kinds: of ``KINDS``, or ``"forced"`` for what was refused and done all the same.

    Raises:
        NotFoundError: there is no such run.
        ConfigError: a kind that is none; a time without zone; a period that ends before it begins.

    Example:
        >>> import tempfile, peakpoint as pp
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"x": 1}, keep=[pp.Best("acc", "max")]) as ckpt:
        ...     for step, value in enumerate((0.5, 0.7), 1):
        ...         _ = ckpt.report(step=step, acc=value)
        >>> [entry.kind for entry in entries(pp.open(root))]
        ['begun', 'saved', 'saved', 'claim lost', 'removed', 'ended']
    """
    for kind in kinds or ():
        if kind not in (*KINDS, FORCED):
            raise ConfigError(
                f"{kind!r} is no kind of entry{did_you_mean(kind, [*KINDS, FORCED])}; {', '.join((*KINDS, FORCED))}"
            )
    for moment in (since, until):
        if moment is not None and moment.tzinfo is None:
            raise ConfigError(f"{moment.isoformat()} has no time zone: which moment is meant? Add +00:00 for UTC")
    if since is not None and until is not None and until <= since:
        raise ConfigError(
            f"the period from {since.isoformat()} until {until.isoformat()} is empty: give an earlier since"
        )
    chosen = repository.runs() if only is None else [repository.run(name) for name in dict.fromkeys(only)]
    found = [one for one in _all(repository, chosen, only) if _within(one, since, until) and _is_of(one, kinds)]
    return sorted(
        found, key=lambda one: runs.aware(one.at) if one.at else _LONG_AGO
    )  # stable: in the order of the records


def _all(repository: Repository, chosen: Iterable[Run], only: Sequence[str] | None) -> Iterator[ChangelogEntry]:
    promised = []
    for run in chosen:
        reading = journals.read(run.store, run.name)
        yield from runs.entries(run, reading)
        yield from production.of_validations(run)
        promised += production.promises(run, reading)
    for entry in (*production.of_aliases(repository.store, promised), *production.of_releases(repository.store)):
        if only is None or entry.run in only or entry.details.get("former_run") in only:
            yield entry


def _within(entry: ChangelogEntry, since: datetime | None, until: datetime | None) -> bool:
    if entry.at is None:
        return True
    at = runs.aware(entry.at)
    return (since is None or since <= at) and (until is None or at < until)


def _is_of(entry: ChangelogEntry, kinds: Collection[str] | None) -> bool:
    return not kinds or entry.kind in kinds or (FORCED in kinds and entry.forced)


def since(text: str, *, clock: Clock = utc_now) -> datetime:
    """The beginning of a period: a time in ISO 8601, a date, or a time span such as ``"7d"`` back from now.

    Times without a zone are in UTC, as all times that Peakpoint prints. A date means its first moment.

    Raises:
        ConfigError: it is none of these.

    Example:
        >>> since("2026-11-20").isoformat(), since("2026-11-20T08:00+01:00").isoformat()
        ('2026-11-20T00:00:00+00:00', '2026-11-20T07:00:00+00:00')
    """
    return _moment("--since", text, clock, timedelta(0))


def until(text: str, *, clock: Clock = utc_now) -> datetime:
    """The end of a period, which is not part of it; as ``since``, but a date means the end of that day.

    Raises:
        ConfigError: it is none of these.

    Example:
        >>> until("2026-11-20").isoformat(), until("2026-11-20T08:00").isoformat()
        ('2026-11-21T00:00:00+00:00', '2026-11-20T08:00:00+00:00')
    """
    return _moment("--until", text, clock, timedelta(days=1))


def _moment(name: str, text: str, clock: Clock, day: timedelta) -> datetime:
    try:
        return datetime.combine(date.fromisoformat(text), time(0), UTC) + day
    except (ValueError, OverflowError):
        pass
    try:
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    try:
        return clock() - read_duration(name, text)
    except (ConfigError, OverflowError) as error:
        raise ConfigError(
            f"{name} {text!r} is no time; give a date such as 2026-11-20, a time such as 2026-11-20T08:00 (in UTC, or "
            "with a zone such as +01:00), or a time span such as 7d"
        ) from error
