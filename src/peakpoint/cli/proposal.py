"""How a proposal looks: a candidate beside the holder of an alias, and what blocks its promotion."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console

from peakpoint.cli import tables
from peakpoint.cli.history import holder_name, record_json
from peakpoint.cli.render import facts, number, printable, ref, rounded
from peakpoint.cli.tables import Column
from peakpoint.cli.validate import validation_line
from peakpoint.production.comparison import HolderComparison, MetricPair
from peakpoint.production.policy import read_policies
from peakpoint.production.proposal import Proposal

_VERDICTS = {True: "[green]better[/]", False: "[red]worse[/]", None: ""}


def print_proposal(console: Console, proposal: Proposal, *, force: bool = False) -> None:
    """Print the holder, the candidate, their comparison, and what blocks the promotion."""
    rows = [(proposal.alias, printable(_holder(proposal))), ("candidate", printable(ref(proposal.manifest)))]
    if not proposal.unchanged:
        validation = "none" if proposal.validation is None else validation_line(proposal.validation)
        policy = "none" if proposal.policy is None else "production.toml"
        rows += [("validation", validation), ("policy", policy)]
    console.print(facts(rows))
    tables_of_others = [name for name in read_policies(proposal.run.store).content if name != proposal.alias]
    if proposal.policy is None and tables_of_others:
        note = f"no policy: production.toml has no table [{proposal.alias}]; tables: {', '.join(tables_of_others)}"
        console.print(f"[yellow]note[/]: {printable(note)}", soft_wrap=True)
    if proposal.comparison is not None:
        console.print()
        print_comparison(console, proposal.comparison)
    for reason in proposal.refusals:
        console.print(f"[red]blocked, cannot be forced[/]: {printable(reason)}", soft_wrap=True)
    for reason in proposal.objections:
        label = "[yellow]overridden[/]" if force else "[red]blocked[/]"
        console.print(f"{label}: {printable(reason)}", soft_wrap=True)


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
            Column("metric", [printable(pair.name) for pair in pairs], right=False),
            Column("present", [number(pair.champion) for pair in pairs]),
            Column("candidate", [number(pair.candidate) for pair in pairs]),
            Column("difference", list(map(_difference, pairs))),
            Column("", [_VERDICTS[pair.better] for pair in pairs], right=False),
            Column("from", [pair.source for pair in pairs], right=False),
        ]
        console.print(tables.table(tables.fitted(columns, ["from", ""], console.width), console.width))
    console.print("\n".join(_paired_lines(comparison)), soft_wrap=True)


def _difference(pair: MetricPair) -> str:
    return f"{rounded(pair.candidate - pair.champion, pair.champion, pair.candidate):+.6g}"


def _paired_lines(comparison: HolderComparison) -> Iterator[str]:
    test = comparison.paired
    if test is None:
        yield f"no per-example comparison: {printable(comparison.unpaired)}"
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
    comparison, validation = proposal.comparison, proposal.validation
    return {
        "alias": proposal.alias,
        "candidate": asdict(proposal.target) | {"ref": proposal.target.ref},
        "present": None if proposal.current is None else record_json(proposal.current),
        "validation": None
        if validation is None
        else {"number": validation.number, "passed": validation.passed, "digest": validation.digest},
        "comparison": None if comparison is None else comparison.to_json() | {"flips": comparison.flips},
        "objections": proposal.objections,
        "refusals": proposal.refusals,
        "unchanged": proposal.unchanged,
    }
