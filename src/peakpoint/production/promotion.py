"""Promote checkpoints to aliases, roll back and retire: a proposal with its objections first, then one record.

The record is a compare-and-swap on the one that the proposal has seen. Before it is made, the run's journal says,
durably, that it is about to be, and a removal that was announced meanwhile is looked for: so a checkpoint that an alias
points at is never one that retention is removing at the same moment. A crash leaves the alias as it was or as it is to
be, and at most a checkpoint that stays protected until the alias changes again.
"""

import contextlib
import secrets
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peakpoint.errors import (
    ConfigError,
    ConflictError,
    CorruptError,
    FormatError,
    NotFoundError,
    PeakpointWarning,
    RefusedError,
)
from peakpoint.format.events import Closed, Promoted, Promoting
from peakpoint.format.manifest import Manifest
from peakpoint.format.names import check_text
from peakpoint.production.policy import Policy
from peakpoint.production.proposal import CLOCK_SLACK, Proposal, allowed_policy
from peakpoint.production.proposal import propose as propose  # noqa: PLC0414 - users find it beside promote
from peakpoint.repository import aliases, reader, signing
from peakpoint.repository.aliases import AliasChange, AliasRecord, DamagedRecord
from peakpoint.repository.annotations import annotations_of
from peakpoint.repository.journal import Journal
from peakpoint.repository.provenance import Clock, present_user, utc_now
from peakpoint.repository.refs import check_alias
from peakpoint.repository.root import Repository
from peakpoint.repository.run import Run
from peakpoint.store import Store

CHAMPION = "champion"  # an alias of this name is never without a checkpoint


def promote(
    proposal: Proposal,
    why: str,
    *,
    force: bool = False,
    by: str = "",
    release: str | None = None,
    decision: Mapping[str, Any] | None = None,
    clock: Clock = utc_now,
) -> AliasRecord:
    """Let an alias point at the candidate of a proposal, if it has not changed since; return its record.

    Idempotent: when the alias points there already, nothing is recorded, and what a crash has left open is completed.

    Args:
        why: the reason, which stays on record.
        force: override the objections; each is recorded.
        by: who promotes; the current user by default.
        release: the id of the release that this belongs to.
        decision: of that release; see ``AliasRecord``.

    Raises:
        RefusedError: the proposal has objections or refusals.
        ConflictError: the alias was changed since, or the checkpoint is being removed; nothing was done.
        ConfigError: no reason is given.
    """
    check_why("promote", why)
    actor = by or present_user()
    if proposal.unchanged:
        assert proposal.current is not None
        complete(proposal.run, proposal.manifest, proposal.current, actor)
        return proposal.current
    if proposal.refusals or (proposal.objections and not force):
        raise refusal(proposal)
    change = AliasChange(
        kind="promoted",
        target=proposal.target,
        at=clock(),
        by=actor,
        why=why,
        validation=None if proposal.validation is None else proposal.validation.digest,
        forced=proposal.objections,
        comparison=None if proposal.comparison is None else proposal.comparison.to_json(),
        release=release,
        decision=decision,
        keeps=aliases.KEEPS if proposal.policy is None else proposal.policy.keep_last,
    )
    checkpoint = (proposal.run, proposal.manifest)
    return _record_change(proposal.run.store, proposal.alias, change, proposal.newest, clock, checkpoint)


def check_key(policy: Policy | None, private_key: Path | None) -> None:
    """Refuse a key that the policy does not ask for, before anything is signed with it.

    Raises:
        RefusedError: it is another key.
        ConfigError: a key cannot be used.
    """
    if policy is None or policy.public_key is None or private_key is None:
        return
    fingerprint = signing.private_key_fingerprint(private_key)
    expected = signing.public_key_fingerprint(policy.public_key)
    if fingerprint != expected:
        reason = f"{private_key} is the key {fingerprint}; the policy asks for signatures by {expected}"
        raise RefusedError(reason, (reason,))


def refusal(proposal: Proposal) -> RefusedError:
    """Return the error for a promotion with objections or refusals."""
    reasons = (*proposal.refusals, *proposal.objections)
    name = f"{proposal.manifest.run}/{proposal.manifest.name}"
    return RefusedError(f"{name} was not promoted to {proposal.alias}: {'; '.join(reasons)}", reasons)


def check_why(command: str, why: str) -> str:
    """Return a reason, if it is one.

    Raises:
        ConfigError: it is empty, or cannot be written.
    """
    if not check_text(f"the reason of {command}", why).strip():
        raise ConfigError(f"{command} needs a reason (--why); it stays on record")
    return why


