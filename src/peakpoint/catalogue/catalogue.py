"""The catalogue: an index of every run and checkpoint of a repository, made from its files.

It holds no truth of its own: deleting it loses nothing, and before it is asked it is brought up to date, so that a
checkpoint is found as soon as it is committed. See ``catalogue.refresh`` for how, and ``catalogue.schema`` for what.

The life of a selection: ``query.parse`` makes a tree of a text. ``Catalogue.refresh`` compares stamps of every run's
directories with those that it noted, and reads what is new of a run that differs: lines of the journal, manifests of
new directories; each run is one transaction. ``catalogue.sql`` makes an expression with parameters of the tree,
``catalogue.search`` decides how SQLite is to go about it, and ``Selection`` gives out ``Checkpoint`` values in groups.
The rows of each group are held against their manifests first; where they differ, nothing of the group is given out
before the catalogue is mended, in the end by making it anew. The connection that reads can do nothing else: SQLite's
authorizer refuses to compile it.
"""

import math
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import URL, Connection, Engine, select

from peakpoint.catalogue import database, schema
from peakpoint.catalogue.aliases import AliasSnapshot, pointers, refresh_aliases
from peakpoint.catalogue.changes import ReadPosition, is_current
from peakpoint.catalogue.database import VARIABLE, DamagedError, translated
from peakpoint.catalogue.refresh import CachedRun, known_runs, refresh_run, remove_run
from peakpoint.catalogue.run_summary import RunSummary, listed, totals
from peakpoint.catalogue.search import CANDIDATE_LIMIT
from peakpoint.catalogue.selection import Selection, SelectionQuery, make_checkpoint, warn_of_unread
from peakpoint.catalogue.verification import CatalogueMismatch, compare_all, compare_rows
from peakpoint.errors import ConfigError, CorruptError, Error, NotFoundError, PeakpointWarning, StoreError
from peakpoint.format import layout
from peakpoint.format.manifest import Checkpoint
from peakpoint.format.sealed import digest
from peakpoint.repository.root import Repository, open_repository
from peakpoint.store import LocalStore, Store

Progress = Callable[[int, int], None]
"""Called with the number of runs that were read, and of how many."""

_REMEMBERED = 16
_TURNS = 3  # of mending; the last one makes it anew
_OPEN: "weakref.WeakSet[Catalogue]" = weakref.WeakSet()


def _after_fork() -> None:
    for catalogue in _OPEN:
        catalogue._after_fork()  # noqa: SLF001 - of this module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _dispose(*engines: Engine) -> None:
    for engine in engines:
        engine.dispose()


