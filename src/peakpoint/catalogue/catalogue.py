"""The catalogue: an index of every run and checkpoint of a repository, made from its files.

It holds no truth of its own: deleting it loses nothing, and before it is asked it is brought up to date, so that a
checkpoint is found as soon as it is committed. See ``catalogue.refresh`` for how, and ``catalogue.schema`` for what.

The life of a selection: ``query.parse`` makes a tree of a text. ``Catalogue.refresh`` compares stamps of every run's
directories with those of the last look, and reads what is new of a run that differs: lines of the journal, manifests of
new directories; each run is one transaction. ``catalogue.sql`` makes an expression with parameters of the tree,
``catalogue.search`` decides how SQLite is to go about it, and ``Selection`` gives out ``Checkpoint`` values in groups.
The rows of each group are compared with their manifests first; where they differ, nothing of the group is given out
before the catalogue is repaired, in the end by making it anew. The connection that reads can do nothing else: SQLite's
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
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, select

from peakpoint.catalogue import database, schema
from peakpoint.catalogue.aliases import AliasSnapshot, alias_targets, refresh_aliases
from peakpoint.catalogue.changes import ReadPosition, is_current
from peakpoint.catalogue.database import VARIABLE, DamagedError, translated
from peakpoint.catalogue.ranking import SelectionQuery
from peakpoint.catalogue.refresh import CachedRun, read_positions, refresh_run, remove_run
from peakpoint.catalogue.rows import checkpoint_of
from peakpoint.catalogue.run_summary import RunSummary, run_summaries, totals
from peakpoint.catalogue.search import CANDIDATE_LIMIT
from peakpoint.catalogue.selection import Selection
from peakpoint.catalogue.verification import CatalogueMismatch, compare_all, compare_rows
from peakpoint.errors import ConfigError, CorruptError, Error, NotFoundError, PeakpointWarning, StoreError
from peakpoint.format import layout
from peakpoint.format.manifest import Checkpoint
from peakpoint.format.sealed import digest
from peakpoint.repository.root import Repository, open_repository
from peakpoint.store import LocalStore, Store

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with the number of runs that were read, and of how many."""

_CACHED_RUNS = 16
_ATTEMPTS = 3  # to repair; the last one makes it anew
_OPEN: "weakref.WeakSet[Catalogue]" = weakref.WeakSet()


def _after_fork() -> None:
    for catalogue in _OPEN:
        catalogue._after_fork()  # noqa: SLF001 - of this module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _dispose(*engines: Engine) -> None:
    for engine in engines:
        engine.dispose()


