"""Aliases beside the checkpoints that they point at."""

from collections.abc import Iterable, Sequence

import click

from peakpoint.cli.tables import Column
from peakpoint.repository import aliases
from peakpoint.repository.aliases import newest_of_all
from peakpoint.repository.run import Run


def text(aliases: Iterable[str]) -> str:
    """Aliases as refs, a line each."""
    return "\n".join(f"[bold magenta]@{alias}[/]" for alias in aliases)


def columns(aliases: Sequence[Iterable[str]]) -> list[Column]:
    """A column of the aliases of each row, if any has one."""
    cells = list(map(text, aliases))
    return [Column("aliases", cells, right=False)] if any(cells) else []


def pointing(run: Run) -> dict[str, tuple[str, ...]]:
    """The ids of the checkpoints of a run that aliases point at, with the aliases; those that are damaged are told."""
    found, unread = newest_of_all(run.store)
    for alias, why in unread.items():
        click.echo(f"peakpoint: what the alias {alias!r} points at cannot be read: {why}", err=True)
    return aliases.aliases_by_checkpoint(
        one for one in found.values() if one.target is not None and one.target.run == run.name
    )
