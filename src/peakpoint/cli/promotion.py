"""The commands ``promote`` and ``rollback``: change what an alias points at."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
from rich.console import Console

from peakpoint.cli import tables
from peakpoint.cli.command import KEY, POSITIVE, ROOT, Answer, command, status_line
from peakpoint.cli.completion import ALIASES, CHECKPOINTS
from peakpoint.cli.records import holder_name, record_json, sign_checkpoint, validation_line
from peakpoint.cli.render import command_line, console, count, facts, fields, literal, number, ref, rounded
from peakpoint.cli.terminal import complain, say
from peakpoint.errors import ConfigError, RefusedError
from peakpoint.production import hooks, promotion
from peakpoint.production.comparison import HolderComparison, MetricPair
from peakpoint.production.hooks import HookResult
from peakpoint.production.policy import Policy, read_policies
from peakpoint.production.proposal import Proposal, propose, unsigned
from peakpoint.repository import aliases
from peakpoint.repository.aliases import AliasRecord
from peakpoint.repository.root import Repository, open_repository

# --- proposals -----------------------------------------------------------------------------------------------------


_VERDICTS = {True: "[green]better[/]", False: "[red]worse[/]", None: ""}


def print_proposal(console: Console, proposal: Proposal, *, force: bool = False) -> None:
    """Print the holder, the candidate, their comparison, and what blocks the promotion."""
    rows = [(proposal.alias, literal(_holder(proposal))), ("candidate", literal(ref(proposal.manifest)))]
    if not proposal.unchanged:
        validation = "none" if proposal.validation is None else validation_line(proposal.validation)
        policy = "none" if proposal.policy is None else "production.toml"
        rows += [("validation", validation), ("policy", policy)]
    console.print(facts(rows))
    tables_of_others = [name for name in read_policies(proposal.run.store).content if name != proposal.alias]
    if proposal.policy is None and tables_of_others:
        note = f"no policy: production.toml has no table [{proposal.alias}]; tables: {', '.join(tables_of_others)}"
        console.print(f"[yellow]note[/]: {literal(note)}", soft_wrap=True)
    if proposal.comparison is not None:
        console.print()
        print_comparison(console, proposal.comparison)
    for reason in proposal.refusals:
        console.print(f"[red]blocked, cannot be forced[/]: {literal(reason)}", soft_wrap=True)
    for reason in proposal.objections:
        label = "[yellow]overridden[/]" if force else "[red]blocked[/]"
        console.print(f"{label}: {literal(reason)}", soft_wrap=True)


def _holder(proposal: Proposal) -> str:
    record = proposal.current
    if record is None:
        return "not set yet" if proposal.newest is None else "not known: its newest record is damaged"
    since = f"since {record.at:%Y-%m-%d %H:%M} UTC by {record.by}: {record.why}"
    return f"{holder_name(record)}, {since}"


def print_comparison(console: Console, comparison: HolderComparison) -> None:
    """Print the candidate beside the present holder."""
    pairs = comparison.metrics
    if pairs:
        columns = [
            tables.Column("metric", [literal(pair.name) for pair in pairs], right=False),
            tables.Column("present", [number(pair.champion) for pair in pairs]),
            tables.Column("candidate", [number(pair.candidate) for pair in pairs]),
            tables.Column("difference", list(map(_difference, pairs))),
            tables.Column("", [_VERDICTS[pair.better] for pair in pairs], right=False),
            tables.Column("from", [pair.source for pair in pairs], right=False),
        ]
        console.print(tables.fitted_table(columns, ["from", ""], console.width))
    console.print("\n".join(_paired_lines(comparison)), soft_wrap=True)


def _difference(pair: MetricPair) -> str:
    return f"{rounded(pair.candidate - pair.champion, pair.champion, pair.candidate):+.6g}"


def _paired_lines(comparison: HolderComparison) -> Iterator[str]:
    test = comparison.paired
    if test is None:
        yield f"no per-example comparison: {literal(comparison.unpaired)}"
        if comparison.apart is not None:
            yield "accuracy {:+.4f}, 95% confidence interval {:+.4f} to {:+.4f}".format(*comparison.apart)
        return
    yield (
        f"on the same {test.examples:,} examples: accuracy {test.difference:+.4f}, {test.confidence:.0%} confidence "
        f"interval {test.low:+.4f} to {test.high:+.4f}; McNemar's test p = {test.p_value:.3g}"
    )
    yield f"{test.gained:,} fixes (wrong before, right now), {test.lost:,} regressions (right before, wrong now)"
    if comparison.flips:
        examples = ", ".join(
            f"{index} ({label}: predicted {old}, now {new})" for index, label, old, new in comparison.flips
        )
        more = f" and {test.lost - len(comparison.flips)} more" if test.lost > len(comparison.flips) else ""
        yield f"regressions: {examples}{more}"


def proposal_json(proposal: Proposal) -> dict[str, Any]:
    """Describe a proposal for programs."""
    validation, comparison = proposal.validation, proposal.comparison
    return fields(proposal, "alias", "objections", "refusals", "unchanged") | {
        "candidate": asdict(proposal.target) | {"ref": proposal.target.ref},
        "present": proposal.current and record_json(proposal.current),
        "validation": validation and fields(validation, "number", "passed", "digest"),
        "comparison": comparison and comparison.to_json() | {"flips": comparison.flips},
    }


# --- promote -------------------------------------------------------------------------------------------------------


@command(
    ROOT,
    click.argument("text", metavar="[REF]", required=False, **CHECKPOINTS),
    without={"--why": "--notify", "--yes": "--dry-run"},
)
@click.option("--as", "alias", metavar="ALIAS", **ALIASES, help="champion, challenger_1, resnet50/champion, ...")
@click.option("--why", help="The reason; it stays on record. Required, except with --notify.")
@click.option("--force", is_flag=True, help="Override what blocks the promotion; that is recorded.")
@KEY
@click.option("--retire", metavar="ALIAS", **ALIASES, help="Instead: clear an alias; it then protects no checkpoint.")
@click.option("--notify", metavar="ALIAS", **ALIASES, help="Instead: re-send the last change of an alias to its hooks.")
@click.option("--dry-run", is_flag=True, help="Only show the comparison and what blocks the promotion.")
@click.option("--yes", is_flag=True, help="Do not ask, even on a terminal.")
def promote(
    root: Path,
    text: str | None,
    alias: str | None,
    why: str | None,
    key: Path | None,
    retire: str | None,
    notify: str | None,
    *,
    force: bool,
    dry_run: bool,
    yes: bool,
) -> Answer:
    """Point an alias at a checkpoint, after comparing it with what the alias points at now."""
    if sum((bool(text or alias), bool(retire), bool(notify))) != 1:
        raise ConfigError("give REF and --as ALIAS, or --retire ALIAS, or --notify ALIAS")
    if (retire or notify) and (force or dry_run or key):
        raise ConfigError("--force, --dry-run and --key are for promoting REF; leave them out")
    repository = open_repository(root)
    if notify:
        return _renotify(root, repository, notify.removeprefix("@"))
    if not (retire or (text and alias)):
        raise ConfigError("give REF and --as ALIAS")
    if why is None:
        raise ConfigError("give the reason, which stays on record, with --why TEXT")
    if retire:
        return _retire(root, repository, retire.removeprefix("@"), why)
    assert text is not None
    assert alias is not None
    promotion.check_why("promote", why)
    proposal = propose(repository, text, alias.removeprefix("@"), to_be_signed=key is not None)
    promotion.check_key(proposal.policy, key)
    if dry_run:
        return _dry_run(proposal, force=force)
    asking = not (yes or click.get_current_context().params["as_json"]) and sys.stdin.isatty()
    return _promote(root, repository, proposal, why, key, force=force, asking=asking)


def _blocked(proposal: Proposal, *, force: bool) -> bool:
    return bool(proposal.refusals) or (bool(proposal.objections) and not force)


def _dry_run(proposal: Proposal, *, force: bool) -> Answer:
    def text(console: Console) -> None:
        print_proposal(console, proposal, force=force)
        say(_outlook(proposal, force=force))

    exit_code = RefusedError.exit_code if _blocked(proposal, force=force) else 0
    return Answer(proposal_json(proposal), text, exit_code=exit_code)


def _outlook(proposal: Proposal, *, force: bool) -> str:
    if proposal.unchanged:
        return f"no change: it is {proposal.alias} already"
    if proposal.refusals:
        return "would be refused, also with --force"
    if proposal.objections:
        return "would be promoted by force (recorded)" if force else "would be refused; --force overrides (recorded)"
    return "would be promoted"


def _promote(
    root: Path, repository: Repository, proposal: Proposal, why: str, key: Path | None, *, force: bool, asking: bool
) -> Answer:
    blocked = _blocked(proposal, force=force)
    if blocked and not proposal.unchanged:
        data, problem = proposal_json(proposal), _refusal(root, proposal)
        return Answer(data, lambda console: print_proposal(console, proposal), [problem], RefusedError.exit_code)
    asking = asking and not proposal.unchanged
    if asking:
        print_proposal(console(), proposal, force=force)
        if not click.confirm(f"promote to {proposal.alias}?"):
            return Answer(None, "nothing was done", exit_code=1)
    signed = "" if key is None or blocked else _sign(repository, proposal, key)
    record = promotion.promote(proposal, why, force=force)

    def text(console: Console) -> None:
        if not asking:
            print_proposal(console, proposal, force=force)
        say(signed + _outcome(proposal, record))

    return _notified(root, repository, record, proposal.policy, text, proposal_json(proposal))


def _outcome(proposal: Proposal, record: AliasRecord) -> str:
    name = holder_name(record)
    if proposal.unchanged:
        return f"No change: {record.alias} is {name} since {record.at:%Y-%m-%d %H:%M} UTC (record {record.number})"
    return f"Promoted: {record.alias} is now {name} (record {record.number}{', by force' if record.forced else ''})"


def _refusal(root: Path, proposal: Proposal) -> str:
    """What to do about a refusal whose reasons have been printed."""
    name = f"{ref(proposal.manifest)} was not promoted to {proposal.alias}"
    if proposal.refusals:
        return f"{name}; --force does not override this"
    hint = "" if proposal.validation else f"validate it: {command_line('validate', root, ref(proposal.manifest))}, or "
    return f"{name}; {hint}use --force to override (recorded)"


def _sign(repository: Repository, proposal: Proposal, key: Path) -> str:
    """Sign a candidate, and make sure that the policy accepts that key; return a line that says so."""
    signature = sign_checkpoint(repository, proposal.manifest, key)
    objection = unsigned(repository, proposal.manifest, proposal.policy)
    if objection is not None:
        raise RefusedError(f"signed ({signature.record}), but not as the policy demands: {objection}", (objection,))
    return f"signed: {signature.record}, key {signature.fingerprint}\n"


# --- retire, notify ------------------------------------------------------------------------------------------------


def _retire(root: Path, repository: Repository, alias: str, why: str) -> Answer:
    record = promotion.retire(repository, alias, why)
    policy = read_policies(repository.store).of(alias)
    line = f"Cleared: {alias} (record {record.number}); its history stays"
    return _notified(root, repository, record, policy, lambda _: say(line))


def _renotify(root: Path, repository: Repository, alias: str) -> Answer:
    record = aliases.newest(repository.store, alias)
    if not isinstance(record, AliasRecord):
        record = aliases.holder(repository.store, alias)  # which says what is wrong
    policy = read_policies(repository.store).of(alias)
    without_hooks = "no hooks to notify: all were notified, or none is set"
    return _notified(root, repository, record, policy, lambda _: None, without_hooks=without_hooks)


def _notified(
    root: Path,
    repository: Repository,
    record: AliasRecord,
    policy: Policy | None,
    text: Callable[[Console], None],
    data: Mapping[str, Any] = MappingProxyType({}),
    *,
    without_hooks: str = "",
) -> Answer:
    """Notify the hooks of a change of an alias; the exit code is 1 when one failed, although the alias has changed."""
    results: list[HookResult] = []
    if hooks.are_due(repository.store, record, policy):
        with status_line("") as progress:
            results = hooks.tell(repository.store, record, policy, progress=progress)

    def text_with_hooks(console: Console) -> None:
        text(console)
        if line := hook_text(results) if results else without_hooks:
            say(line)

    problems = hook_problems(root, record.alias, results)
    data = {**data, "record": record_json(record), "told": results}
    return Answer(data, text_with_hooks, problems, 1 if problems else 0)


def hook_text(results: Sequence[HookResult]) -> str:
    """Say how many hooks were notified; "" for none."""
    successes = sum(result.error is None for result in results)
    return f"notified {count(successes, 'hook')}" if successes else ""


def hook_problems(root: Path, alias: str, results: Sequence[HookResult]) -> list[str]:
    """Return a line for each hook that failed, and one that says what to do."""
    failures = [result for result in results if result.error is not None]
    if not failures:
        return []
    again = command_line("promote", root, "--notify", alias)
    return [
        *(f"hook {result.hook} was not notified: {result.error}" for result in failures),
        f"{alias} has changed nevertheless; to notify its hooks again: {again}",
    ]


# --- rollback ------------------------------------------------------------------------------------------------------


@command(ROOT, click.argument("alias", **ALIASES))
@click.option("--to", type=POSITIVE, metavar="N", help="The record to go back to; by default the one before.")
@click.option("--from", "expected", type=POSITIVE, metavar="N", help="Only if this is the newest record.")
@click.option("--why", default="rolled back by hand", help="The reason; it stays on record.")
def rollback(root: Path, alias: str, to: int | None, expected: int | None, why: str) -> Answer:
    """Point an alias back at what it pointed at before.

    Each time it goes further back; with --from N it goes back only if record N is still the newest.
    """
    repository = open_repository(root)
    alias = alias.removeprefix("@")
    policy = _policy_if_readable(repository, alias)
    rolled_back = promotion.rollback(repository, alias, why, to=to, seen=expected, policy=policy)
    record, before = rolled_back.record, rolled_back.before
    was = holder_name(before) if isinstance(before, AliasRecord) else f"unknown: record {before.number} is damaged"
    lines = [f"skipped {reason}" for reason in rolled_back.passed_over]
    lines.append(f"Rolled back: {alias} is {holder_name(record)} again (was {was}), record {record.number}")
    data = {"before": before, "passed_over": rolled_back.passed_over}
    return _notified(root, repository, record, policy, lambda _: say("\n".join(lines)), data)


def _policy_if_readable(repository: Repository, alias: str) -> Policy | None:
    """Return the policy, or one that demands nothing: going back must also work with a broken policy."""
    try:
        return read_policies(repository.store).of(alias)
    except ConfigError as error:
        complain(f"no policy applies: {error}")
        return Policy(alias=alias)
