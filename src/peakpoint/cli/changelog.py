"""The command ``changelog``."""

from pathlib import Path
from typing import Any

import click
import msgspec

from peakpoint.cli.answer import Answer, answers
from peakpoint.cli.arguments import ROOT, reads
from peakpoint.errors import ConflictError
from peakpoint.reports import changelog as changelogs
from peakpoint.reports.changelog import markdown
from peakpoint.reports.evaluation.files import replace_file
from peakpoint.repository.root import open_repository
from peakpoint.store import translated


@click.command()
@ROOT
@click.option(
    "--since", callback=reads(lambda _, text: changelogs.since(text)), metavar="TIME|DURATION", help="Such as 7d."
)
@click.option(
    "--until", callback=reads(lambda _, text: changelogs.until(text)), metavar="TIME", help="A date is included."
)
@click.option("--run", "runs", multiple=True, metavar="RUN", help="Only what is about this run; may be repeated.")
@click.option("--kind", "kinds", multiple=True, metavar="KIND", help="Only this, such as promoted; may be repeated.")
@click.option("--all", "all_entries", is_flag=True, help="Do not group saves and removals, however many there are.")
@click.option("--to", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="JSON for FILE.json.")
@click.option("--force", is_flag=True, help="Replace a file that is not an earlier changelog, too.")
@answers
def changelog(
    root: Path,
    runs: tuple[str, ...],
    kinds: tuple[str, ...],
    to: Path | None,
    *,
    all_entries: bool,
    force: bool,
    **period: Any,
) -> Answer:
    """List everything that was done: promotions first, then saves, removals, and which rules kept what.

    A TIME is a date or a time in ISO 8601, in UTC when it names no zone.
    """
    repository = open_repository(root)
    entries = changelogs.entries(repository, only=runs or None, kinds=kinds, **period)
    page = markdown.by_day(entries, repository.store.location, everything=all_entries)
    if to is None:
        return Answer(entries, page.removesuffix("\n"))
    json_page = msgspec.json.format(msgspec.json.encode(entries), indent=2).decode() + "\n"
    _write(to, json_page if to.suffix.lower() == ".json" else page, force=force)
    entry_count = f"{len(entries):,} {'entry' if len(entries) == 1 else 'entries'}"
    return Answer(entries, f"wrote {to} ({entry_count})")


def _write(to: Path, text: str, *, force: bool) -> None:
    if not force and to.exists():
        with translated("look at", to):
            is_changelog = f"<!-- {markdown.MARK} -->" in to.read_text(encoding="utf-8", errors="ignore")[:200]
        if not is_changelog:
            raise ConflictError(
                f"{to} exists and is not a changelog of Peakpoint; choose another name, or replace it with --force"
            )
    replace_file(to, text.encode())
