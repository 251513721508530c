"""The tables of the catalogue, and the version by which one of another release is recognized.

``checkpoints`` is what selections look at: one narrow row a checkpoint, every metric in an indexed column of its own,
named ``m1``, ``m2``, ...; ``metrics`` says which is which. After ``WIDEST`` metrics further ones go to ``rarities``, a
row a value, which is slower and has no limit. NaN is NULL here: it never matches. ``details`` holds the record that a
``Checkpoint`` is made from. How far a run is read is in ``runs.read``; what its journal notes of checkpoints, in
``noted``. ``settings`` has those of each run, with its tags, and ``aliases`` what each alias points at.

Nothing here is truth, so there are no migrations: a catalogue of an older version is emptied, and all runs are read
again.
"""

import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from peakpoint.errors import FormatError

VERSION = 5
"""One more with every change of a table, or of what a column means."""
WIDEST = 200  # metrics with a column; PostgreSQL takes 1,600 columns, SQLite 2,000, and each index costs its share
PREFIX = "peakpoint_"  # a team's database may have tables of its own that are called runs or files

_CREATING = int.from_bytes(b"peakpt")  # PostgreSQL's advisory lock of whoever makes the tables
_TABLES = sa.MetaData(naming_convention={"ix": "%(table_name)s_%(column_0_name)s"})
_Key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite numbers rows by itself only as INTEGER


def _references(table: str) -> sa.ForeignKey:
    return sa.ForeignKey(f"{PREFIX}{table}.key", ondelete="CASCADE")


