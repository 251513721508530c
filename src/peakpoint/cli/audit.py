"""The command ``audit``."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from peakpoint import catalogue as catalogues
from peakpoint.cli import tables
from peakpoint.cli.answer import Answer, answers
from peakpoint.cli.arguments import CATALOGUE, ROOT
from peakpoint.cli.progress import progress_bar, run_bar
from peakpoint.cli.render import command, count
from peakpoint.errors import CorruptError
from peakpoint.format import layout
from peakpoint.format.amounts import size_text
from peakpoint.repository import audit as audits
from peakpoint.repository.root import Repository, open_repository

_KINDS = {
    "damage": "[bold red]damaged[/]",
    "litter": "[yellow]incomplete[/]",
    "foreign": "[blue]foreign[/]",
    "busy": "[cyan]in use[/]",
    "removed": "[green]removed[/]",
}


@click.command()
@ROOT
@click.option("--deep", is_flag=True, help="Compare every byte of every file with its digest.")
@click.option("--clean", is_flag=True, help="Remove incomplete saves; damaged checkpoints are never touched.")
@click.option("--dry-run", is_flag=True, help="With --clean: only say what would be removed.")
@click.option("--rebuild", is_flag=True, help="Rebuild the catalogue from the files.")
@CATALOGUE
@answers
def audit(root: Path, catalogue: str | None, *, deep: bool, clean: bool, dry_run: bool, rebuild: bool) -> Answer:
    """Find damage and incomplete saves. Exits with 12 when there is damage."""
    repository = open_repository(root)
    removed = audits.clean(repository) if clean and not dry_run else []
    result = _audit(repository, deep=deep)
    result.findings += catalogues.audit(repository, catalogue)
    rebuilt = _rebuild(repository, catalogue) if rebuild else None
    data = {
        "findings": [asdict(finding) for finding in result.findings],
        "removed": [asdict(finding) for finding in removed],
        "runs": result.runs,
        "checkpoints": result.checkpoints,
        "bytes": result.bytes,
        "deep": deep,
        "clean": result.clean,
        "catalogue": rebuilt,
    }

    def text(console: Console) -> None:
        _print_audit(console, root, result, removed)
        if rebuilt is not None:
            click.echo(f"rebuilt the catalogue {rebuilt}")

    return Answer(data, text, exit_code=CorruptError.exit_code if result.of_kind("damage") else 0)


def _audit(repository: Repository, *, deep: bool) -> audits.Audit:
    if not deep:
        return audits.audit(repository)
    total = sum(manifest.size_bytes for run in repository.runs() for manifest in run.manifests())
    with progress_bar("reading", total) as advance:
        return audits.audit(repository, deep=True, progress=lambda manifest: advance(manifest.size_bytes))


def _rebuild(repository: Repository, where: str | None) -> str:
    """Rebuild the catalogue; return where it is."""
    catalogue = catalogues.Catalogue(repository, where)
    with run_bar() as progress:
        catalogue.rebuild(progress)
    return catalogue.location


def _print_audit(console: Console, root: Path, result: audits.Audit, removed: Sequence[audits.AuditFinding]) -> None:
    findings = [audits.AuditFinding("removed", finding.where, finding.what) for finding in removed] + result.findings
    if findings:
        rows = [(_KINDS[finding.kind], escape(finding.where), escape(finding.what)) for finding in findings]
        console.print(tables.plain(("kind", "where", "what"), rows))
    console.print(audit_sentence(result))
    damage, litter = result.of_kind("damage"), result.of_kind("litter")
    if damage:
        console.print(f"[bold red]{len(damage)} damaged[/]")
        if any("/checkpoints/" in finding.where for finding in damage):
            console.print("A resume skips damaged checkpoints.")
        if any(finding.where.startswith(f"{layout.ALIASES}/") for finding in damage):
            console.print(
                "Nothing can be removed while the newest record of an alias is damaged: promote --force or rollback "
                "adds a good one."
            )
    if litter:
        console.print(f"[yellow]{count(len(litter), 'leftover')} of incomplete saves[/], harmless. To remove:")
        console.print(f"  {escape(command('audit', root, '--clean'))}", soft_wrap=True)
    if result.clean:
        console.print("[green]clean[/]")


def audit_sentence(result: audits.Audit) -> str:
    """Say what was checked, in one sentence."""
    depth = (
        "every byte compared with its digest"
        if result.deep
        else "file sizes and manifests checked; --deep compares every byte"
    )
    return f"{count(result.runs, 'run')}, {count(result.checkpoints, 'checkpoint')}, {size_text(result.bytes)}: {depth}"
