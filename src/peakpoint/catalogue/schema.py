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

import sqlalchemy as sa

from peakpoint.errors import FormatError

WIDEST = 200  # metrics with a column; PostgreSQL takes 1,600 columns, SQLite 2,000, and each index costs its share

PREFIX = "peakpoint_"  # a team's database may have tables of its own that are called runs or files

_NAMED = {"ix": "%(table_name)s_%(column_0_name)s"}
_TABLES = sa.MetaData(naming_convention=_NAMED)
_Key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite numbers rows by itself only as INTEGER


def _owner(of: str = "runs") -> sa.ForeignKey:
    return sa.ForeignKey(f"{PREFIX}{of}.key", ondelete="CASCADE")


meta = sa.Table(
    PREFIX + "meta",
    _TABLES,
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("repository", sa.Text, nullable=False),  # the seal of peakpoint.json
    sa.Column("location", sa.Text, nullable=False),
    sa.Column(
        "born", sa.BigInteger, nullable=False
    ),  # another number when it is made anew: keys mean something else then
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
noted = sa.Table(
    PREFIX + "noted",
    _TABLES,
    sa.Column("run", _Key, _owner(), primary_key=True),
    sa.Column("checkpoint", sa.Text, primary_key=True),
    sa.Column("metrics", sa.Text, nullable=False),
    sa.Column("pinned", sa.Text),
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
    sa.Column("run", _Key, _owner(), nullable=False),
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
    sa.Column("checkpoint", _Key, _owner("checkpoints"), primary_key=True),
    sa.Column("metric", _Key, _owner("metrics"), primary_key=True),
    sa.Column("value", sa.Double, nullable=False),
    sa.Index(PREFIX + "rarities_value", "metric", "value"),
)
details = sa.Table(
    PREFIX + "details",
    _TABLES,
    sa.Column("checkpoint", _Key, _owner("checkpoints"), primary_key=True),
    sa.Column("id", sa.Text, nullable=False, index=True),
    sa.Column("name", sa.Text, nullable=False, index=True),
    sa.Column("record", sa.Text, nullable=False),
)
reasons = sa.Table(
    PREFIX + "reasons",
    _TABLES,
    sa.Column("checkpoint", _Key, _owner("checkpoints"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("reason", sa.Text, nullable=False),
)
_LATER = sa.MetaData(naming_convention=_NAMED)  # what migrations after the first have added
aliases = sa.Table(
    PREFIX + "aliases",
    _LATER,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False),  # of its newest record
    sa.Column("digest", sa.Text, nullable=False),  # of that record
    sa.Column("run", sa.Text),  # what it points at, whether that exists or not; NULL when it is retired
    sa.Column("checkpoint", sa.Text, index=True),
    sa.Column("since", sa.Double, nullable=False),
)


# --- migrations ---------------------------------------------------------------------------------------------------

Migration = Callable[[sa.Connection], None]


def _first(connection: sa.Connection) -> None:
    _TABLES.create_all(connection, checkfirst=False)  # what is there is somebody's


def _second(connection: sa.Connection) -> None:
    _LATER.create_all(connection, checkfirst=False)


def _third(connection: sa.Connection) -> None:
    connection.execute(sa.text(f"DROP TABLE IF EXISTS {PREFIX}files"))  # nothing has ever read it


MIGRATIONS: tuple[Migration, ...] = (_first, _second, _third)
"""Step n brings a catalogue from version n to n + 1. Steps are never changed once released, only added."""


def version_of(connection: sa.Connection) -> int:
    """The version of the catalogue in a database; 0 when there is none."""
    if not sa.inspect(connection).has_table(PREFIX + "meta"):
        return 0
    found = connection.scalar(sa.select(meta.c.version))
    return 0 if found is None else int(found)


def is_sound(engine: sa.Engine, repository: str, born: int | None) -> bool:
    """Whether a SQLite file is whole and the catalogue of a repository, and was not born as ``born``."""
    with engine.connect() as connection:
        checked = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        found = connection.execute(sa.select(meta.c.repository, meta.c.born)).one()
        return checked == "ok" and found.repository == repository and found.born != born


def migrate(
    connection: sa.Connection,
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
        connection.execute(sa.select(meta.c.version).with_for_update())
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
        connection.execute(sa.insert(meta).values(given))
    elif version < len(migrations):
        connection.execute(sa.update(meta).values(version=len(migrations)))


def drop_all(connection: sa.Connection) -> None:
    """Remove every table of the catalogue; it is made anew from the files."""
    if sa.inspect(connection).has_table(PREFIX + "meta"):
        _LATER.drop_all(connection)
        _TABLES.drop_all(connection)


# --- metrics in columns -------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _table(metrics: int) -> sa.Table:
    """The table of checkpoints with so many metrics in it; the same object again, so that SQL is compiled once."""
    columns = [sa.Column(column.name, column.type, primary_key=column.primary_key) for column in checkpoints.columns]
    return sa.Table(
        PREFIX + "checkpoints",
        sa.MetaData(),
        *columns,
        *(sa.Column(f"m{key}", sa.Double) for key in range(1, metrics + 1)),
    )


class Columns:
    """Which metric is where, as of one moment; ``table`` has a column for each that has one.

    Args:
        known: metric name to key: 1, 2, 3, ...
    """

    def __init__(self, known: dict[str, int]) -> None:
        self.keys = known
        self.table = _table(min(len(known), WIDEST))

    def column(self, metric: str) -> sa.Column[Any] | None:
        """The column of a metric; None for one that has none."""
        return self.table.columns.get(f"m{self.keys[metric]}")

    @classmethod
    def read(cls, connection: sa.Connection) -> "Columns":
        """What there is."""
        return cls({name: key for key, name in connection.execute(sa.select(metrics.c.key, metrics.c.name))})

    def including(self, connection: sa.Connection, names: Sequence[str]) -> "Columns":
        """The same with columns for these metrics, too; made where they are missing."""
        missing = [name for name in dict.fromkeys(names) if name not in self.keys]
        if not missing:
            return self
        known = dict(self.keys)
        for name in missing:
            key = len(known) + 1
            connection.execute(sa.insert(metrics).values(key=key, name=name))
            if key <= WIDEST:
                # a number of ours: no name of a user becomes part of a statement
                kind = sa.Double().compile(connection.dialect)
                connection.execute(sa.text(f"ALTER TABLE {PREFIX}checkpoints ADD COLUMN m{key} {kind}"))
                index, on = f"{PREFIX}checkpoints_m{key}", f"{PREFIX}checkpoints (m{key})"
                # who has not got it does not pay for it
                connection.execute(sa.text(f"CREATE INDEX {index} ON {on} WHERE m{key} IS NOT NULL"))
            known[name] = key
        return Columns(known)