# --- rollback and retire ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RolledBack:
    """A rollback.

    Attributes:
        record: the new one.
        before: the one that counted until then.
        passed_over: former holders that cannot be restored, a sentence each.
    """

    record: AliasRecord
    before: AliasRecord | DamagedRecord
    passed_over: tuple[str, ...]


def rollback(
    repository: Repository,
    alias: str,
    why: str,
    *,
    to: int | None = None,
    seen: int | None = None,
    policy: Policy | None = None,
    by: str = "",
    clock: Clock = utc_now,
) -> RolledBack:
    """Let an alias point at what it pointed at before. Reads a few small files, whatever the size of the models.

    Rolling back again goes further back. Former holders that are gone, damaged, or not signed as the policy asks are
    passed over. When the newest record itself is damaged, the newest readable one is restored.

    Args:
        why: the reason, which stays on record.
        to: the number of the record to restore; the one before by default.
        seen: the number of the newest record that the caller has seen: if there is a newer one, nothing is done.
        policy: who may, and by which key it must be signed; by default as for ``propose``.

    Raises:
        NotFoundError: there is no such alias, or nothing to roll back to.
        ConflictError: the alias was changed at the same moment; nothing was done.
        RefusedError: the policy does not allow it to this user.
        ConfigError: no reason is given.
    """
    check_why("rollback", why)
    actor, policy = allowed_policy(repository.store, alias, policy, by)
    newest = aliases.newest(repository.store, check_alias(alias))
    current = newest if isinstance(newest, DamagedRecord) else aliases.holder(repository.store, alias)
    if seen is not None and current.number != seen:
        raise ConflictError(f"{alias} is at record {current.number}, not at {seen}: it was changed meanwhile")
    passed_over: list[str] = []
    for former in _former_records(repository.store, current, to, passed_over):
        try:
            checkpoint = _restorable(repository, former, policy)
        except (NotFoundError, CorruptError, FormatError) as error:
            passed_over.append(f"record {former.number}: {error}")
            continue
        change = AliasChange(
            kind="rolled back",
            target=former.target,
            at=clock(),
            by=actor,
            why=why,
            restores=former.stands_for,
            validation=former.validation,
            keeps=former.keeps if isinstance(current, DamagedRecord) else current.keeps,
        )
        try:
            record = _record_change(repository.store, alias, change, current, clock, checkpoint)
        except BeingRemovedError as error:
            passed_over.append(f"record {former.number}: {error}")
        else:
            return RolledBack(record, current, tuple(passed_over))
    reasons = "".join(f"\n  {reason}" for reason in passed_over)
    raise NotFoundError(
        f"no earlier {alias} left to roll back to; pick a record of peakpoint history with --to N"
        f"{':' if passed_over else ''}{reasons}"
    )


def _former_records(
    store: Store, current: AliasRecord | DamagedRecord, to: int | None, passed_over: list[str]
) -> Iterator[AliasRecord]:
    """The records that can be restored, the best first; what was before a damaged one is not known."""
    holder = current.target if isinstance(current, AliasRecord) else None
    if to is not None:
        record = aliases.read(store, current.alias, to)
        if record.target is None:
            raise NotFoundError(f"record {to} of {current.alias} retired it: it points at nothing")
        if record.target == holder:
            raise ConfigError(f"{current.alias} points already where record {to} points; there is nothing to roll back")
        yield record
    elif isinstance(current, AliasRecord):
        try:
            yield from (record for record in aliases.back_from(store, current) if record.target != holder)
        except CorruptError as error:
            passed_over.append(str(error))
    else:
        for number in range(current.number - 1, 0, -1):
            with contextlib.suppress(CorruptError, NotFoundError):
                record = aliases.read(store, current.alias, number)
                if record.target is not None:
                    yield record


def _restorable(repository: Repository, former: AliasRecord, policy: Policy | None) -> tuple[Run, Manifest]:
    """Return a former holder that is there, whole and signed as the policy asks."""
    run, manifest = repository.locate(f"@{former.alias}:{former.number}")
    reader.check_sizes(repository.store, manifest)
    if policy is not None and policy.public_key is not None:  # else it could not be loaded
        signing.verify(repository.store, manifest, public_key=policy.public_key, files=False)
    return run, manifest


def retire(
    repository: Repository,
    alias: str,
    why: str,
    *,
    policy: Policy | None = None,
    by: str = "",
    clock: Clock = utc_now,
) -> AliasRecord:
    """Clear an alias, so that it protects nothing any more. Its history stays.

    Raises:
        ConfigError: a champion, which is never without a checkpoint; or no reason is given.
        NotFoundError: there is no such alias, or it is retired already.
        ConflictError: the alias was changed at the same moment; nothing was done.
        RefusedError: the policy does not allow it to this user.
    """
    check_why("retire", why)
    if alias.rpartition("/")[2] == CHAMPION:
        raise ConfigError(f"{alias} is never without a checkpoint: promote another one to it instead")
    actor, _ = allowed_policy(repository.store, alias, policy, by)
    current = aliases.holder(repository.store, check_alias(alias))
    change = AliasChange(kind="retired", target=None, at=clock(), by=actor, why=why, keeps=0)
    return _record_change(repository.store, alias, change, current, clock)


