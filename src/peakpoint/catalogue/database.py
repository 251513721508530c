"""Open the database of a catalogue: a SQLite file beside the runs, or what ``PEAKPOINT_CATALOGUE`` names."""

import contextlib
import json
import os
import secrets
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import URL, Connection, Engine, QueuePool, create_engine, event, exc, make_url, select

from peakpoint.catalogue.schema import meta
from peakpoint.errors import ConfigError, CorruptError, StoreError, TransientStoreError, needing
from peakpoint.format.sealed import digest
from peakpoint.store import LocalStore, Store, has_locks

VARIABLE = "PEAKPOINT_CATALOGUE"
FILE = "catalogue.sqlite"
_SMALL = 2**20  # bytes, of about 1,000 checkpoints with ten metrics
_PATIENCE = 30.0  # seconds to wait for another process that is writing the catalogue


class DamagedError(CorruptError):
    """The database, or a row of it, cannot be read any more."""


def read_json(text: str) -> Any:
    """Decode a column that holds JSON.

    Raises:
        DamagedError: it holds something else.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise DamagedError(f"a column is not JSON: {error}") from error


Owner = Literal["named", "derived", "temporary"]
"""Named by somebody, whose it is; ours to throw away; ours, and of no use to any other process."""


def place(store: Store, where: str | None) -> tuple[URL, Owner]:
    """Find where the catalogue of a repository is, and whose it is.

    Args:
        store: where the repository is.
        where: a URL of PostgreSQL or SQLite, or the path of a file; by default what the environment variable
            ``PEAKPOINT_CATALOGUE`` says, and without one ``catalogue.sqlite`` in the repository. Where that cannot be
            written, a file in the user's cache directory, or a file or memory that goes with this process.

    Raises:
        ConfigError: a URL of a kind that is not served.
    """
    text = where or os.environ.get(VARIABLE, "")
    if text:
        return _read_url(text), "named"
    if isinstance(store, LocalStore):
        path = store.root.absolute() / FILE
        if _is_usable(path):
            return URL.create("sqlite", database=str(path)), "derived"
        with contextlib.suppress(OSError, RuntimeError):  # nobody's home
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            cached = home / "peakpoint" / f"{digest(os.fsencode(path))[:16]}.sqlite"
            cached.parent.mkdir(parents=True, exist_ok=True)
            if _is_usable(cached):
                return URL.create("sqlite", database=str(cached)), "derived"
    try:
        handle, name = tempfile.mkstemp(prefix="peakpoint-", suffix=".sqlite")
    except OSError:  # nothing can be written anywhere: in memory
        shared = {"mode": "memory", "cache": "shared", "uri": "true"}  # by the connections of this process
        return URL.create("sqlite", database=f"file:peakpoint-{secrets.token_hex(8)}", query=shared), "temporary"
    os.close(handle)
    return URL.create("sqlite", database=name), "temporary"


def _is_usable(path: Path) -> bool:
    """Whether SQLite can write there, which needs permission and, on a network file system, its kind of locks.

    Links and directories are refused; SQLite would follow the links.
    """
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(path.with_name(path.name + suffix).lstat().st_mode):
                return False
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return False
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        # SQLite says the same where there are no locks; another file is asked, since closing the database's own
        # would take away SQLite's locks in this process
        with tempfile.TemporaryFile(dir=path.parent) as file:
            return "locked" in str(error) and has_locks(file.fileno())
    except (sqlite3.DatabaseError, UnicodeDecodeError):  # its messages quote what is damaged
        return True  # damaged: that is repaired
    return True


def _read_url(text: str) -> URL:
    if "://" not in text:
        path = Path(text).expanduser().absolute()
        if not path.parent.is_dir():
            raise ConfigError(f"the catalogue cannot be at {path}: the directory {path.parent} does not exist")
        return URL.create("sqlite", database=str(path))
    try:
        url = make_url(text)
        kind = url.get_backend_name()
    except (exc.ArgumentError, ValueError) as error:
        raise ConfigError(f"the catalogue's URL cannot be read: {error}") from error
    if kind in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if kind == "sqlite" and url.database:
        return url
    raise ConfigError(
        f"a catalogue cannot be a database of kind {kind!r}; give postgresql://user@host/database or the path of a file"
    )


@contextlib.contextmanager
def translated(url: URL) -> Iterator[None]:
    """Turn the errors of SQLAlchemy and its drivers into ours."""
    where = url.render_as_string() if url.host or not url.database else url.database
    try:
        yield
    except UnicodeDecodeError as error:
        raise DamagedError(f"a message of the database is not text: {error}") from error
    except exc.DBAPIError as error:
        message = str(error.orig).strip()
        if _is_damaged_database(error.orig):
            raise DamagedError(message) from error
        if "locked" in message:
            raise TransientStoreError(f"another process is writing the catalogue {where}; try again") from error
        if isinstance(error, exc.DataError):
            raise ConfigError(f"the selection cannot be computed: {message}") from error
        raise StoreError(f"the catalogue {where} cannot be used: {message}") from error


def _is_damaged_database(error: BaseException | None) -> bool:
    """Whether SQLite says that a file is no database or a broken one, or that a text is not UTF-8."""
    if isinstance(error, sqlite3.OperationalError) and "Could not decode to UTF-8" in str(error):
        return True
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return isinstance(error, sqlite3.DatabaseError) and code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def connect(url: URL) -> tuple[Engine, Engine]:
    """Make a pair of engines: one that writes, one that can only read.

    Raises:
        MissingExtraError: the driver for PostgreSQL is not installed.
    """
    if url.get_backend_name() == "sqlite":
        return _sqlite(url)
    with needing("postgres", "a catalogue in PostgreSQL needs"):
        writing = create_engine(url, pool_pre_ping=True)
    return writing, writing.execution_options(postgresql_readonly=True, isolation_level="REPEATABLE READ")


def _sqlite(url: URL) -> tuple[Engine, Engine]:
    arguments = {"timeout": _PATIENCE, "check_same_thread": False}
    writing = create_engine(url, connect_args=arguments, poolclass=QueuePool)
    event.listen(writing, "connect", _prepare)
    # of two that write, the second waits before it has read anything
    event.listen(writing, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    reading = create_engine(url, connect_args=arguments, poolclass=QueuePool)
    event.listen(reading, "connect", _prepare)
    event.listen(reading, "connect", _lock)
    event.listen(reading, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return writing, reading


def _prepare(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # SQLAlchemy's events begin transactions
    for pragma in (
        "journal_mode=WAL",  # readers and a writer do not wait for one another
        "synchronous=NORMAL",  # may lose the last changes at a power cut; they are read again from the files
        "foreign_keys=ON",
        "cache_size=-65536",
        "mmap_size=1073741824",
        "temp_store=MEMORY",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


_ALLOWED = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_TRANSACTION})
_FUNCTIONS = frozenset({"abs", "coalesce", "count", "glob", "max", "min", "nullif", "sum", "total"})
_PRAGMAS = frozenset(
    {"table_info", "table_xinfo", "integrity_check"}
)  # what columns a table has, and whether it is whole


def _lock(connection: sqlite3.Connection, _: object) -> None:
    """The second lock: whatever a statement says, SQLite compiles nothing that writes, attaches or loads."""
    connection.execute("PRAGMA query_only=ON").close()
    connection.set_authorizer(_authorize)


def _authorize(action: int, first: str | None, second: str | None, *_: object) -> int:
    if (
        action in _ALLOWED
        or (action == sqlite3.SQLITE_FUNCTION and second in _FUNCTIONS)
        or (action == sqlite3.SQLITE_PRAGMA and first in _PRAGMAS)
    ):
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def check_owner(connection: Connection, location: str, identity: str, *, disposable: bool) -> None:
    """Refuse the catalogue of another repository.

    Args:
        connection: to the catalogue.
        location: of the catalogue.
        identity: of the repository.
        disposable: whether the catalogue may be set aside.

    Raises:
        DamagedError: it is that of another, and may be set aside.
        ConfigError: it may not.
    """
    owner = connection.execute(select(meta.c.repository, meta.c.location)).one_or_none()
    if owner is not None and owner.repository == identity:
        return
    if owner is None or disposable:
        raise DamagedError(f"the catalogue {location} belongs to another repository, or to none")
    raise ConfigError(
        f"the catalogue {location} belongs to the repository {owner.location}; give each repository a "
        "database of its own, or a schema (postgresql://...?options=-csearch_path%3DNAME)"
    )


def check(engine: Engine) -> list[str]:
    """Have SQLite check its file, indexes included: what is wrong; PostgreSQL has checksums of its own."""
    if engine.url.get_backend_name() != "sqlite":
        return []
    with translated(engine.url), engine.connect() as connection:
        sentences = connection.exec_driver_sql("PRAGMA integrity_check(10)").scalars().all()
    return [str(sentence) for sentence in sentences if sentence != "ok"]


def check_small(connection: Connection) -> None:
    """Have SQLite compare the tables of a small file with their indexes: a bit that flipped there hides the best row.

    It takes 8 ms at 1,000 checkpoints and 0.3 s at 10,000, so that larger ones are left to an audit.

    Raises:
        DamagedError: they differ.
    """
    url = connection.engine.url
    path = Path(url.database or "")
    if url.get_backend_name() == "sqlite" and path.is_file() and path.stat().st_size <= _SMALL:
        sentences = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalars().all()
        if sentences != ["ok"]:
            raise DamagedError(f"SQLite finds in {path}: {sentences[0]}")


def set_aside(url: URL) -> None:
    """Move a damaged SQLite file and its log out of the way: it may have been somebody's. Replaces nothing."""
    assert url.database is not None
    path = Path(url.database)
    stem = path.with_name(f"{path.stem}.damaged-{secrets.token_hex(4)}.sqlite")
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{suffix}").rename(f"{stem}{suffix}")


def discard(url: URL) -> None:
    """Delete a SQLite file, and its log with it; memory goes by itself."""
    assert url.database is not None
    if url.query.get("mode") == "memory":
        return
    for suffix in ("", "-wal", "-shm"):
        Path(url.database + suffix).unlink(missing_ok=True)
