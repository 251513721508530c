"""The commands ``validate``, ``sign`` and ``history``: what is on record of checkpoints and aliases."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from peakpoint.cli import tables
from peakpoint.cli.command import PATH, REF, ROOT, Answer, command, progress_bar, reads, status_line
from peakpoint.cli.completion import ALIASES
from peakpoint.cli.render import count, fields, literal, ref
from peakpoint.cli.terminal import complain, say
from peakpoint.errors import ConfigError, CorruptError, NotFoundError, RefusedError
from peakpoint.format.amounts import read_duration, read_time
from peakpoint.format.manifest import Manifest
from peakpoint.format.names import did_you_mean, listing
from peakpoint.production import validation
from peakpoint.production.policy import read_policies
from peakpoint.repository import alias_holders, aliases, signing
from peakpoint.repository.aliases import AliasRecord
from peakpoint.repository.provenance import utc_now
from peakpoint.repository.root import Repository, open_repository
from peakpoint.repository.validations import Finding, Progress, Validation, ValidationSpec
from peakpoint.store import Store

# --- validate ------------------------------------------------------------------------------------------------------


_OUTPUT_LINES = 12  # of what was printed, shown with a failure


def _pairs(option: str, texts: Sequence[str], read: Callable[[str], Any], example: str) -> dict[str, Any]:
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            values[name] = read(value.strip()) if name and equals else None
        except ValueError:
            values[name] = None
        if values[name] is None:
            raise ConfigError(f"{option} {text!r} cannot be read; write NAME=VALUE, such as {option} {example}")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


@command(ROOT, REF, needs={"--tolerance": "--with", "--metric": "--with", "--agreement": "--golden"})
@click.option("--with", "evaluate", metavar="MODULE:FUNCTION", help="Evaluates: gets the state, returns metrics.")
@click.option("--model", metavar="MODULE:FUNCTION", help="Makes the model, without arguments.")
@click.option("--part", default="model", help="The part that is the model.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Must be confirmed; repeatable.")
@click.option("--tolerance", type=float, default=1e-3, help="How far a metric may be off.")
@click.option("--sparsity", default="sparsity", help="The metric that is counted in the weights.")
@click.option("--golden", metavar="FILE", help="Safetensors with inputs, and maybe labels.")
@click.option("--agreement", type=float, default=0.0, help="Share of golden predictions that must be the champion's.")
@click.option("--signature", multiple=True, metavar="NAME=F32[*,10]", help="An output of the model; repeatable.")
@click.option(
    "--budget", "budgets", multiple=True, metavar="NAME=LIMIT", help="latency_ms, memory_mb, size_mb, parameters."
)
@click.option("--check", "checks", multiple=True, metavar="MODULE:FUNCTION", help="A check of your own; repeatable.")
@click.option("--against", default="champion", metavar="ALIAS", help="Compare with its holder.")
@click.option("--timeout", callback=reads(read_duration), help="Such as 10min; none by default.")
def validate(root: Path, ref: str, against: str, timeout: timedelta | None, **checks: Any) -> Answer:
    """Check a checkpoint before it is deployed, and record the result.

    Without options that say what to check, production.toml does, where it has a table for the alias. Exits with 16
    when the checkpoint did not pass.
    """
    checks["budgets"] = _pairs("--budget", checks["budgets"], _finite, "latency_ms=20")
    checks["signature"] = _pairs("--signature", checks["signature"], str, "output=F32[*,10]")
    repository = open_repository(root)
    seconds = None if timeout is None else timeout.total_seconds()
    request = ValidationSpec(**checks)
    alias = against.removeprefix("@")
    if _any_given(["against"]):
        _check_alias_exists(repository.store, alias)
    policy = None if _any_given(checks) else read_policies(repository.store).of(alias)
    if policy is not None:
        request, seconds = policy.wanted, seconds or policy.timeout
        complain(f"checking what production.toml demands of {policy.alias}")
    with _check_progress() as progress:
        result = validation.validate(repository, ref, request, alias=against, timeout=seconds, progress=progress)
    problems = []
    if not result.passed:
        names = ", ".join(finding.check for finding in result.failures)
        problems = [f"{result.run}/{result.name} did not pass: {names}"]
    return Answer(
        asdict(result) | {"passed": result.passed},
        lambda console: _print_validation(console, result),
        problems,
        0 if result.passed else RefusedError.exit_code,
    )


def _any_given(names: Iterable[str]) -> bool:
    """Whether the command line has any of these options."""
    context = click.get_current_context()
    return any(context.get_parameter_source(name) is not ParameterSource.DEFAULT for name in names)


def _check_alias_exists(store: Store, alias: str) -> None:
    names = aliases.names(store)
    if alias not in names and read_policies(store).of(alias) is None:  # of one with a policy it may be the first
        hint = did_you_mean(alias, names) or f". Aliases: {listing(names) or 'none yet'}"
        raise ConfigError(f"--against {alias}: there is no such alias{hint}")


@contextmanager
def _check_progress() -> Iterator[Progress]:
    """Say which check is running: on a terminal in place, otherwise a line each."""
    if not sys.stderr.isatty():
        yield lambda name: complain(f"checking {name}")
        return
    with status_line("starting") as progress:
        yield lambda name: progress(f"checking {name}")


# --- how validations look ------------------------------------------------------------------------------------------


def _print_validation(console: Console, result: Validation) -> None:
    """Print a line for each check that ran, one for all that were skipped, and what failing ones had printed."""
    ran = [finding for finding in result.findings if finding.outcome != "skipped"]
    rows = [
        (literal(finding.check), _outcome(finding), literal(finding.said), f"{finding.seconds:.2f}") for finding in ran
    ]
    console.print(tables.PlainTable(("check", "outcome", "result", ">seconds"), rows))
    skipped: dict[str, list[str]] = {}
    for finding in result.findings:
        if finding.outcome == "skipped":
            skipped.setdefault(finding.said, []).append(finding.check)
    if skipped:
        reasons = "; ".join(f"{', '.join(checks)} ({reason})" for reason, checks in skipped.items())
        console.print(f"[dim]skipped: {literal(reasons)}[/]")
    for finding in result.failures:
        for stream in ("output", "traceback"):
            lines = str(finding.evidence.get(stream, "")).strip().splitlines()[-_OUTPUT_LINES:]
            if lines:
                console.print(f"\n[bold]{literal(finding.check)}[/], the end of its {stream}:")
                console.print("\n".join(literal(f"  {line}") for line in lines), soft_wrap=True)
    console.print(f"\nvalidation {result.number} of {literal(f'{result.run}/{result.name}')}: {verdict(result)}")


def _outcome(finding: Finding) -> str:
    return f"[{'green' if finding.outcome == 'passed' else 'bold red'}]{finding.outcome}[/]"


def verdict(result: Validation) -> str:
    """Say whether a validation passed, and how many of its checks ran, in markup."""
    if not result.passed:
        return f"[bold red]failed[/]: {literal(', '.join(finding.check for finding in result.failures))}"
    passed = sum(finding.outcome == "passed" for finding in result.findings)
    skipped = sum(finding.outcome == "skipped" for finding in result.findings)
    return f"[green]passed[/] ({count(passed, 'check')} passed" + (f", {skipped} skipped)" if skipped else ")")


def validation_line(result: Validation) -> str:
    """Return a validation in a line, in markup."""
    return f"{result.number}: {result.at:%Y-%m-%d %H:%M} UTC, {verdict(result)}, by {literal(result.by)}"


# --- sign ----------------------------------------------------------------------------------------------------------


@command(ROOT, REF)
@click.option(
    "--key", type=PATH, required=True, metavar="FILE", help="The private key, PEM; with --verify the public one."
)
@click.option("--verify", is_flag=True, help="Verify that the key's owner signed the checkpoint as it is now.")
def sign(root: Path, ref: str, key: Path, *, verify: bool) -> Answer:
    """Sign a checkpoint: its manifest and every file of it, after comparing each byte with its digest.

    The password of an encrypted key is taken from PEAKPOINT_SIGNING_PASSWORD. With --verify the command exits with 15
    when the checkpoint is not signed with that key, or has changed since.
    """
    repository = open_repository(root)
    manifest = repository.find_manifest(ref)
    return _verify(repository, manifest, key) if verify else _sign(repository, manifest, key)


def _sign(repository: Repository, manifest: Manifest, key: Path) -> Answer:
    signature = sign_checkpoint(repository, manifest, key)
    data = {"ref": ref(manifest), "id": manifest.id} | fields(signature, "record", "fingerprint")
    files = count(len(manifest.files) + 1, "file")
    return Answer(data, f"signed {ref(manifest)}: {signature.record} covers {files}\nkey {signature.fingerprint}")


def sign_checkpoint(repository: Repository, manifest: Manifest, key: Path) -> signing.Signature:
    """Sign a checkpoint with a private key, and show how far that is."""
    with progress_bar("signing", manifest.size_bytes) as advance:
        return signing.sign(repository.store, manifest, private_key=key, progress=advance)


def _verify(repository: Repository, manifest: Manifest, key: Path) -> Answer:
    with progress_bar("verifying", manifest.size_bytes) as advance:
        verified = signing.verify(repository.store, manifest, public_key=key, progress=advance)
    data = {"ref": ref(manifest), "id": manifest.id} | fields(verified, "record", "fingerprint", "files")
    files = count(len(verified.files), "file")
    text = f"{ref(manifest)} is unchanged since it was signed: {verified.record}, {files} compared"
    return Answer(data, f"{text}\nkey {verified.fingerprint}")


# --- history -------------------------------------------------------------------------------------------------------


@command(ROOT, click.argument("alias", metavar="[ALIAS]", required=False, **ALIASES))
@click.option("--at", metavar="TIME", help="Only what it pointed at then: 2026-11-25T18:30, or 7d for 7 days ago.")
def history(root: Path, alias: str | None, at: str | None) -> Answer:
    """List the aliases: what is in production, since when, by whom, and why; of one alias, every change.

    The chain of records of an alias is checked; exits with 12 when one was changed or is missing.
    """
    store = open_repository(root).store
    if alias is not None:
        return _history(store, alias.removeprefix("@"), at)
    if at is not None:
        raise ConfigError("--at is for one alias; name it")
    return _all(store)


def _all(store: Store) -> Answer:
    records, errors = alias_holders.newest_of_all(store)
    newest, damage = list(records.values()), [f"{name}: {why}" for name, why in errors.items()]

    def text(console: Console) -> None:
        columns = [
            tables.Column("alias", [literal(record.alias) for record in newest], right=False),
            tables.Column("since (UTC)", [f"{record.at:%Y-%m-%d %H:%M}" for record in newest]),
            tables.Column("records", [str(record.number) for record in newest]),
        ]
        _print_records(console, columns, newest, [record.why for record in newest])

    none = "" if damage else "no aliases yet; to create one: peakpoint promote ROOT REF --as champion --why '...'"
    data = {"aliases": list(map(record_json, newest)), "damage": damage}
    return Answer(data, text if newest else none, damage, CorruptError.exit_code if damage else 0)


def _history(store: Store, alias: str, at: str | None) -> Answer:
    chain = aliases.history(store, alias)
    records = chain.records
    if at is not None:
        moment = read_time("--at", at, utc_now())
        record = aliases.alias_at(chain.records, moment)
        if record is None:
            raise NotFoundError(f"{alias} pointed at no checkpoint yet at {moment:%Y-%m-%d %H:%M:%S} UTC")
        records = (record,)

    def text(console: Console) -> None:
        columns = [
            tables.Column("record", [str(record.number) for record in records]),
            tables.Column("when (UTC)", [f"{record.at:%Y-%m-%d %H:%M:%S}" for record in records]),
            tables.Column("what", list(map(_kind, records)), right=False),
        ]
        whys = [record.why + "".join(f"; FORCED although {reason}" for reason in record.forced) for record in records]
        _print_records(console, columns, records, whys)
        if not chain.damage and at is None:
            checked = f"{count(len(records), 'record')}, none changed or missing"
            say(f"{checked}; digest of the newest: {records[-1].digest[:16]}")

    data = {"alias": alias, "records": list(map(record_json, records)), "damage": chain.damage}
    return Answer(data, text, chain.damage, CorruptError.exit_code if chain.damage else 0)


def _print_records(
    console: Console, columns: Sequence[tables.Column], records: Sequence[AliasRecord], whys: Sequence[str]
) -> None:
    """Print columns about records, then who made each, what it points at, and why."""
    reasons = [f"{literal(holder_name(record))}: {literal(why)}" for record, why in zip(records, whys, strict=True)]
    by = tables.Column("by", [literal(record.by) for record in records], right=False)
    console.print(tables.with_reasons(console, [*columns, by], ["by"], "checkpoint, and why", reasons))


def _kind(record: AliasRecord) -> str:
    colour = {"promoted": "green", "rolled back": "yellow", "retired": "dim"}[record.kind]
    return f"[{colour}]{record.kind}[/]" + (" [red]by force[/]" if record.forced else "")


def holder_name(record: AliasRecord) -> str:
    """Return RUN/NAME of what an alias points at."""
    return "cleared" if record.target is None else f"{record.target.run}/{record.target.name}"


def record_json(record: AliasRecord) -> dict[str, Any]:
    """Describe a record of an alias for programs."""
    return asdict(record) | {"ref": record.target and record.target.ref}