# --- the record ---------------------------------------------------------------------------------------------------


def _record_change(
    store: Store,
    alias: str,
    change: AliasChange,
    newest: AliasRecord | DamagedRecord | None,
    clock: Clock,
    checkpoint: tuple[Run, Manifest] | None = None,
) -> AliasRecord:
    """Add the record of a change to an alias: promote, rollback and retire all end here.

    Until the record is there, the journal of the run protects the checkpoint that it will point at.

    Args:
        newest: the newest record, which the new one follows.
        checkpoint: the target as the caller has looked at it; None when there is no target.

    Raises:
        BeingRemovedError: somebody is removing the checkpoint; nothing was done.
    """
    if checkpoint is None:
        return aliases.append(store, alias, change, after=newest)
    run, manifest = checkpoint
    _warn_of_future(alias, newest, clock)
    facts = _facts(manifest, alias, change.by) | {"token": secrets.token_hex(8)}
    record = None
    with contextlib.closing(Journal(run.store, run.name, clock)) as journal:
        journal.append(Promoting(at=clock(), record=1 if newest is None else newest.number + 1, **facts))
        journal.sync()
        try:
            _check_stays(run, manifest)
            record = aliases.append(store, alias, change, after=newest)
        finally:
            _append_promoted(journal, record, facts)
            journal.append(Closed(at=clock(), why=f"peakpoint {alias}"))
    return record


def _facts(manifest: Manifest, alias: str, by: str) -> dict[str, Any]:
    return {"checkpoint": manifest.id, "name": manifest.name, "alias": alias, "by": by}


def _append_promoted(journal: Journal, record: AliasRecord | None, facts: Mapping[str, Any]) -> None:
    number, digest = (None, None) if record is None else (record.number, record.digest)
    journal.append(Promoted(at=journal.now(), record=number, digest=digest, **facts))


def complete(run: Run, manifest: Manifest, record: AliasRecord, by: str) -> None:
    """Write the ``Promoted`` events of promotions that were killed after their record was made."""
    promoting = annotations_of(run.events()).promoting.values()
    promotions = [event for event in promoting if (event.checkpoint, event.alias) == (manifest.id, record.alias)]
    overdue = [event for event in promotions if event.record <= record.number]
    if not overdue:
        return
    facts = _facts(manifest, record.alias, by)
    with contextlib.closing(Journal(run.store, run.name, utc_now)) as journal:
        for event in overdue:
            _append_promoted(journal, record if event.record == record.number else None, facts | {"token": event.token})
        journal.append(Closed(at=journal.now(), why=f"peakpoint {record.alias}"))


def _warn_of_future(alias: str, newest: AliasRecord | DamagedRecord | None, clock: Clock) -> None:
    if isinstance(newest, AliasRecord) and newest.at - clock() > CLOCK_SLACK:
        warnings.warn(
            f"record {newest.number} of {alias} has the time {newest.at:%Y-%m-%d %H:%M} UTC, which is in the future: a "
            "clock was wrong, and nobody can tell what served until then",
            PeakpointWarning,
            stacklevel=4,
        )


class BeingRemovedError(ConflictError):
    """A checkpoint is being removed at this moment."""


def _check_stays(run: Run, manifest: Manifest) -> None:
    """Refuse a checkpoint that somebody is removing, or parts of it.

    Whoever removes has said so first, and looks at what is protected after that: one of the two sees the other.

    Raises:
        BeingRemovedError: it is being removed, or gone, or has lost parts since it was looked at.
    """
    name = f"{run.name}/{manifest.name}"
    current = _read_again(run, manifest)
    removing = current is None or run.is_being_removed(current)
    current = _read_again(run, manifest)  # once more: a removal may have been over before it was looked for
    if removing or current is None:
        raise BeingRemovedError(
            f"{name} or a part of it is being removed; nothing was done. To see what can be restored: "
            "peakpoint undo ROOT --list"
        )
    if current.parts != manifest.parts:
        raise BeingRemovedError(f"{name} has lost parts meanwhile; nothing was done, look at it again")


def _read_again(run: Run, manifest: Manifest) -> Manifest | None:
    """The manifest of a checkpoint as it is now; None when the checkpoint is gone."""
    try:
        current = reader.read_manifest(run.store, run.name, manifest.name)
    except NotFoundError:
        return None
    return current if current.id == manifest.id else None