# every version has this table with its first three columns
meta = sa.Table(
    PREFIX + "meta",
    _TABLES,
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("repository", sa.Text, nullable=False),  # the seal of peakpoint.json
    sa.Column("location", sa.Text, nullable=False),
    sa.Column("born", sa.BigInteger, nullable=False),  # random: keys mean something else in one that was made anew
    sa.Column("tick", sa.BigInteger, nullable=False),  # one more with every change
    sa.Column("free", sa.BigInteger, nullable=False),  # the next key of a checkpoint
)
runs = sa.Table(
    PREFIX + "runs",
    _TABLES,
    sa.Column("key", _Key, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("rules", sa.Text, nullable=False),
    sa.Column("peaks", sa.Text, nullable=False),
    sa.Column("reports", sa.BigInteger, nullable=False),
    sa.Column("checkpoints", sa.BigInteger, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("newest", sa.Double),  # when the newest checkpoint was made
    sa.Column("read", sa.Text, nullable=False),  # how far its files are read: ``changes.ReadPosition`` as JSON
)
notes = sa.Table(
    PREFIX + "noted",
    _TABLES,
    sa.Column("run", _Key, _references("runs"), primary_key=True),
    sa.Column("checkpoint", sa.Text, primary_key=True),
    sa.Column("metrics", sa.Text, nullable=False),
    sa.Column("pinned", sa.Text),
)
settings = sa.Table(
    PREFIX + "settings",
    _TABLES,
    sa.Column("run", _Key, _references("runs"), primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),  # with ``config.`` before it; ``tag`` for every tag
    sa.Column("number", sa.Integer, primary_key=True),  # of several tags
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("value", sa.Double),  # of a number, and 1 or 0 for true or false
)
metrics = sa.Table(
    PREFIX + "metrics",
    _TABLES,
    sa.Column("key", _Key, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
)
checkpoints = sa.Table(
    PREFIX + "checkpoints",
    _TABLES,
    sa.Column("key", _Key, primary_key=True),
    sa.Column("run", _Key, _references("runs"), nullable=False),
    sa.Column("sequence", sa.BigInteger, nullable=False),
    sa.Column("epoch", sa.BigInteger, index=True),
    sa.Column("step", sa.BigInteger, nullable=False, index=True),
    sa.Column("size", sa.BigInteger, nullable=False, index=True),
    sa.Column("created", sa.Double, nullable=False, index=True),  # seconds since 1970
    sa.Column("pinned", sa.Boolean, nullable=False),
    sa.Column("archived", sa.Boolean, nullable=False),
    sa.Column("whole", sa.Boolean, nullable=False),
    sa.Index(PREFIX + "checkpoints_run", "run", "sequence"),
)
rarities = sa.Table(
    PREFIX + "rarities",
    _TABLES,
    sa.Column("checkpoint", _Key, _references("checkpoints"), primary_key=True),
    sa.Column("metric", _Key, _references("metrics"), primary_key=True),
    sa.Column("value", sa.Double, nullable=False),
    sa.Index(PREFIX + "rarities_value", "metric", "value"),
)
details = sa.Table(
    PREFIX + "details",
    _TABLES,
    sa.Column("checkpoint", _Key, _references("checkpoints"), primary_key=True),
    sa.Column("id", sa.Text, nullable=False, index=True),
    sa.Column("name", sa.Text, nullable=False, index=True),
    sa.Column("record", sa.Text, nullable=False),
)
reasons = sa.Table(
    PREFIX + "reasons",
    _TABLES,
    sa.Column("checkpoint", _Key, _references("checkpoints"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("reason", sa.Text, nullable=False),
)
aliases = sa.Table(
    PREFIX + "aliases",
    _TABLES,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False),  # of its newest record
    sa.Column("digest", sa.Text, nullable=False),  # of that record
    sa.Column("run", sa.Text),  # what it points at, whether that exists or not; NULL when it is retired
    sa.Column("checkpoint", sa.Text, index=True),
    sa.Column("since", sa.Double, nullable=False),
)


# --- a catalogue as a whole ---------------------------------------------------------------------------------------


def version_of(connection: sa.Connection) -> int:
    """The version of the catalogue in a database; 0 when there is none."""
    if not sa.inspect(connection).has_table(PREFIX + "meta"):
        return 0
    return int(connection.scalar(sa.select(meta.c.version)) or 0)


def create(connection: sa.Connection, repository: str, location: str, *, anew: bool = False) -> None:
    """Make the tables of a new catalogue, in the caller's transaction; those of an older version go.

    Args:
        connection: one that writes.
        repository: the digest of ``peakpoint.json``.
        location: where the repository is, for people.
        anew: also where the tables are those of this version.

    Raises:
        FormatError: a newer release made them.
    """
    if connection.dialect.name == "postgresql":  # in SQLite a transaction that writes is alone
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_CREATING)))
    version = version_of(connection)
    if version > VERSION:
        raise FormatError(
            f"the catalogue {connection.engine.url.render_as_string()} has version {version}; this release reads "
            f"versions up to {VERSION}: update Peakpoint, or give another database (PEAKPOINT_CATALOGUE)"
        )
    if version == VERSION and not anew:
        return  # another process was first
    if version:
        drop_all(connection)
    _TABLES.create_all(connection, checkfirst=False)  # a table of that name is somebody else's: an error
    # both begin anywhere, so that nobody takes a catalogue that was made anew for the one before
    birth, tick = secrets.randbits(60), secrets.randbits(60)
    row = {"version": VERSION, "repository": repository, "location": location, "born": birth, "tick": tick, "free": 1}
    connection.execute(sa.insert(meta).values(row))


def drop_all(connection: sa.Connection) -> None:
    """Remove every table of the catalogue, and what earlier versions had."""
    connection.execute(sa.text(f"DROP TABLE IF EXISTS {PREFIX}files"))
    _TABLES.drop_all(connection)


def is_sound(engine: sa.Engine, repository: str, birth: int | None) -> bool:
    """Whether a SQLite file is whole and the catalogue of a repository, and was not born as ``birth``."""
    with engine.connect() as connection:
        check = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        row = connection.execute(sa.select(meta.c.repository, meta.c.born)).one()
        return check == "ok" and row.repository == repository and row.born != birth


# --- metrics in columns -------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _table(metrics: int) -> sa.Table:
    """The table of checkpoints with so many metrics in it; the same object again, so that SQL is compiled once."""
    columns = [sa.Column(column.name, column.type, primary_key=column.primary_key) for column in checkpoints.columns]
    values = [sa.Column(f"m{key}", sa.Double) for key in range(1, metrics + 1)]
    return sa.Table(PREFIX + "checkpoints", sa.MetaData(), *columns, *values)


class Columns:
    """Which metric is where, as of one moment; ``table`` has a column for each that has one.

    Args:
        keys: metric name to key: 1, 2, 3, ...
    """

    def __init__(self, keys: dict[str, int]) -> None:
        self.keys = keys
        self.table = _table(min(len(keys), WIDEST))

    def column(self, metric: str) -> sa.Column[Any] | None:
        """The column of a metric; None for one that has none."""
        return self.table.columns.get(f"m{self.keys[metric]}")

    @classmethod
    def read(cls, connection: sa.Connection) -> "Columns":
        """Read which metrics there are."""
        return cls({name: key for key, name in connection.execute(sa.select(metrics.c.key, metrics.c.name))})

    def including(self, connection: sa.Connection, names: Sequence[str]) -> "Columns":
        """The same with columns for these metrics, too; made where they are missing."""
        missing = [name for name in dict.fromkeys(names) if name not in self.keys]
        keys = dict(self.keys)
        for name in missing:
            key = keys[name] = len(keys) + 1
            connection.execute(sa.insert(metrics).values(key=key, name=name))
            if key <= WIDEST:
                # a number of ours: no name of a user becomes part of a statement
                kind = sa.Double().compile(connection.dialect)
                connection.execute(sa.text(f"ALTER TABLE {PREFIX}checkpoints ADD COLUMN m{key} {kind}"))
                index, target = f"{PREFIX}checkpoints_m{key}", f"{PREFIX}checkpoints (m{key})"
                # a checkpoint without the metric costs the index nothing
                connection.execute(sa.text(f"CREATE INDEX {index} ON {target} WHERE m{key} IS NOT NULL"))
        return Columns(keys) if missing else self
