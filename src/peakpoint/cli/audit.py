"""The command ``audit``."""

import sys
from dataclasses import asdict
from pathlib import Path

import click
from rich.markup import escape
from rich.progress import Progress

from peakpoint import catalogue as catalogues
from peakpoint.cli import render
from peakpoint.cli.arguments import CATALOGUE, JSON, ROOT
from peakpoint.cli.select import progress_of_runs
from peakpoint.errors import CorruptError
from peakpoint.format import layout
from peakpoint.repository import audit as audits
from peakpoint.repository.root import Repository, open_repository


@click.command()
@ROOT
@click.option("--deep", is_flag=True, help="Compare every byte of every file with its digest.")
@click.option("--clean", is_flag=True, help="Remove what crashes have left behind; damage is never touched.")
@click.option("--dry-run", is_flag=True, help="With --clean: only say what would be removed.")
@click.option("--rebuild", is_flag=True, help="Make the catalogue anew from the files.")
@CATALOGUE
@JSON
def audit(
    root: Path,
    deep: bool,  # noqa: FBT001
    clean: bool,  # noqa: FBT001
    dry_run: bool,  # noqa: FBT001
    rebuild: bool,  # noqa: FBT001
    catalogue: str | None,
    json: bool,  # noqa: FBT001
) -> None:
    """Find damage, and what crashes have left behind. Exits with 12 when there is damage."""
    repository = open_repository(root)
    removed = audits.clean(repository) if clean and not dry_run else []
    result = _with_progress(repository, deep=deep)
    result.findings += catalogues.audit(repository, catalogue)
    rebuilt = _rebuild(repository, catalogue) if rebuild else None
    if json:
        render.as_json(
            {
                "findings": [asdict(finding) for finding in result.findings],
                "removed": [asdict(finding) for finding in removed],
                "runs": result.runs,
                "checkpoints": result.checkpoints,
                "bytes": result.bytes,
                "deep": deep,
                "clean": result.clean,
                "catalogue": rebuilt,
            }
        )
    else:
        _print_audit(root, result, removed)
        if rebuilt is not None:
            click.echo(f"the catalogue {rebuilt} is made anew from the files")
    if result.of_kind("damage"):
        sys.exit(CorruptError.exit_code)


def _with_progress(repository: Repository, *, deep: bool) -> audits.Audit:
    if not deep or not sys.stderr.isatty():
        return audits.audit(repository, deep=deep)
    total = sum(manifest.size_bytes for run in repository.runs() for manifest in run.manifests())
    with Progress(console=render.console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=total)
        return audits.audit(
            repository, deep=True, progress=lambda manifest: progress.advance(task, manifest.size_bytes)
        )


def _print_audit(root: Path, result: audits.Audit, removed: list[audits.AuditFinding]) -> None:
    console = render.console()
    rows = [audits.AuditFinding("removed", finding.where, finding.what) for finding in removed] + result.findings
    if rows:
        console.print(render.findings_table(rows))
    console.print(render.audit_sentence(result))
    damage, litter = result.of_kind("damage"), result.of_kind("litter")
    if damage:
        console.print(f"[bold red]{len(damage)} damaged[/]")
        if any("/checkpoints/" in one.where for one in damage):
            console.print("a resume passes over damaged checkpoints by itself")
        if any(one.where.startswith(f"{layout.ALIASES}/") for one in damage):
            console.print(
                "a damaged newest record of an alias protects everything: promote --force or rollback adds a good one"
            )
    if litter:
        clean = escape(render.command("audit", root, "--clean"))
        console.print(f"[yellow]{len(litter)} leftovers of a crash[/], harmless: {clean} removes them", soft_wrap=True)
    if result.clean:
        console.print("[green]clean[/]")


def _rebuild(repository: Repository, where: str | None) -> str:
    """Make the catalogue anew; returns where it is."""
    catalogue = catalogues.Catalogue(repository, where)
    with progress_of_runs() as progress:
        catalogue.rebuild(progress)
    return catalogue.location


COMMANDS = (audit,)