def _no_progress(_number: int, _count: int) -> None:
    pass


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
        self._by_hand, self._last_look = by_hand, -math.inf
        self._run_names: tuple[str | None, list[str]] = (None, [])  # with the stamp of their directory
        self.candidate_limit = CANDIDATE_LIMIT
        self._url, owner = database.place(store, where)
        self._disposable = owner != "named"
        self._engine, self._reading = database.connect(self._url)
        weakref.finalize(self, _dispose, self._engine, self._reading)
        if owner == "temporary":
            weakref.finalize(self, database.discard, self._url)
        self._lock = threading.Lock()
        self._unread: dict[str, str] = {}
        self._birth: int | None = None
        self._forget()
        _OPEN.add(self)
        try:
            self._repairing(self._open)
        except BaseException:
            self.close()
            raise

    @property
    def location(self) -> str:
        """The file or the URL, without a password."""
        is_file = self._url.get_backend_name() == "sqlite"
        return str(self._url.database) if is_file else self._url.render_as_string()

    @property
    def unread(self) -> Mapping[str, str]:
        """What could not be read when it was looked at last, and why: runs, by name, and checkpoints, by ref."""
        damaged = {
            f"{run}/{name}": directory.damage
            for run, position in self._positions.items()
            for name, directory in position.unsettled.items()
            if directory.damage is not None
        }
        return damaged | self._unread

    @property
    def unread_aliases(self) -> Mapping[str, str]:
        """Aliases whose newest record could not be read when they were looked at last, and why."""
        return dict(self._aliases.unread)

    def _after_fork(self) -> None:
        """A child has no right to its parent's connections."""
        self._engine.dispose(close=False)
        self._reading.dispose(close=False)
        self._lock = threading.Lock()
        self._tick = -1

    def close(self) -> None:
        """Let go of every connection; they come back when they are needed."""
        _dispose(self._engine, self._reading)

    # --- opening, and making anew

    def _identity(self) -> str:
        return digest(self._store.get(layout.REPOSITORY))

    def _open(self, *, anew: bool = False) -> None:
        """Make the tables where they are missing or of an older version."""
        identity = self._identity()
        with translated(self._url):
            with self._reading.connect() as connection:
                version = schema.version_of(connection)
                if version:
                    database.check_owner(connection, self.location, identity, disposable=self._disposable)
                    database.check_small(connection)
            if anew or version != schema.VERSION:
                with self._engine.begin() as connection:
                    schema.create(connection, identity, self._store.location, anew=anew)

    def _forget(self) -> None:
        """Forget what the catalogue held."""
        self._positions: dict[str, ReadPosition] = {}
        self._cached_runs: dict[str, CachedRun] = {}  # those that were refreshed last
        self._aliases = AliasSnapshot()
        self._tick = -1

    def _empty(self, *, birth: int | None = None, set_aside: bool = True) -> None:
        """Make the tables anew: in a new file where the file is only an index, elsewhere in their place.

        Args:
            birth: of the one that is to go; a sound one of another birth was made by a faster process, and stays.
            set_aside: keep the file, which may have been somebody's, under another name.
        """
        if not self._disposable:
            self._open(anew=True)
            self._forget()
            return
        self.close()
        if not set_aside:
            database.discard(self._url)
        elif not self._is_sound(birth):
            database.set_aside(self._url)
        self._forget()
        self._open()

    def _is_sound(self, birth: int | None) -> bool:
        """Whether the file that is there now is a catalogue of this repository, and not the one of that birth."""
        identity = self._identity()
        try:
            with translated(self._url):
                with self._reading.connect() as connection:
                    database.check_small(connection)
                return schema.is_sound(self._engine, identity, birth)
        except (StoreError, CorruptError):
            return False
        finally:
            self.close()

    def _repairing(self, action: Callable[[], T]) -> T:
        """Do something; where a file that is only an index turns out to be damaged, make it anew, and do it again."""
        try:
            return action()
        except DamagedError as error:
            if not self._disposable:
                raise ConfigError(
                    f"{self.location} is not a catalogue, or is damaged: {error}. Give another path or URL "
                    f"(--catalogue, {VARIABLE}); a catalogue can be made anew from the files"
                ) from error
            self._empty(birth=self._birth)
            return action()

    def rebuild(self, progress: Progress = _no_progress) -> None:
        """Forget everything, and read all files again.

        Args:
            progress: called with each run that was read.
        """
        with self._lock:
            self._empty(set_aside=False)
            self._refresh(progress)

    # --- keeping up

    def refresh(self, progress: Progress = _no_progress, *, only: str | None = None) -> None:
        """Bring it up to date with the files; cheap when nothing has changed.

        Args:
            progress: called with each run that had to be read.
            only: look at this run only.

        Raises:
            StoreError: files or database cannot be used.
        """
        with self._lock:
            self._repairing(lambda: self._refresh(progress, only))

    def _refresh(self, progress: Progress, only: str | None = None) -> None:
        with translated(self._url):
            if only is not None:
                self._refresh_run(only)
                return
            self._recall()
            # before the runs, so that there is every checkpoint that an alias points at
            engines = (self._engine, self._reading)
            self._tick, self._aliases = refresh_aliases(engines, self._store, self._tick, self._aliases)
            names = self._names()
            begin = time.monotonic()
            by_hand = begin - self._last_look >= self._by_hand
            stale = [run for run in names if not self._is_current(run, by_hand=by_hand)]
            self._last_look = begin if by_hand else self._last_look
            for name in self._positions.keys() - set(names):
                self._remove(name)
            for name in self._unread.keys() - set(names):
                self._unread.pop(name)
            for number, run in enumerate(stale, 1):
                self._try_run(run)
                progress(number, len(stale))

    def _recall(self) -> None:
        """Read how far runs are read, unless nobody has changed it since."""
        with self._reading.connect() as connection:
            tick, self._birth = connection.execute(select(schema.meta.c.tick, schema.meta.c.born)).one()
            if tick != self._tick:
                self._positions, self._tick = read_positions(connection), tick

    def _names(self) -> list[str]:
        """The directories of runs."""
        stamp = self._store.stamp(layout.RUNS)
        if stamp is None or stamp != self._run_names[0]:
            names = [child[:-1] for child in self._store.children(layout.RUNS) if child.endswith("/")]
            self._run_names = (stamp, names)
        return self._run_names[1]

    def _is_current(self, run: str, *, by_hand: bool) -> bool:
        position = self._positions.get(run)
        try:
            if position is None:
                return self._store.size(layout.run_record(run)) is None  # no run yet: nothing to read
            return is_current(self._store, run, position, by_hand=by_hand)
        except StoreError:
            return False  # reading it will say why

    def _try_run(self, run: str) -> None:
        """Read a run; one that cannot be read keeps nobody from the others."""
        self._unread.pop(run, None)
        try:
            self._refresh_run(run)
        except NotFoundError:  # gone, although something that we have not written may be left of it
            if run in self._positions:
                self._remove(run)
        except DamagedError:  # of the catalogue, not of the run
            raise
        except (Error, UnicodeError, OverflowError) as error:
            self._unread[run] = f"{type(error).__name__}: {error}"

    def _refresh_run(self, run: str) -> None:
        engines = (self._engine, self._reading)
        tick, cached = refresh_run(engines, self._store, run, self._cached_runs.pop(run, None))
        self._cached_runs[run] = cached
        if len(self._cached_runs) > _CACHED_RUNS:
            self._cached_runs.pop(next(iter(self._cached_runs)))
        if cached.position is not None:
            self._positions[run] = cached.position
        if tick == self._tick + 1:
            if self._aliases.tick == self._tick:
                self._aliases = replace(self._aliases, tick=tick)
            self._tick = tick
        elif tick != self._tick:  # another process has changed it as well: ask anew next time
            self._tick = -1

    def _remove(self, run: str) -> None:
        """Forget a run that is gone, or is to be read again from the beginning."""
        remove_run(self._engine, run)
        self._positions.pop(run, None)
        self._cached_runs.pop(run, None)

    # --- asking

    def select(self, request: SelectionQuery) -> Selection:
        """Select among the checkpoints that exist now.

        Raises:
            NotFoundError: a metric that no checkpoint has; names near ones.
        """
        self.refresh()
        _warn_of_unread(self.unread)
        for alias, why in self._aliases.unread.items():
            warnings.warn(f"the alias {alias!r} is left out: {why}", PeakpointWarning, stacklevel=3)
        return Selection(self._reading, request, self)

    def _read(self, query: Callable[[Connection], T]) -> T:
        """Ask the database, in one transaction."""
        with translated(self._url), self._reading.connect() as connection:
            return query(connection)

    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics, by name."""
        return tuple(sorted(self._read(schema.Columns.read).keys))

    def aliases(self) -> Mapping[tuple[str, str], tuple[str, ...]]:
        """What aliases point at: run and id of a checkpoint, with the names; without those that cannot be read."""
        return self._read(alias_targets)

    def totals(self) -> tuple[int, int, int]:
        """How many runs and checkpoints there are, and the bytes of their files."""
        return self._read(totals)

    def runs(self, top: int | None = None) -> list[RunSummary]:
        """Every run, or so many at most; those that saved last come first.

        Args:
            top: how many.
        """

        def read() -> list[RunSummary]:
            self.refresh()  # of one that is made anew while it is looked at
            return self._read(partial(run_summaries, top=top))

        return self._repairing(read)

    # --- compared with the files

    def checkpoint(self, row: Any) -> Checkpoint:
        """Make a checkpoint of what the catalogue holds."""
        prefix = layout.checkpoint_prefix(row.run, row.name)
        return checkpoint_of(row, self._store.path(prefix) if isinstance(self._store, LocalStore) else None)

    def compare_rows(
        self, connection: Connection, columns: schema.Columns, rows: Sequence[Any]
    ) -> list[CatalogueMismatch]:
        """Compare rows of a selection with their manifests."""
        return compare_rows(connection, columns, self._store, rows)

    def repair(self, birth: int, attempt: int, mismatches: Sequence[CatalogueMismatch]) -> None:
        """Make the catalogue say what the files say; with each attempt in vain more of it is made anew.

        Raises:
            CorruptError: nothing helps.
        """
        if attempt >= _ATTEMPTS:
            raise CorruptError(
                f"the catalogue {self.location} differs from the files also after it was made anew: "
                f"{mismatches[0].what}; try again, and report it if that does not help"
            )
        if attempt == _ATTEMPTS - 1:
            self._make_anew(birth, mismatches)
            return
        unread = self.unread  # twice: somebody may have been at work between the catalogue and the files
        with self._lock, translated(self._url):
            for run in {mismatch.run for mismatch in mismatches if mismatch.unreadable}:
                self._remove(run)
        self._last_look = -math.inf
        self.refresh()
        _warn_of_unread({name: why for name, why in self.unread.items() if name not in unread})

    def compare(self) -> list[CatalogueMismatch]:
        """All that it says otherwise than the files; what changes in between is not among it."""
        mismatches: list[CatalogueMismatch] = []
        for first in (True, False):
            self._last_look = -math.inf
            self.refresh()
            runs = [run for run in self._names() if run not in self._unread]
            all_mismatches = compare_all((self._engine, self._reading), self._store, runs)
            mismatches = [mismatch for mismatch in all_mismatches if first or mismatch in mismatches]
            if not mismatches:
                break
        return mismatches

    def prove(self) -> None:
        """Compare all of it with the files, and make it anew where it says otherwise."""
        mismatches = self.compare()
        wrong = [mismatch for mismatch in mismatches if not mismatch.unreadable]
        if wrong:
            self._make_anew(self._birth, wrong)
        elif mismatches:
            self.repair(0, 0, mismatches)

    def _make_anew(self, birth: int | None, mismatches: Sequence[CatalogueMismatch]) -> None:
        """Set a damaged one aside, unless another process has done so since it was born."""
        with self._lock:
            self._empty(birth=birth)
            self._refresh(_no_progress)
        warnings.warn(
            f"the catalogue {self.location} differed from the files ({mismatches[0].what}) and was made anew",
            PeakpointWarning,
            stacklevel=4,
        )


def _warn_of_unread(unread: Mapping[str, str]) -> None:
    """Warn of what is left out of selections."""
    for name, why in unread.items():
        kind = "checkpoint" if "/" in name else "run"
        warnings.warn(f"{kind} {name!r} is left out: {why}", PeakpointWarning, stacklevel=4)
