"""The tables of the catalogue, their migrations, and how a database is opened.

``checkpoints`` is what selections look at: one narrow row a checkpoint, every metric in an indexed column of its own,
named ``m1``, ``m2``, ...; ``metrics`` says which is which. After ``WIDEST`` metrics further ones go to ``rarities``, a
row a value, which is slower and has no limit. NaN is NULL here: it never matches. ``details`` holds the record that a
``Checkpoint`` is made from. What a refresh has read so far is in ``runs.read`` and ``noted``. ``aliases`` has what each
alias points at.

Nothing here is truth. A damaged SQLite file is thrown away and made anew from the repository.
"""

import secrets
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    insert,
    inspect,
    select,
    text,
    update,
)

from peakpoint.errors import FormatError

WIDEST = 200  # metrics with a column; PostgreSQL takes 1,600 columns, SQLite 2,000, and each index costs its share

PREFIX = "peakpoint_"  # a team's database may have tables of its own that are called runs or files

_TABLES = MetaData()
_Key = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers rows by itself only as INTEGER


def _owner(of: str = "runs") -> ForeignKey:
    return ForeignKey(f"{PREFIX}{of}.key", ondelete="CASCADE")


meta = Table(
    PREFIX + "meta",
    _TABLES,
    Column("version", Integer, nullable=False),
    Column("repository", Text, nullable=False),  # the seal of peakpoint.json
    Column("location", Text, nullable=False),
    Column("born", BigInteger, nullable=False),  # another number when it is made anew: keys mean something else then
    Column("tick", BigInteger, nullable=False),  # one more with every change
    Column("free", BigInteger, nullable=False),  # the next key of a checkpoint
)
runs = Table(
    PREFIX + "runs",
    _TABLES,
    Column("key", _Key, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("rules", Text, nullable=False),
    Column("peaks", Text, nullable=False),
    Column("reports", BigInteger, nullable=False),
    Column("checkpoints", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("newest", Double),  # when the newest checkpoint was made
    Column("read", Text, nullable=False),  # how far its files are read: ``reading.Known`` as JSON
)
noted = Table(
    PREFIX + "noted",
    _TABLES,
    Column("run", _Key, _owner(), primary_key=True),
    Column("checkpoint", Text, primary_key=True),
    Column("metrics", Text, nullable=False),
    Column("pinned", Text),
)
metrics = Table(
    PREFIX + "metrics",
    _TABLES,
    Column("key", _Key, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
)
checkpoints = Table(
    PREFIX + "checkpoints",
    _TABLES,
    Column("key", _Key, primary_key=True),
    Column("run", _Key, _owner(), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("epoch", BigInteger),
    Column("step", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("created", Double, nullable=False),  # seconds since 1970
    Column("pinned", Boolean, nullable=False),
    Column("archived", Boolean, nullable=False),
    Column("whole", Boolean, nullable=False),
    Index(PREFIX + "checkpoints_run", "run", "sequence"),
    Index(PREFIX + "checkpoints_epoch", "epoch"),
    Index(PREFIX + "checkpoints_step", "step"),
    Index(PREFIX + "checkpoints_size", "size"),
    Index(PREFIX + "checkpoints_created", "created"),
)
rarities = Table(
    PREFIX + "rarities",
    _TABLES,
    Column("checkpoint", _Key, _owner("checkpoints"), primary_key=True),
    Column("metric", _Key, _owner("metrics"), primary_key=True),
    Column("value", Double, nullable=False),
    Index(PREFIX + "rarities_value", "metric", "value"),
)
details = Table(
    PREFIX + "details",
    _TABLES,
    Column("checkpoint", _Key, _owner("checkpoints"), primary_key=True),
    Column("id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("record", Text, nullable=False),
    Index(PREFIX + "details_id", "id"),
    Index(PREFIX + "details_name", "name"),
)
reasons = Table(
    PREFIX + "reasons",
    _TABLES,
    Column("checkpoint", _Key, _owner("checkpoints"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("reason", Text, nullable=False),
)
files = Table(
    PREFIX + "files",
    _TABLES,
    Column("checkpoint", _Key, _owner("checkpoints"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("digest", Text, nullable=False),
    Column("shared", Text),
    Index(PREFIX + "files_digest", "digest"),
)

_LATER = MetaData()  # what migrations after the first have added
aliases = Table(
    PREFIX + "aliases",
    _LATER,
    Column("name", Text, primary_key=True),
    Column("number", BigInteger, nullable=False),  # of its newest record
    Column("digest", Text, nullable=False),  # of that record
    Column("run", Text),  # what it points at, whether that exists or not; NULL when it is retired
    Column("checkpoint", Text),
    Column("since", Double, nullable=False),
    Index(PREFIX + "aliases_checkpoint", "checkpoint"),
)


# --- migrations ---------------------------------------------------------------------------------------------------

Migration = Callable[[Connection], None]


def _first(connection: Connection) -> None:
    _TABLES.create_all(connection, checkfirst=False)  # what is there is somebody's


def _second(connection: Connection) -> None:
    _LATER.create_all(connection, checkfirst=False)


MIGRATIONS: tuple[Migration, ...] = (_first, _second)
"""Step n brings a catalogue from version n to n + 1. Steps are never changed once released, only added."""


def version_of(connection: Connection) -> int:
    """The version of the catalogue in a database; 0 when there is none."""
    if not inspect(connection).has_table(PREFIX + "meta"):
        return 0
    found = connection.scalar(select(meta.c.version))
    return 0 if found is None else int(found)


def migrate(
    connection: Connection,
    repository: str,
    location: str,
    migrations: Sequence[Migration] = MIGRATIONS,
) -> None:
    """Bring a catalogue to the newest version, in the caller's transaction.

    Raises:
        FormatError: a newer release made it.
    """
    version = version_of(connection)
    if version:  # once nobody else is at it
        connection.execute(select(meta.c.version).with_for_update())
        version = version_of(connection)
    if version > len(migrations):
        raise FormatError(
            f"the catalogue {connection.engine.url.render_as_string()} has version {version}; this release knows up "
            f"to {len(migrations)}: update Peakpoint, or give another database (PEAKPOINT_CATALOGUE)"
        )
    for step in migrations[version:]:
        step(connection)
    if version == 0:
        # from anywhere, so that nobody takes one that was made anew for the one that they knew
        tick = secrets.randbits(60)
        given = {"version": len(migrations), "repository": repository, "location": location}
        given |= {"born": secrets.randbits(60), "tick": tick, "free": 1}
        connection.execute(insert(meta).values(given))
    elif version < len(migrations):
        connection.execute(update(meta).values(version=len(migrations)))


def drop_all(connection: Connection) -> None:
    """Remove every table of the catalogue; it is made anew from the files."""
    if inspect(connection).has_table(PREFIX + "meta"):
        _LATER.drop_all(connection)
        _TABLES.drop_all(connection)


# --- metrics in columns -------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _table(metrics: int) -> Table:
    """The table of checkpoints with so many metrics in it; the same object again, so that SQL is compiled once."""
    columns = [Column(column.name, column.type, primary_key=column.primary_key) for column in checkpoints.columns]
    return Table(
        PREFIX + "checkpoints", MetaData(), *columns, *(Column(f"m{key}", Double) for key in range(1, metrics + 1))
    )


class Columns:
    """Which metric is where, as of one moment; ``table`` has a column for each that has one.

    Args:
        known: metric name to key: 1, 2, 3, ...
    """

    def __init__(self, known: dict[str, int]) -> None:
        self.keys = known
        self.table = _table(min(len(known), WIDEST))

    def column(self, metric: str) -> Column[Any] | None:
        """The column of a metric; None for one that has none."""
        return self.table.columns.get(f"m{self.keys[metric]}")

    @classmethod
    def read(cls, connection: Connection) -> "Columns":
        """What there is."""
        return cls({name: key for key, name in connection.execute(select(metrics.c.key, metrics.c.name))})

    def including(self, connection: Connection, names: Sequence[str]) -> "Columns":
        """The same with columns for these metrics, too; made where they are missing."""
        missing = [name for name in dict.fromkeys(names) if name not in self.keys]
        if not missing:
            return self
        known = dict(self.keys)
        for name in missing:
            key = len(known) + 1
            connection.execute(insert(metrics).values(key=key, name=name))
            if key <= WIDEST:
                # a number of ours: no name of a user becomes part of a statement
                kind = Double().compile(connection.dialect)
                connection.execute(text(f"ALTER TABLE {PREFIX}checkpoints ADD COLUMN m{key} {kind}"))
                index, on = f"{PREFIX}checkpoints_m{key}", f"{PREFIX}checkpoints (m{key})"
                # who has not got it does not pay for it
                connection.execute(text(f"CREATE INDEX {index} ON {on} WHERE m{key} IS NOT NULL"))
            known[name] = key
        return Columns(known)
