"""Commands that change what serves: promote, rollback, retire; and that tell of it: aliases, history."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from peakpoint.cli import render, tables
from peakpoint.cli.arguments import JSON, REF, ROOT
from peakpoint.cli.render import words
from peakpoint.cli.space import progress
from peakpoint.cli.tables import Column
from peakpoint.errors import ConfigError, CorruptError, FormatError, NotFoundError, RefusedError
from peakpoint.format.amounts import read_time
from peakpoint.production import hooks, promotion
from peakpoint.production.comparison import HolderComparison, MetricPair
from peakpoint.production.hooks import HookResult
from peakpoint.production.policy import Policy, read_policies
from peakpoint.production.proposal import Proposal, propose, unsigned
from peakpoint.repository import aliases as records
from peakpoint.repository import signing
from peakpoint.repository.aliases import AliasRecord
from peakpoint.repository.provenance import utc_now
from peakpoint.repository.root import Repository, open_repository
from peakpoint.repository.validations import Validation

ALIAS = click.argument("alias")
WHY = click.option("--why", required=True, help="The reason; it stays on record.")
KEY = click.option(
    "--key", type=click.Path(path_type=Path), metavar="FILE", help="Sign it with this private key (PEM) first."
)
YES = click.option("--yes", is_flag=True, help="Do not ask, also on a terminal.")
_MARKS = {True: "[green]better[/]", False: "[red]worse[/]", None: ""}


@contextmanager
def working(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Says on a terminal what is being done."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    with render.console(stderr=True).status("") as status:
        yield lambda what: status.update(words(what))


def _policy(repository: Repository, alias: str) -> Policy | None:
    return read_policies(repository.store).of(alias)


def _policy_if_any(repository: Repository, alias: str) -> Policy | None:
    """The policy, for what must also work with a broken one: then one that asks nothing."""
    try:
        return _policy(repository, alias)
    except ConfigError as error:
        click.echo(f"peakpoint: going on without a policy: {error}", err=True)
        return Policy(alias=alias)


# --- promote ------------------------------------------------------------------------------------------------------


@click.command()
@ROOT
@REF
@click.option("--as", "alias", required=True, metavar="ALIAS", help="champion, challenger_1, resnet50/champion, ...")
@WHY
@click.option("--force", is_flag=True, help="In spite of what speaks against it; that stays on record.")
@KEY
@click.option("--dry-run", is_flag=True, help="Only show the comparison and what speaks against it.")
@YES
@JSON
def promote(
    root: Path,
    ref: str,
    alias: str,
    why: str,
    key: Path | None,
    force: bool,  # noqa: FBT001
    dry_run: bool,  # noqa: FBT001
    yes: bool,  # noqa: FBT001
    json: bool,  # noqa: FBT001
) -> None:
    """Let an alias point at a checkpoint, after comparing it with what it points at now."""
    promotion.check_why("promote", why)
    repository = open_repository(root)
    alias = alias.removeprefix("@")
    proposal = propose(repository, ref, alias, to_be_signed=key is not None)
    promotion.check_key(proposal.policy, key)
    if not json:
        _print_proposal(render.console(), proposal)
    if dry_run:
        if json:
            render.as_json(proposal_json(proposal))
        else:
            click.echo(_would(proposal, force=force))
        if proposal.refusals or (proposal.objections and not force):
            sys.exit(RefusedError.exit_code)
        return
    fit = force or not proposal.objections
    asks = not (yes or json or proposal.unchanged) and fit and not proposal.refusals and sys.stdin.isatty()
    if asks and not click.confirm(f"promote to {alias}?"):
        click.echo("nothing was done")
        sys.exit(1)
    if key is not None and fit and not proposal.refusals:
        _sign(repository, proposal, key, quiet=json)
    if not json and not proposal.unchanged and (proposal.refusals or not fit):
        click.echo(f"peakpoint: {_refused(root, ref, proposal)}", err=True)
        sys.exit(RefusedError.exit_code)
    record = promotion.promote(proposal, why, force=force)
    told = _tell(repository, record, proposal.policy, quiet=json)
    if json:
        render.as_json(proposal_json(proposal) | {"record": record_json(record), "told": [asdict(one) for one in told]})
    else:
        when = "already since" if proposal.unchanged else "now:"
        what = (
            f"{record.at:%Y-%m-%d %H:%M} UTC, record {record.number}"
            if proposal.unchanged
            else f"record {record.number}"
        )
        forced = ", by force" if record.forced and not proposal.unchanged else ""
        click.echo(f"{_name(record)} is {alias} {when} {what}{forced}")
    report_hooks(root, alias, told)


def _sign(repository: Repository, proposal: Proposal, key: Path, *, quiet: bool) -> None:
    """Sign a candidate, and make sure that the policy is content with that key."""
    with progress("signing", proposal.manifest.size_bytes) as advance:
        made = signing.sign(repository.store, proposal.manifest, private_key=key, progress=advance)
    said = unsigned(repository, proposal.manifest, proposal.policy)
    if said is not None:
        raise RefusedError(f"it is signed now ({made.record}), but not as it has to be: {said}", (said,))
    if not quiet:
        click.echo(f"signed: {made.record}, key {made.fingerprint}")


def _refused(root: Path, ref: str, proposal: Proposal) -> str:
    """What to do about a refusal whose reasons have been printed."""
    name = f"{proposal.manifest.run}/{proposal.manifest.name} does not become {proposal.alias}"
    if proposal.refusals:
        return f"{name}, also not with --force"
    first = "" if proposal.validation else f"{render.command('validate', root, ref)} validates it; "
    return f"{name}; {first}with --force it is done all the same, and that stays on record"


def _would(proposal: Proposal, *, force: bool) -> str:
    if proposal.unchanged:
        return f"nothing would change: it is {proposal.alias} already"
    if proposal.refusals:
        return "it would be refused, also with --force"
    if proposal.objections:
        return "it would be promoted all the same, and that put on record" if force else "it would be refused"
    return "it would be promoted"


def _print_proposal(console: Console, proposal: Proposal) -> None:
    present, one = proposal.current, proposal.validation
    held = "nothing" if present is None or present.target is None else f"{_name(present)}, {_since(present)}"
    held = held if proposal.newest is None or present is not None else "not known"
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(proposal.alias, words(held))
    table.add_row("candidate", words(f"{proposal.manifest.run}/{proposal.manifest.name}"))
    if not proposal.unchanged:
        table.add_row("validation", "none" if one is None else validation_text(one))
        table.add_row("policy", "none" if proposal.policy is None else "production.toml")
    console.print(table)
    others = [name for name in read_policies(proposal.run.store).content if name != proposal.alias]
    if proposal.policy is None and others:
        told = f"production.toml has no table [{proposal.alias}], and asks nothing of it; tables: {', '.join(others)}"
        console.print(f"[yellow]note[/]: {words(told)}", soft_wrap=True)
    if proposal.comparison is not None:
        console.print()
        print_comparison(console, proposal.comparison)
    for reason in (*proposal.refusals, *proposal.objections):
        console.print(f"[red]against it[/]: {words(reason)}", soft_wrap=True)


def validation_text(one: Validation) -> str:
    """A validation in a line, in markup."""
    failed = ", ".join(found.check for found in one.failures)
    made = sum(found.outcome == "passed" for found in one.findings)
    outcome = (
        f"[red]failed[/]: {words(failed)}" if failed else f"[green]passed[/], {made} of {len(one.findings)} checks"
    )
    return f"number {one.number}, {render.age(one.at)}, by {words(one.by)}: {outcome}"


def print_comparison(console: Console, found: HolderComparison) -> None:
    """The candidate beside the present holder."""
    pairs = found.metrics
    if pairs:
        columns = [
            Column("metric", [words(one.name) for one in pairs], right=False),
            Column("present", [render.number(one.champion) for one in pairs]),
            Column("candidate", [render.number(one.candidate) for one in pairs]),
            Column("difference", [_difference(one) for one in pairs]),
            Column("", [_MARKS[one.better] for one in pairs], right=False),
            Column("from", [one.source for one in pairs], right=False),
        ]
        console.print(tables.table(tables.fitted(columns, ["from", ""], console.width), console.width))
    console.print("\n".join(_paired_lines(found)), soft_wrap=True)


def _difference(one: MetricPair) -> str:
    difference = one.candidate - one.champion
    return f"{render.rounded(difference, one.champion, one.candidate):+.6g}"


def _paired_lines(found: HolderComparison) -> Iterator[str]:
    test = found.paired
    if test is None:
        yield f"not compared example by example: {words(found.unpaired)}"
        if found.apart is not None:
            yield "accuracy {:+.4f}, with 95% confidence from {:+.4f} to {:+.4f}".format(*found.apart)
        return
    yield (
        f"on the same {test.examples:,} examples: accuracy {test.difference:+.4f}, with {test.confidence:.0%} "
        f"confidence from {test.low:+.4f} to {test.high:+.4f}; McNemar's test p = {test.p_value:.3g}"
    )
    yield f"{test.gained:,} were wrong and are right, {test.lost:,} were right and are wrong"
    if found.flips:
        shown = ", ".join(f"{at} ({label}: said {old}, says {new})" for at, label, old, new in found.flips)
        more = f" and {test.lost - len(found.flips)} more" if test.lost > len(found.flips) else ""
        yield f"right before and wrong now: {shown}{more}"


def proposal_json(proposal: Proposal) -> dict[str, Any]:
    """A proposal for programs."""
    comparison, one = proposal.comparison, proposal.validation
    return {
        "alias": proposal.alias,
        "candidate": asdict(proposal.target) | {"ref": proposal.target.ref},
        "present": None if proposal.current is None else record_json(proposal.current),
        "validation": None if one is None else {"number": one.number, "passed": one.passed, "digest": one.digest},
        "comparison": None if comparison is None else comparison.to_json() | {"flips": comparison.flips},
        "objections": proposal.objections,
        "refusals": proposal.refusals,
        "unchanged": proposal.unchanged,
    }


def _tell(repository: Repository, record: AliasRecord, policy: Policy | None, *, quiet: bool) -> list[HookResult]:
    if not hooks.are_due(repository.store, record, policy):
        return []
    with working(quiet=quiet) as said:
        return hooks.tell(repository.store, record, policy, progress=said)


def report_hooks(root: Path, alias: str, told: Sequence[HookResult]) -> None:
    """Say which hooks failed, and end with 1 then: the alias has changed all the same."""
    failed = [one for one in told if one.error is not None]
    if told and not failed:
        click.echo(f"told {render.count(len(told), 'hook')}", err=True)
    for one in failed:
        click.echo(f"peakpoint: the hook {one.hook} was not told: {one.error}", err=True)
    if failed:
        again = render.command("tell", root, alias)
        click.echo(f"peakpoint: {alias} has changed; {again} tells the hooks again", err=True)
        sys.exit(1)


@click.command()
@ROOT
@ALIAS
@JSON
def tell(root: Path, alias: str, json: bool) -> None:  # noqa: FBT001
    """Tell the hooks of an alias of its last change, unless all of them have taken it."""
    repository = open_repository(root)
    alias = alias.removeprefix("@")
    record = records.newest(repository.store, alias)
    if not isinstance(record, AliasRecord):
        record = records.holder(repository.store, alias)  # which says what is wrong
    told = _tell(repository, record, _policy(repository, alias), quiet=json)
    if json:
        render.as_json({"record": record_json(record), "told": [asdict(one) for one in told]})
    elif told:
        taken = sum(one.error is None for one in told)
        click.echo(f"{render.count(taken, 'hook')} of {len(told)} took record {record.number} of {alias}")
    else:
        click.echo(f"there is nothing to tell of record {record.number} of {alias}")
    report_hooks(root, alias, told)


# --- rollback, retire ---------------------------------------------------------------------------------------------


@click.command()
@ROOT
@ALIAS
@click.option(
    "--to", type=click.IntRange(min=1), metavar="N", help="The record to go back to; the one before by default."
)
@click.option("--from", "seen", type=click.IntRange(min=1), metavar="N", help="Only if this is the newest record.")
@click.option("--why", default="rolled back by hand", show_default=True, help="The reason; it stays on record.")
@JSON
def rollback(root: Path, alias: str, to: int | None, seen: int | None, why: str, json: bool) -> None:  # noqa: FBT001
    """Let an alias point at what it pointed at before.

    Each time it goes further back; --from N makes sure that it goes back from what you have seen.
    """
    repository = open_repository(root)
    alias = alias.removeprefix("@")
    policy = _policy_if_any(repository, alias)
    done = promotion.rollback(repository, alias, why, to=to, seen=seen, policy=policy)
    told = _tell(repository, done.record, policy, quiet=json)
    if json:
        render.as_json(
            {
                "record": record_json(done.record),
                "before": asdict(done.before),
                "passed_over": done.passed_over,
                "told": [asdict(one) for one in told],
            }
        )
    else:
        for one in done.passed_over:
            click.echo(f"passed over {one}")
        before = done.before
        was = _name(before) if isinstance(before, AliasRecord) else f"not known, as record {before.number} is damaged"
        click.echo(f"{_name(done.record)} is {alias} again (record {done.record.number}); before: {was}")
    report_hooks(root, alias, told)


@click.command()
@ROOT
@ALIAS
@WHY
@JSON
def retire(root: Path, alias: str, why: str, json: bool) -> None:  # noqa: FBT001
    """Let an alias point at nothing, so that it protects nothing any more; its history stays."""
    repository = open_repository(root)
    alias = alias.removeprefix("@")
    record = promotion.retire(repository, alias, why)
    told = _tell(repository, record, _policy(repository, alias), quiet=json)
    if json:
        render.as_json({"record": record_json(record), "told": [asdict(one) for one in told]})
    else:
        click.echo(f"{alias} points at nothing now (record {record.number})")
    report_hooks(root, alias, told)


# --- aliases, history ---------------------------------------------------------------------------------------------


@click.command()
@ROOT
@JSON
def aliases(root: Path, json: bool) -> None:  # noqa: FBT001
    """List the aliases: what serves, since when, by whom, and why."""
    store = open_repository(root).store
    found: list[AliasRecord] = []
    damage: list[str] = []
    for alias in records.names(store):
        try:
            newest = records.newest(store, alias)
        except FormatError as error:
            damage.append(f"{alias}: {error}")
            continue
        if isinstance(newest, AliasRecord):
            found.append(newest)
        elif newest is not None:
            damage.append(f"{alias}: {newest.error}")
    if json:
        render.as_json({"aliases": [record_json(one) for one in found], "damage": damage})
    elif found:
        console = render.console()
        columns = [
            Column("alias", [words(one.alias) for one in found], right=False),
            Column("since (UTC)", [f"{one.at:%Y-%m-%d %H:%M}" for one in found]),
            Column("records", [str(one.number) for one in found]),
            Column("by", [words(one.by) for one in found], right=False),
        ]
        said = [f"{words(_name(one))}: {words(one.why)}" for one in found]
        console.print(tables.with_reasons(console, columns, ["by"], "checkpoint, and why", said))
    elif not damage:
        click.echo("there are no aliases yet; peakpoint promote ROOT REF --as champion --why '...' makes one")
    _damaged(damage)


def _damaged(damage: Sequence[str]) -> None:
    for one in damage:
        click.echo(f"peakpoint: {one}", err=True)
    if damage:
        sys.exit(CorruptError.exit_code)


@click.command()
@ROOT
@ALIAS
@click.option("--at", metavar="TIME", help="Only what it pointed at then: 2026-11-25T18:30, or 7d for so long ago.")
@JSON
def history(root: Path, alias: str, at: str | None, json: bool) -> None:  # noqa: FBT001
    """Show every change of an alias, and whether the chain of its records is whole."""
    store = open_repository(root).store
    alias = alias.removeprefix("@")
    found = records.history(store, alias)
    shown = found.records
    if at is not None:
        moment = read_time("--at", at, utc_now())
        then = records.alias_at(found.records, moment)
        if then is None:
            raise NotFoundError(f"{alias} pointed at nothing yet at {moment:%Y-%m-%d %H:%M:%S} UTC")
        shown = (then,)
    if json:
        render.as_json({"alias": alias, "records": [record_json(one) for one in shown], "damage": found.damage})
    else:
        _print_history(shown)
        if not found.damage and at is None:
            chain = f"{render.count(len(shown), 'record')}, none changed or missing"
            click.echo(f"{chain}; the digest of the newest is {shown[-1].digest[:16]}")
    _damaged(found.damage)


def _print_history(shown: Sequence[AliasRecord]) -> None:
    console = render.console()
    columns = [
        Column("record", [str(one.number) for one in shown]),
        Column("when (UTC)", [f"{one.at:%Y-%m-%d %H:%M:%S}" for one in shown]),
        Column("what", [_what(one) for one in shown], right=False),
        Column("by", [words(one.by) for one in shown], right=False),
    ]
    said = []
    for one in shown:
        forced = "".join(f"; FORCED although {reason}" for reason in one.forced)
        said.append(f"{words(_name(one))}: {words(one.why + forced)}")
    console.print(tables.with_reasons(console, columns, ["by"], "checkpoint, and why", said))


def _what(one: AliasRecord) -> str:
    colour = {"promoted": "green", "rolled back": "yellow", "retired": "dim"}[one.kind]
    return f"[{colour}]{one.kind}[/]" + (" [red]by force[/]" if one.forced else "")


def _name(record: AliasRecord) -> str:
    return "nothing" if record.target is None else f"{record.target.run}/{record.target.name}"


def _since(record: AliasRecord) -> str:
    return f"since {record.at:%Y-%m-%d %H:%M} UTC by {record.by}: {record.why}"


def record_json(record: AliasRecord) -> dict[str, Any]:
    """A record of an alias for programs."""
    found = asdict(record)
    found["ref"] = None if record.target is None else record.target.ref
    return found


COMMANDS = (aliases, history, promote, retire, rollback, tell)
