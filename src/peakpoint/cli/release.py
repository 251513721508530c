"""The command ``release``."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from peakpoint.cli import render
from peakpoint.cli.arguments import CATALOGUE, JSON, ROOT
from peakpoint.cli.production import KEY, print_comparison, proposal_json, record_json, report_hooks, working
from peakpoint.cli.render import words
from peakpoint.errors import RefusedError
from peakpoint.production import promotion, validation
from peakpoint.production import release as releases
from peakpoint.production.policy import read_policies
from peakpoint.production.release import Release
from peakpoint.repository.root import open_repository


@click.command()
@ROOT
@click.option(
    "--alias", default="champion", show_default=True, help="What to release to; its table in production.toml."
)
@click.option("--why", default="", help="The reason, for the record; the rule that selected by default.")
@KEY
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@CATALOGUE
@JSON
def release(
    root: Path,
    alias: str,
    why: str,
    key: Path | None,
    dry_run: bool,  # noqa: FBT001
    catalogue: str | None,
    json: bool,  # noqa: FBT001
) -> None:
    """Select, validate, compare and promote by production.toml; exits with 16 when it refuses."""
    repository = open_repository(root)
    policies = read_policies(repository.store)
    promotion.check_key(policies.of(alias), key)
    with working(quiet=json) as said:
        done = releases.release(
            repository,
            alias,
            policies,
            validation.validate,
            why=why,
            private_key=key,
            dry_run=dry_run,
            progress=said,
            catalogue=catalogue,
        )
    if json:
        render.as_json(_release_json(done))
    else:
        _print_release(render.console(), root, done)
    if done.outcome in {"refused", "nothing fits"}:
        sys.exit(RefusedError.exit_code)
    report_hooks(root, alias, done.hook_results)


def _print_release(console: Console, root: Path, done: Release) -> None:
    width = max(len(step.name) for step in done.steps)
    for step in done.steps:
        console.print(f"[bold]{step.name:<{width}}[/]  {words(step.said)}", soft_wrap=True)
    if done.proposal is not None and done.proposal.comparison is not None:
        console.print()
        print_comparison(console, done.proposal.comparison)
    for reason in done.reasons:
        console.print(f"[red]against it[/]: {words(reason)}", soft_wrap=True)
    one = None if done.proposal is None else done.proposal.validation
    if done.outcome == "refused" and one is not None and one.failures:
        again = render.command("validate", root, f"{one.run}/{one.name}")
        console.print(f"{words(again)} validates it again; the next best is not tried by itself", soft_wrap=True)
    colour = {"promoted": "green", "refused": "red", "nothing fits": "red"}.get(done.outcome, "bold")
    console.print(f"[{colour}]{done.outcome}[/]" + (f" (release {done.id})" if done.id else ""))


def _release_json(done: Release) -> dict[str, Any]:
    return {
        "id": done.id,
        "alias": done.alias,
        "outcome": done.outcome,
        "steps": [asdict(step) for step in done.steps],
        "candidate": None if done.candidate is None else done.candidate.ref,
        "proposal": None if done.proposal is None else proposal_json(done.proposal),
        "record": None if done.record is None else record_json(done.record),
        "reasons": done.reasons,
        "told": [asdict(one) for one in done.hook_results],
    }


COMMANDS = (release,)
