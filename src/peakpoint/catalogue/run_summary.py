"""What the catalogue says of whole runs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, func, select

from peakpoint.catalogue import schema
from peakpoint.catalogue.aliases import alias_targets
from peakpoint.catalogue.database import DamagedError, read_json
from peakpoint.catalogue.refresh import decode_position
from peakpoint.catalogue.rows import RunReports
from peakpoint.rules.peaks import Peak


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One run, as the catalogue has it.

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


def run_summaries(connection: Connection, top: int | None) -> list[RunSummary]:
    """Every run, or so many at most; those that saved last come first."""
    table = schema.runs.c
    statement = select(schema.runs).order_by(table.newest.desc().nulls_last(), table.name).limit(top)
    aliases: dict[str, list[str]] = {}
    for (run, _), names in alias_targets(connection).items():
        aliases.setdefault(run, []).extend(names)
    return [_summary(row, aliases.get(row.name, ())) for row in connection.execute(statement)]


def _summary(row: Any, aliases: Iterable[str]) -> RunSummary:
    journal = RunReports.of_row(row)
    directories = decode_position(row.read).unsettled.values()
    try:
        return RunSummary(
            name=row.name,
            rules=tuple(journal.rules),
            peaks=tuple(journal.peaks),
            reports=journal.reports,
            checkpoints=int(row.checkpoints),
            size_bytes=int(row.size),
            newest=None if row.newest is None else datetime.fromtimestamp(row.newest, UTC),
            damaged=tuple(directory.damage for directory in directories if directory.damage is not None),
            kept=dict(read_json(row.peaks)["kept"]),
            aliases=tuple(sorted(aliases)),
        )
    except (KeyError, OSError, OverflowError, TypeError, ValueError) as error:
        raise DamagedError(f"the row of run {row.name!r} cannot be read: {error}") from error


def totals(connection: Connection) -> tuple[int, int, int]:
    """How many runs and checkpoints there are, and the bytes of their files."""
    table = schema.runs.c
    columns = (func.count(), func.sum(table.checkpoints), func.sum(table.size))
    count, checkpoints, size = connection.execute(select(*columns)).one()
    return count, int(checkpoints or 0), int(size or 0)
