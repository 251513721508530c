"""The command ``release``."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from peakpoint.cli.command import CATALOGUE, KEY, ROOT, Answer, command, status_line
from peakpoint.cli.promotion import hook_problems, hook_text, print_comparison, proposal_json
from peakpoint.cli.records import record_json
from peakpoint.cli.render import command_line, fields, literal
from peakpoint.cli.terminal import say
from peakpoint.errors import RefusedError
from peakpoint.production import promotion, validation
from peakpoint.production.policy import read_policies
from peakpoint.production.release import Release
from peakpoint.repository.root import open_repository

_COLOURS = {"promoted": "green", "refused": "red", "nothing fits": "red"}
_OUTCOMES = {"nothing fits": "no checkpoint matches"}


@command(ROOT)
@click.option("--alias", default="champion", help="What to release to; its table in production.toml.")
@click.option(
    "--why", default="", show_default=False, help="The reason, for the record; by default the rule that selected."
)
@KEY
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@CATALOGUE
def release(root: Path, alias: str, why: str, key: Path | None, catalogue: str | None, *, dry_run: bool) -> Answer:
    """Select, validate, compare and promote by production.toml; exits with 16 when it refuses."""
    repository = open_repository(root)
    policies = read_policies(repository.store)
    promotion.check_key(policies.of(alias), key)
    with status_line("") as progress:
        result = Release(
            repository,
            alias,
            policies,
            validation.validate,
            why=why,
            private_key=key,
            dry_run=dry_run,
            progress=progress,
            catalogue=catalogue,
        ).run()

    def text(console: Console) -> None:
        _print_release(console, root, result)
        if notified := hook_text(result.hook_results):
            say(notified)

    problems = hook_problems(root, alias, result.hook_results)
    refused = result.outcome in {"refused", "nothing fits"}
    return Answer(_release_json(result), text, problems, RefusedError.exit_code if refused else int(bool(problems)))


def _print_release(console: Console, root: Path, result: Release) -> None:
    width = max(len(step.name) for step in result.steps)
    for step in result.steps:
        console.print(f"[bold]{step.name:<{width}}[/]  {literal(step.said)}", soft_wrap=True)
    if result.proposal is not None and result.proposal.comparison is not None:
        console.print()
        print_comparison(console, result.proposal.comparison)
    for reason in result.reasons:
        console.print(f"[red]blocked[/]: {literal(reason)}", soft_wrap=True)
    failed = None if result.proposal is None else result.proposal.validation
    if result.outcome == "refused" and failed is not None and failed.failures:
        again = literal(command_line("validate", root, f"{failed.run}/{failed.name}"))
        console.print(f"To validate it again: {again}. The next best checkpoint is not tried.", soft_wrap=True)
    colour = _COLOURS.get(result.outcome, "bold")
    outcome = _OUTCOMES.get(result.outcome, result.outcome)
    console.print(f"[{colour}]{outcome}[/]" + (f" (release {result.id})" if result.id else ""))


def _release_json(result: Release) -> dict[str, Any]:
    return fields(result, "id", "alias", "outcome", "reasons") | {
        "steps": [fields(step, "name", "said") for step in result.steps],
        "candidate": result.candidate and result.candidate.ref,
        "proposal": result.proposal and proposal_json(result.proposal),
        "record": result.record and record_json(result.record),
        "told": result.hook_results,
    }
