"""The command ``history``: every alias, or every change of one; and how records of aliases look."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from peakpoint.cli import tables
from peakpoint.cli.answer import Answer, answers
from peakpoint.cli.arguments import ROOT
from peakpoint.cli.render import count, printable
from peakpoint.cli.tables import Column
from peakpoint.errors import ConfigError, CorruptError, FormatError, NotFoundError
from peakpoint.format.amounts import read_time
from peakpoint.repository import aliases
from peakpoint.repository.aliases import AliasRecord
from peakpoint.repository.provenance import utc_now
from peakpoint.repository.root import open_repository
from peakpoint.store import Store


@click.command()
@ROOT
@click.argument("alias", metavar="[ALIAS]", required=False)
@click.option("--at", metavar="TIME", help="Only what it pointed at then: 2026-11-25T18:30, or 7d for 7 days ago.")
@answers
def history(root: Path, alias: str | None, at: str | None) -> Answer:
    """List the aliases: what is in production, since when, by whom, and why; of one alias, every change.

    The chain of records of an alias is checked; exits with 12 when one was changed or is missing.
    """
    store = open_repository(root).store
    if alias is not None:
        return _history(store, alias.removeprefix("@"), at)
    if at is not None:
        raise ConfigError("--at is for one alias; name it")
    return _all(store)


def _all(store: Store) -> Answer:
    newest: list[AliasRecord] = []
    damage: list[str] = []
    for name in aliases.names(store):
        try:
            record = aliases.newest(store, name)
        except FormatError as error:
            damage.append(f"{name}: {error}")
            continue
        if isinstance(record, AliasRecord):
            newest.append(record)
        elif record is not None:
            damage.append(f"{name}: {record.error}")

    def text(console: Console) -> None:
        columns = [
            Column("alias", [printable(record.alias) for record in newest], right=False),
            Column("since (UTC)", [f"{record.at:%Y-%m-%d %H:%M}" for record in newest]),
            Column("records", [str(record.number) for record in newest]),
            Column("by", [printable(record.by) for record in newest], right=False),
        ]
        reasons = [f"{printable(holder_name(record))}: {printable(record.why)}" for record in newest]
        console.print(tables.with_reasons(console, columns, ["by"], "checkpoint, and why", reasons))

    none = "" if damage else "no aliases yet; to create one: peakpoint promote ROOT REF --as champion --why '...'"
    data = {"aliases": list(map(record_json, newest)), "damage": damage}
    return Answer(data, text if newest else none, damage, CorruptError.exit_code if damage else 0)


def _history(store: Store, alias: str, at: str | None) -> Answer:
    chain = aliases.history(store, alias)
    records = chain.records
    if at is not None:
        moment = read_time("--at", at, utc_now())
        record = aliases.alias_at(chain.records, moment)
        if record is None:
            raise NotFoundError(f"{alias} pointed at no checkpoint yet at {moment:%Y-%m-%d %H:%M:%S} UTC")
        records = (record,)

    def text(console: Console) -> None:
        _print_records(console, records)
        if not chain.damage and at is None:
            checked = f"{count(len(records), 'record')}, none changed or missing"
            click.echo(f"{checked}; digest of the newest: {records[-1].digest[:16]}")

    data = {"alias": alias, "records": list(map(record_json, records)), "damage": chain.damage}
    return Answer(data, text, chain.damage, CorruptError.exit_code if chain.damage else 0)


def _print_records(console: Console, records: Sequence[AliasRecord]) -> None:
    columns = [
        Column("record", [str(record.number) for record in records]),
        Column("when (UTC)", [f"{record.at:%Y-%m-%d %H:%M:%S}" for record in records]),
        Column("what", list(map(_kind, records)), right=False),
        Column("by", [printable(record.by) for record in records], right=False),
    ]
    reasons = []
    for record in records:
        overridden = "".join(f"; FORCED although {reason}" for reason in record.forced)
        reasons.append(f"{printable(holder_name(record))}: {printable(record.why + overridden)}")
    console.print(tables.with_reasons(console, columns, ["by"], "checkpoint, and why", reasons))


def _kind(record: AliasRecord) -> str:
    colour = {"promoted": "green", "rolled back": "yellow", "retired": "dim"}[record.kind]
    return f"[{colour}]{record.kind}[/]" + (" [red]by force[/]" if record.forced else "")


def holder_name(record: AliasRecord) -> str:
    """Return RUN/NAME of what an alias points at."""
    return "cleared" if record.target is None else f"{record.target.run}/{record.target.name}"


def record_json(record: AliasRecord) -> dict[str, Any]:
    """Describe a record of an alias for programs."""
    return asdict(record) | {"ref": None if record.target is None else record.target.ref}