class Catalogue:
    """The catalogue of one repository. Safe to use from several threads, and beside others who use or write it.

    Attributes:
        candidate_limit: how many rows a search in SQLite looks at first; see ``catalogue.search``.

    Args:
        root: of the repository: a directory, a store, or what ``open`` returned.
        where: a URL of PostgreSQL, or the path of a SQLite file. By default what the environment variable
            ``PEAKPOINT_CATALOGUE`` says, or ``catalogue.sqlite`` in the repository.
        by_hand: checkpoints that are deleted without Peakpoint are missed after so many seconds; everything that it
            does itself is seen at once.

    Raises:
        ConfigError: a URL that is not served, or a catalogue of another repository.
        FormatError: a newer release made it.
        MissingExtraError: the driver of the database is not installed.
        NotFoundError: there is no repository.
        StoreError: the database cannot be used.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Store | Repository,
        where: str | None = None,
        *,
        by_hand: float = 1.0,
    ) -> None:
        repository = root if isinstance(root, Repository) else open_repository(root)
        store = self._store = repository.store
        self._by_hand, self._looked = by_hand, -math.inf
        self._names: tuple[str | None, list[str]] = (None, [])
        self.candidate_limit = CANDIDATE_LIMIT
        self._url, standing = database.place(store, where)
        self._disposable = standing != "named"
        self._engine, self._reading = database.connect(self._url)
        weakref.finalize(self, _dispose, self._engine, self._reading)
        if standing == "temporary":
            weakref.finalize(self, database.discard, self._url)
        self._lock = threading.Lock()
        self._known: dict[str, ReadPosition] = {}
        self._remembered: dict[str, CachedRun] = {}  # those that were refreshed last
        self._unread: dict[str, str] = {}
        self._seen = AliasSnapshot()
        _OPEN.add(self)
        self._tick = -1
        self._birth: int | None = None
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
        """What could not be read when it was looked at last, and why: runs, by name, and checkpoints, by ref."""
        damaged = {
            f"{run}/{name}": one.damage
            for run, known in self._known.items()
            for name, one in known.unsettled.items()
            if one.damage is not None
        }
        return damaged | self._unread

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
                    database.check_owner(self.location, identity, found, disposable=self._disposable and self._is_file)
                    return
            with self._engine.begin() as connection:
                schema.migrate(connection, identity, self._store.location)

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
            self._replace(born=self._birth)
            action()

    def _replace(self, clear: Callable[[URL], None] = database.set_aside, born: int | None = None) -> None:
        self.close()
        if clear is database.discard or not self._is_sound(born):  # another process may have mended it already
            clear(self._url)
        self._forget()
        self._open()

    def _forget(self) -> None:
        self._known, self._tick, self._remembered, self._seen = {}, -1, {}, AliasSnapshot()

    def _is_sound(self, born: int | None) -> bool:
        """Whether the file that is there now is a catalogue of this repository, and not the wrong one of that birth."""
        identity = digest(self._store.get(layout.REPOSITORY))
        try:
            with translated(self._url):
                return schema.is_sound(self._engine, identity, born)
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
            for name in self._known.keys() - set(present):
                self._remove(name)
            for name in self._unread.keys() - set(present):
                self._unread.pop(name)
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
        except DamagedError:  # of the catalogue, not of the run
            raise
        except (Error, UnicodeError, OverflowError) as error:
            self._unread[run] = f"{type(error).__name__}: {error}"

    def _remove(self, run: str) -> None:
        """Forget a run that is gone, or is to be read again from the beginning."""
        remove_run(self._engine, run)
        self._known.pop(run, None)
        self._remembered.pop(run, None)

    def _refresh_run(self, run: str) -> None:
        engines = (self._engine, self._reading)
        tick, now = refresh_run(engines, self._store, run, self._remembered.pop(run, None))
        self._remembered[run] = now
        if len(self._remembered) > _REMEMBERED:
            self._remembered.pop(next(iter(self._remembered)))
        if now.known is not None:
            self._known[run] = now.known
        if tick == self._tick + 1:
            if self._seen.tick == self._tick:
                self._seen = replace(self._seen, tick=tick)
            self._tick = tick
        elif tick != self._tick:  # others have changed it as well: ask anew next time
            self._tick = -1

    def _recall(self) -> None:
        """What the catalogue knows, unless nobody has changed it since."""
        with self._reading.connect() as connection:
            tick, self._birth = connection.execute(select(schema.meta.c.tick, schema.meta.c.born)).one()
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
        try:
            if known is None:
                return self._store.size(layout.run_record(run)) is None  # no run yet: nothing to read
            return is_current(self._store, run, known, by_hand=by_hand)
        except StoreError:
            return False  # which reading it will say

    def rebuild(self, progress: Progress = lambda _done, _all: None) -> None:
        """Forget everything, and read all files again.

        Args:
            progress: called with each run that was read.
        """
        with self._lock:
            if self._disposable and self._is_file:
                self._replace(database.discard)
            else:
                self._clear()
            self._refresh(progress)

    def _clear(self) -> None:
        """Make the tables anew where they are."""
        identity = digest(self._store.get(layout.REPOSITORY))
        with translated(self._url), self._engine.begin() as connection:
            schema.drop_all(connection)
            schema.migrate(connection, identity, self._store.location)
        self._forget()

    # --- asking

    def select(self, wish: SelectionQuery) -> Selection:
        """What is wanted, of what exists now.

        Raises:
            NotFoundError: a metric that no checkpoint has; names near ones.
        """
        self.refresh()
        warn_of_unread(self.unread)
        for alias, why in self._seen.unread.items():
            warnings.warn(f"the alias {alias!r} is not considered: {why}", PeakpointWarning, stacklevel=3)
        return Selection(self._reading, wish, self, self.candidate_limit)

    # --- beside the files

    def differences(
        self, connection: Connection, columns: schema.Columns, rows: Sequence[Any]
    ) -> list[CatalogueMismatch]:
        """See ``selection.SelectionSource``."""
        return compare_rows(connection, columns, self._store, rows)

    def mend(self, born: int, turn: int, differences: Sequence[CatalogueMismatch]) -> None:
        """See ``selection.SelectionSource``."""
        if turn >= _TURNS:
            raise CorruptError(
                f"the catalogue {self.location} says otherwise than the files, also after it was made anew: "
                f"{differences[0].what}; try again, and report it if that does not help"
            )
        if turn == _TURNS - 1:
            self._make_anew(born, differences)
            return
        before = self.unread  # twice: somebody may have been at work between the catalogue and the files
        with self._lock, translated(self._url):
            for run in {difference.run for difference in differences if difference.unreadable}:
                self._remove(run)
        self._looked = -math.inf
        self.refresh()
        warn_of_unread({name: why for name, why in self.unread.items() if name not in before})

    def compare(self) -> list[CatalogueMismatch]:
        """All that it says otherwise than the files; what changes in between is not among it."""
        differences: list[CatalogueMismatch] = []
        for first in (True, False):
            self._looked = -math.inf
            self.refresh()
            runs = [run for run in self._present() if run not in self._unread]
            again = compare_all((self._engine, self._reading), self._store, runs)
            differences = again if first else [difference for difference in again if difference in differences]
            if not differences:
                break
        return differences

    def prove(self) -> None:
        """Compare all of it with the files, and make it anew where it says otherwise."""
        differences = self.compare()
        wrong = [difference for difference in differences if not difference.unreadable]
        if wrong:
            self._make_anew(self._birth, wrong)
        elif differences:
            self.mend(0, 0, differences)

    def _make_anew(self, born: int | None, differences: Sequence[CatalogueMismatch]) -> None:
        """Set a damaged one aside, unless somebody else has done so since it was born."""
        with self._lock:
            if self._disposable and self._is_file:
                self._replace(born=born)
            else:
                self._clear()
            self._refresh(lambda _done, _all: None)
        warnings.warn(
            f"the catalogue {self.location} said otherwise than the files ({differences[0].what}) and was made anew",
            PeakpointWarning,
            stacklevel=4,
        )

    def checkpoint(self, row: Any) -> Checkpoint:
        """See ``selection.SelectionSource``."""
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
        with translated(self._url), self._reading.connect() as connection:
            return totals(connection)

    def runs(self, top: int | None = None) -> list[RunSummary]:
        """Every run, or so many at most; those that saved last come first.

        Args:
            top: how many.
        """
        runs: list[RunSummary] = []

        def look() -> None:
            self.refresh()  # of one that is made anew while it is looked at
            with translated(self._url), self._reading.connect() as connection:
                runs[:] = listed(connection, top)

        self._mended(look)
        return runs
