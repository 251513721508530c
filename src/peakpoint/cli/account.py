"""Commands that tell: changelog, card."""

from pathlib import Path
from typing import Any

import click
import msgspec

from peakpoint.cli import render
from peakpoint.cli.arguments import JSON, REF, ROOT, reads
from peakpoint.errors import ConflictError
from peakpoint.reports import card as cards
from peakpoint.reports import changelog as changelogs
from peakpoint.reports.card.front_matter import front_matter
from peakpoint.reports.changelog import markdown
from peakpoint.reports.evaluation.files import replace_file
from peakpoint.repository.root import open_repository
from peakpoint.store import translated

# --- changelog ----------------------------------------------------------------------------------------------------


@click.command()
@ROOT
@click.option(
    "--since", callback=reads(lambda _, text: changelogs.since(text)), metavar="TIME|DURATION", help="Such as 7d."
)
@click.option(
    "--until", callback=reads(lambda _, text: changelogs.until(text)), metavar="TIME", help="A date is included."
)
@click.option("--run", "only", multiple=True, metavar="RUN", help="Only what is about this run; may be repeated.")
@click.option("--kind", "kinds", multiple=True, metavar="KIND", help="Only this, such as promoted; may be repeated.")
@click.option("--all", "everything", is_flag=True, help="Tell every save and removal, however many there are.")
@click.option(
    "--to",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write it to a file; JSON for FILE.json.",
)
@click.option("--force", is_flag=True, help="Replace a file that is no earlier changelog, too.")
@JSON
def changelog(
    root: Path,
    only: tuple[str, ...],
    kinds: tuple[str, ...],
    everything: bool,  # noqa: FBT001
    to: Path | None,
    force: bool,  # noqa: FBT001
    json: bool,  # noqa: FBT001
    **period: Any,
) -> None:
    """Tell everything that was done: saves, removals, claims, and above all what was promoted.

    A TIME is a date or a time in ISO 8601, in UTC where it says no zone.
    """
    repository = open_repository(root)
    found = changelogs.entries(repository, only=only or None, kinds=kinds, **period)
    if json or (to is not None and to.suffix.lower() == ".json"):
        text = msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n"
    else:
        text = markdown.by_day(found, repository.store.location, everything=everything)
    if to is None:
        click.echo(text, nl=False)
        return
    _write(to, text, force=force)
    click.echo(f"wrote {to} ({len(found):,} {'entry' if len(found) == 1 else 'entries'})")


def _write(to: Path, text: str, *, force: bool) -> None:
    if not force and to.exists():
        with translated("look at", to):
            ours = f"<!-- {markdown.MARK} -->" in to.read_text(encoding="utf-8", errors="ignore")[:200]
        if not ours:
            raise ConflictError(
                f"{to} exists, and no changelog of Peakpoint is in it; choose another name, or replace it with --force"
            )
    replace_file(to, text.encode())


# --- card ---------------------------------------------------------------------------------------------------------


@click.command()
@ROOT
@REF
@click.option("--to", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="README.md and curve.png.")
@click.option("--license", "license_", metavar="ID", help="Such as apache-2.0.")
@click.option("--data", metavar="TEXT", help="What it was trained and evaluated on.")
@click.option("--task", metavar="ID", help="Such as image-classification.")
@click.option("--base-model", metavar="ID", help="The model on the Hub that it was made of.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A further tag; may be repeated.")
@click.option("--about", type=click.Path(path_type=Path), metavar="FILE.md", help="Text of yours that is put in.")
@click.option("--force", is_flag=True, help="Replace files that are no earlier card, too.")
@JSON
def card(
    root: Path,
    ref: str,
    to: Path | None,
    license_: str | None,
    about: Path | None,
    tags: tuple[str, ...],
    force: bool,  # noqa: FBT001
    json: bool,  # noqa: FBT001
    **said: Any,
) -> None:
    """Write the model card of a checkpoint, above all of @champion: what it is, how good, why it is trusted."""
    text = "" if about is None else cards.about_text(about)
    found = cards.gather(
        open_repository(root), ref, cards.ModelDescription(license=license_, tags=tags, about=text, **said)
    )
    files = [] if to is None else cards.write(found, to, force=force)
    if json:
        page = cards.markdown(found) if to is None else files[0].read_text(encoding="utf-8")
        told = {"ref": f"{found.manifest.run}/{found.manifest.name}", "id": found.manifest.id}
        render.as_json(told | {"front_matter": front_matter(found), "markdown": page, "files": list(map(str, files))})
        return
    if to is None:
        click.echo(cards.markdown(found), nl=False)
    for file in files:
        click.echo(f"wrote {file} ({render.size(file.stat().st_size)})")
    if to is not None and len(files) == 1:
        click.echo("no curve: no rule ranks by a metric that has values, or Matplotlib is missing", err=True)


COMMANDS = (card, changelog)
