"""The catalogue: an index of every run and checkpoint of a repository, made from its files.

It holds no truth of its own: deleting it loses nothing, and before it is asked it is brought up to date, so that a
checkpoint is found as soon as it is committed. See ``catalogue.refresh`` for how, and ``catalogue.schema`` for what.
"""

import json
import math
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import URL, Engine, func, select

from peakpoint import layout
from peakpoint.catalogue import schema
from peakpoint.catalogue.database import FILE, VARIABLE, DamagedError, connect, discard, place, set_aside, translated
from peakpoint.catalogue.pointers import Seen, pointers, refresh_aliases
from peakpoint.catalogue.reading import Known, is_current
from peakpoint.catalogue.refresh import Remembered, decoded, known_runs, read_peaks, refresh_run, remove_run
from peakpoint.catalogue.search import WINDOW
from peakpoint.catalogue.selection import Clause, Selection, Why, Wish, make_checkpoint
from peakpoint.checkpoint import Checkpoint
from peakpoint.errors import ConfigError, CorruptError, Error, NotFoundError, PeakpointWarning, StoreError
from peakpoint.peaks import Peak
from peakpoint.seal import digest
from peakpoint.store import LocalStore, Store

Progress = Callable[[int, int], None]
"""Called with the number of runs that were read, and of how many."""

__all__ = ["FILE", "VARIABLE", "Catalogue", "Clause", "Listed", "Progress", "Selection", "Why", "Wish"]
_REMEMBERED = 16
_OPEN: "weakref.WeakSet[Catalogue]" = weakref.WeakSet()


