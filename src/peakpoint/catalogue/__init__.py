"""The catalogue: an index of every run and checkpoint of a repository, made from its files.

It holds no truth of its own: deleting it loses nothing, and before it is asked it is brought up to date, so that a
checkpoint is found as soon as it is committed. See ``catalogue.refresh`` for how, and ``catalogue.schema`` for what.
"""

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select

from peakpoint import layout
from peakpoint.catalogue import schema
from peakpoint.catalogue.database import FILE, VARIABLE, DamagedError, connect, place, set_aside, translated
from peakpoint.catalogue.refresh import Known, is_current, known_runs, read_peaks, refresh_run, remove_run
from peakpoint.catalogue.selection import Clause, Selection, Why, Wish, make_checkpoint
from peakpoint.checkpoint import Checkpoint
from peakpoint.errors import ConfigError
from peakpoint.peaks import Peak
from peakpoint.seal import digest
from peakpoint.store import LocalStore, Store

Progress = Callable[[int, int], None]
"""Called with the number of runs that were read, and of how many."""

__all__ = ["FILE", "VARIABLE", "Catalogue", "Clause", "Listed", "Progress", "Selection", "Why", "Wish"]


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
    """

    name: str
    rules: tuple[str, ...]
    peaks: tuple[Peak, ...]
    reports: int
    checkpoints: int
    size_bytes: int
    newest: datetime | None
    damaged: tuple[str, ...]


class Catalogue:
    """The catalogue of one repository. Safe to use from several threads, and beside others who use or write it.

    Args:
        store: where the repository is.
        where: a URL of PostgreSQL, or the path of a SQLite file; see ``database.place``.

    Raises:
        ConfigError: a URL that is not served, or a catalogue of another repository.
        FormatError: a newer release made it.
        MissingExtraError: the driver of the database is not installed.
        StoreError: the database cannot be used.
    """

    def __init__(self, store: Store, where: str | None = None) -> None:
        self._store = store
        self._url, self._disposable = place(store, where)
        self._engine, self._reading = connect(self._url)
        self._lock = threading.Lock()
        self._known: dict[str, Known] = {}
        self._tick = -1
        self._mended(self._open)

    @property
    def location(self) -> str:
        """The file or the URL, without a password."""
        return self._url.database or "memory" if self._is_file else self._url.render_as_string()

    @property
    def _is_file(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    def close(self) -> None:
        """Let go of every connection."""
        self._engine.dispose()
        self._reading.dispose()

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
        except DamagedError:
            if not (self._disposable and self._is_file and self._url.database):
                raise
            self._replace()
            action()

    def _replace(self) -> None:
        self.close()
        set_aside(self._url)
        self._known, self._tick = {}, -1
        self._open()

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
                refresh_run(self._engine, self._store, only)
                return
            self._recall()
            present = [child[:-1] for child in self._store.children(layout.RUNS) if child.endswith("/")]
            stale = [run for run in present if not self._is_current(run)]
            gone = self._known.keys() - set(present)
            for name in gone:
                remove_run(self._engine, name)
            for number, run in enumerate(stale, 1):
                refresh_run(self._engine, self._store, run)
                progress(number, len(stale))
            if stale or gone:
                self._recall()

    def _recall(self) -> None:
        """What the catalogue knows, unless nobody has changed it since."""
        with self._reading.connect() as connection:
            tick = connection.execute(select(schema.meta.c.tick)).scalar_one()
            if tick != self._tick:
                self._known, self._tick = known_runs(connection), tick

    def _is_current(self, run: str) -> bool:
        known = self._known.get(run)
        if known is None:
            return self._store.size(layout.run_record(run)) is None  # no run yet: nothing to read
        return is_current(self._store, run, known)

    def rebuild(self, progress: Progress = lambda _done, _all: None) -> None:
        """Forget everything, and read all files again.

        Args:
            progress: called with each run that was read.
        """
        with self._lock:
            if self._disposable and self._is_file and self._url.database:
                self._replace()
            else:
                identity = digest(self._store.get(layout.REPOSITORY))
                with translated(self._url), self._engine.begin() as connection:
                    schema.drop_all(connection)
                    schema.migrate(connection, identity, self._store.location)
                self._known, self._tick = {}, -1
            self._refresh(progress)

    # --- asking

    def select(self, wish: Wish) -> Selection:
        """What is wanted, of what exists now.

        Raises:
            NotFoundError: a metric that no checkpoint has; names near ones.
        """
        self.refresh()
        with translated(self._url):
            return Selection(self._reading, wish, self._checkpoint)

    def _checkpoint(self, run: str, row: Any, detail: Any) -> Checkpoint:
        prefix = layout.checkpoint_prefix(run, detail.name)
        return make_checkpoint(
            run, row, detail, self._store.path(prefix) if isinstance(self._store, LocalStore) else None
        )

    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics, by name."""
        with translated(self._url), self._reading.connect() as connection:
            return tuple(sorted(schema.Columns.read(connection).keys))

    def runs(self, names: Iterable[str] | None = None) -> list[Listed]:
        """Every run, or some, by name."""
        table, waiting = schema.runs.c, schema.unsettled.c
        statement = select(schema.runs).order_by(table.name)
        if names is not None:
            statement = statement.where(table.name.in_(list(names)))
        with translated(self._url), self._reading.connect() as connection:
            damaged: dict[int, list[str]] = {}
            for run, sentence in connection.execute(
                select(waiting.run, waiting.damage).where(waiting.damage.is_not(None))
            ):
                damaged.setdefault(run, []).append(sentence)
            return [
                Listed(
                    name=row.name,
                    rules=tuple(json.loads(row.rules)),
                    peaks=tuple(read_peaks(row.peaks)),
                    reports=row.reports,
                    checkpoints=row.checkpoints,
                    size_bytes=row.size,
                    newest=None if row.newest is None else datetime.fromtimestamp(row.newest, UTC),
                    damaged=tuple(damaged.get(row.key, ())),
                )
                for row in connection.execute(statement)
            ]