def _after_fork() -> None:
    for catalogue in _OPEN:
        catalogue._after_fork()  # noqa: SLF001 - of this module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One run, as the catalogue knows it.

    Attributes:
        name: its name.
        rules: the rules in force, as texts.
        peaks: best against last of the metrics that the rules watch.
        reports: how many count.
        checkpoints: how many exist.
        size_bytes: of their files.
        newest: when the newest was made; None without any.
        damaged: one sentence for each manifest that cannot be read.
        kept: for each metric of ``peaks``, whether a checkpoint of its best exists.
        aliases: those that point at a checkpoint of it, by name.
    """

    name: str
    rules: tuple[str, ...]
    peaks: tuple[Peak, ...]
    reports: int
    checkpoints: int
    size_bytes: int
    newest: datetime | None
    damaged: tuple[str, ...]
    kept: Mapping[str, bool]
    aliases: tuple[str, ...] = ()


def _damage(text: str) -> tuple[str, ...]:
    """What is damaged in a run, of how far it is read."""
    return tuple(one.damage for one in decoded(text).unsettled.values() if one.damage is not None)


def _dispose(*engines: Engine) -> None:
    for engine in engines:
        engine.dispose()


class Catalogue:
    """The catalogue of one repository. Safe to use from several threads, and beside others who use or write it.

    Attributes:
        window: how many rows a search in SQLite looks at first; see ``catalogue.search``.

    Args:
        store: where the repository is.
        where: a URL of PostgreSQL, or the path of a SQLite file; see ``database.place``.
        by_hand: checkpoints that are deleted without Peakpoint are missed after so many seconds; everything that it
            does itself is seen at once.

    Raises:
        ConfigError: a URL that is not served, or a catalogue of another repository.
        FormatError: a newer release made it.
        MissingExtraError: the driver of the database is not installed.
        StoreError: the database cannot be used.
    """

    def __init__(self, store: Store, where: str | None = None, *, by_hand: float = 1.0) -> None:
        self._store = store
        self._by_hand, self._looked = by_hand, -math.inf
        self._names: tuple[str | None, list[str]] = (None, [])
        self.window = WINDOW
        self._url, standing = place(store, where)
        self._disposable = standing != "named"
        self._engine, self._reading = connect(self._url)
        weakref.finalize(self, _dispose, self._engine, self._reading)
        if standing == "temporary":
            weakref.finalize(self, discard, self._url)
        self._lock = threading.Lock()
        self._known: dict[str, Known] = {}
        self._remembered: dict[str, Remembered] = {}  # those that were refreshed last
        self._unread: dict[str, str] = {}
        self._seen = Seen()
        _OPEN.add(self)
        self._tick = -1
        try:
            self._mended(self._open)
        except BaseException:
            self.close()
            raise

    @property
    def location(self) -> str:
        """The file or the URL, without a password."""
        return str(self._url.database) if self._is_file else self._url.render_as_string()

    @property
    def unread(self) -> Mapping[str, str]:
        """Runs that could not be read when they were looked at last, and why."""
        return dict(self._unread)

    @property
    def unread_aliases(self) -> Mapping[str, str]:
        """Aliases whose newest record could not be read when they were looked at last, and why."""
        return dict(self._seen.unread)

    def _after_fork(self) -> None:
        """A child has no right to its parent's connections."""
        self._engine.dispose(close=False)
        self._reading.dispose(close=False)
        self._lock = threading.Lock()
        self._tick = -1

    @property
    def _is_file(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    def close(self) -> None:
        """Let go of every connection; they come back when they are needed."""
        _dispose(self._engine, self._reading)

    def _open(self) -> None:
        identity = digest(self._store.get(layout.REPOSITORY))
        with translated(self._url):
            with self._reading.connect() as connection:
                if schema.version_of(connection) == len(schema.MIGRATIONS):
                    found = connection.execute(select(schema.meta.c.repository, schema.meta.c.location)).one()
                    self._check_owner(identity, found)
                    return
            with self._engine.begin() as connection:
                schema.migrate(connection, identity, self._store.location)

    def _check_owner(self, identity: str, found: Any) -> None:
        if found.repository == identity:
            return
        if self._disposable and self._is_file:
            raise DamagedError(f"the catalogue {self.location} belongs to another repository")
        raise ConfigError(
            f"the catalogue {self.location} belongs to the repository {found.location}; give each repository a "
            "database of its own, or a schema (postgresql://...?options=-csearch_path%3DNAME)"
        )

    def _mended(self, action: Callable[[], None]) -> None:
        """Do something; where a file that is only an index turns out to be damaged, make it anew, and do it again."""
        try:
            action()
        except DamagedError as error:
            if not (self._disposable and self._is_file):
                raise ConfigError(
                    f"{self.location} is no catalogue, or a damaged one: {error}. Give another path or URL "
                    f"(--catalogue, {VARIABLE}); a catalogue can be made anew from the files"
                ) from error
            self._replace()
            action()

    def _replace(self, clear: Callable[[URL], None] = set_aside) -> None:
        self.close()
        if clear is discard or not self._is_sound():  # another process may have mended it already
            clear(self._url)
        self._forget()
        self._open()

    def _forget(self) -> None:
        self._known, self._tick, self._remembered, self._seen = {}, -1, {}, Seen()

    def _is_sound(self) -> bool:
        """Whether the file that is there now is a catalogue of this repository."""
        identity = digest(self._store.get(layout.REPOSITORY))
        try:
            with translated(self._url), self._engine.connect() as connection:
                checked = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
                return checked == "ok" and connection.scalar(select(schema.meta.c.repository)) == identity
        except (StoreError, CorruptError):
            return False
        finally:
            self.close()

    # --- keeping up

    def refresh(self, progress: Progress = lambda _done, _all: None, *, only: str | None = None) -> None:
        """Bring it up to date with the files; cheap when nothing has changed.

        Args:
            progress: called with each run that had to be read.
            only: look at this run only.

        Raises:
            StoreError: files or database cannot be used.
        """
        with self._lock:
            self._mended(lambda: self._refresh(progress, only))

    def _refresh(self, progress: Progress, only: str | None = None) -> None:
        with translated(self._url):
            if only is not None:
                self._refresh_run(only)
                return
            self._recall()
            # before the runs, so that there is every checkpoint that an alias points at
            engines = (self._engine, self._reading)
            self._tick, self._seen = refresh_aliases(engines, self._store, self._tick, self._seen)
            present = self._present()
            begin = time.monotonic()
            by_hand = begin - self._looked >= self._by_hand
            stale = [run for run in present if not self._is_current(run, by_hand=by_hand)]
            self._looked = begin if by_hand else self._looked
            gone = self._known.keys() - set(present)
            for name in gone:
                remove_run(self._engine, name)
                self._known.pop(name)
            for number, run in enumerate(stale, 1):
                self._try(run)
                progress(number, len(stale))

    def _try(self, run: str) -> None:
        """Read a run; one that cannot be read keeps nobody from the others."""
        self._unread.pop(run, None)
        try:
            self._refresh_run(run)
        except NotFoundError:
            return  # gone in between
        except (Error, UnicodeError, OverflowError) as error:
            self._unread[run] = f"{type(error).__name__}: {error}"

    def _refresh_run(self, run: str) -> None:
        engines = (self._engine, self._reading)
        tick, now = refresh_run(engines, self._store, run, self._remembered.pop(run, None))
        self._remembered[run] = now
        if len(self._remembered) > _REMEMBERED:
            self._remembered.pop(next(iter(self._remembered)))
        if tick == self._tick + 1:
            assert now.known is not None
            self._known[run] = now.known
            if self._seen.tick == self._tick:
                self._seen = replace(self._seen, tick=tick)
            self._tick = tick
        elif tick != self._tick:  # others have changed it as well: ask anew next time
            self._tick = -1

    def _recall(self) -> None:
        """What the catalogue knows, unless nobody has changed it since."""
        with self._reading.connect() as connection:
            tick = connection.execute(select(schema.meta.c.tick)).scalar_one()
            if tick != self._tick:
                self._known, self._tick = known_runs(connection), tick

    def _present(self) -> list[str]:
        """The directories of runs."""
        stamp = self._store.stamp(layout.RUNS)
        if stamp is None or stamp != self._names[0]:
            names = [child[:-1] for child in self._store.children(layout.RUNS) if child.endswith("/")]
            self._names = (stamp, names)
        return self._names[1]

    def _is_current(self, run: str, *, by_hand: bool) -> bool:
        known = self._known.get(run)
        if known is None:
            return self._store.size(layout.run_record(run)) is None  # no run yet: nothing to read
        return is_current(self._store, run, known, by_hand=by_hand)

    def rebuild(self, progress: Progress = lambda _done, _all: None) -> None:
        """Forget everything, and read all files again.

        Args:
            progress: called with each run that was read.
        """
        with self._lock:
            if self._disposable and self._is_file:
                self._replace(discard)
            else:
                identity = digest(self._store.get(layout.REPOSITORY))
                with translated(self._url), self._engine.begin() as connection:
                    schema.drop_all(connection)
                    schema.migrate(connection, identity, self._store.location)
                self._forget()
            self._refresh(progress)

    # --- asking

    def select(self, wish: Wish) -> Selection:
        """What is wanted, of what exists now.

        Raises:
            NotFoundError: a metric that no checkpoint has; names near ones.
        """
        self.refresh()
        for run, why in self._unread.items():
            warnings.warn(f"run {run!r} is not considered: {why}", PeakpointWarning, stacklevel=3)
        for alias, why in self._seen.unread.items():
            warnings.warn(f"the alias {alias!r} is not considered: {why}", PeakpointWarning, stacklevel=3)
        return Selection(self._reading, wish, self._checkpoint, self.window)

    def _checkpoint(self, row: Any) -> Checkpoint:
        prefix = layout.checkpoint_prefix(row.run, row.name)
        return make_checkpoint(row, self._store.path(prefix) if isinstance(self._store, LocalStore) else None)

    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics, by name."""
        with translated(self._url), self._reading.connect() as connection:
            return tuple(sorted(schema.Columns.read(connection).keys))

    def aliases(self) -> Mapping[tuple[str, str], tuple[str, ...]]:
        """What aliases point at: run and id of a checkpoint, with the names; without those that cannot be read."""
        with translated(self._url), self._reading.connect() as connection:
            return pointers(connection)

    def totals(self) -> tuple[int, int, int]:
        """How many runs and checkpoints there are, and the bytes of their files."""
        table = schema.runs.c
        columns = (func.count(), func.sum(table.checkpoints), func.sum(table.size))
        with translated(self._url), self._reading.connect() as connection:
            count, checkpoints, size = connection.execute(select(*columns)).one()
        return count, int(checkpoints or 0), int(size or 0)

    def runs(self, top: int | None = None) -> list[Listed]:
        """Every run, or so many at most; those that saved last come first.

        Args:
            top: how many.
        """
        table = schema.runs.c
        statement = select(schema.runs).order_by(table.newest.desc().nulls_last(), table.name).limit(top)
        with translated(self._url), self._reading.connect() as connection:
            pointing: dict[str, list[str]] = {}
            for (run, _), names in pointers(connection).items():
                pointing.setdefault(run, []).extend(names)
            return [
                Listed(
                    name=row.name,
                    rules=tuple(json.loads(row.rules)),
                    peaks=tuple(read_peaks(row.peaks)),
                    reports=row.reports,
                    checkpoints=row.checkpoints,
                    size_bytes=row.size,
                    newest=None if row.newest is None else datetime.fromtimestamp(row.newest, UTC),
                    damaged=_damage(row.read),
                    kept=json.loads(row.peaks).get("kept", {}),
                    aliases=tuple(sorted(pointing.get(row.name, ()))),
                )
                for row in connection.execute(statement)
            ]
