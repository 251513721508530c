"""Promoting checkpoints to aliases, and going back: first a proposal with all that speaks against it, then the act.

The act is a compare-and-swap on the record that the proposal has seen. Before the record is made, the run's journal
says that it is about to be, durably, and a removal that was announced meanwhile is looked for: so a checkpoint that an
alias points at is never one that retention is removing at the same moment. A crash leaves the alias as it was or as it
is to be, and at most a checkpoint that stays protected until the alias changes again.
"""

import contextlib
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
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
from peakpoint.production.proposal import Proposal, allowed_policy, propose
from peakpoint.repository import aliases, reader, signing
from peakpoint.repository import journal as journals
from peakpoint.repository.aliases import AliasChange, AliasRecord, DamagedRecord
from peakpoint.repository.annotations import annotations_of
from peakpoint.repository.provenance import Clock, present_user, utc_now
from peakpoint.repository.refs import check_alias
from peakpoint.repository.root import Repository
from peakpoint.repository.run import Run
from peakpoint.store import Store

__all__ = [
    "CHAMPION",
    "Announced",
    "GoingError",
    "Proposal",
    "RolledBack",
    "announced",
    "check_key",
    "check_why",
    "complete",
    "promote",
    "propose",
    "refusal",
    "retire",
    "rollback",
]
CHAMPION = "champion"  # an alias of this name is never without a checkpoint


# --- the acts -----------------------------------------------------------------------------------------------------


def promote(
    proposal: Proposal,
    why: str,
    *,
    force: bool = False,
    by: str = "",
    release: str | None = None,
    clock: Clock = utc_now,
) -> AliasRecord:
    """Let an alias point at the candidate of a proposal, if it still is where the proposal has seen it.

    Idempotent: when the alias points there already, nothing is recorded, and what a crash has left open is completed.

    Args:
        proposal: what was looked at.
        why: the reason, which stays on record.
        force: override the objections; each is recorded.
        by: who promotes; the present user by default.
        release: the id of the release that this belongs to.
        clock: tells the time.

    Returns:
        The record of the alias that points there.

    Raises:
        RefusedError: something speaks against it.
        ConflictError: the alias was changed since, or the checkpoint is being removed; nothing was done.
        ConfigError: no reason is given.

    Example:
        >>> import tempfile, peakpoint as pp
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"x": 1}, keep=[pp.Last(9)]) as ckpt:
        ...     _ = ckpt.report(step=1), ckpt.report(step=2)
        >>> repository = pp.open(root)
        >>> for ref in ("r:1", "r:2"):
        ...     proposal = propose(repository, ref, "champion")
        ...     record = promote(proposal, "an example", force=True)
        >>> record.number, record.forced, repository.find("@champion").step
        (2, ('it was never validated',), 2)
    """
    check_why("promote", why)
    store, actor = proposal.run.store, by or present_user()
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
        keeps=aliases.KEEPS if proposal.policy is None else proposal.policy.keeps,
    )
    with announced(proposal.run, proposal.manifest, proposal.alias, proposal.newest, actor, clock) as made_known:
        made_known.record = made = aliases.append(store, proposal.alias, change, after=proposal.newest)
    return made


def check_key(policy: Policy | None, private_key: Path | None) -> None:
    """Refuse a key that the policy does not ask for, before anything is signed with it.

    Raises:
        RefusedError: it is another key.
        ConfigError: a key cannot be used.
    """
    if policy is None or policy.public_key is None or private_key is None:
        return
    given, asked = signing.private_key_fingerprint(private_key), signing.public_key_fingerprint(policy.public_key)
    if given != asked:
        said = f"{private_key} is the key {given}, and the policy asks for signatures by {asked}"
        raise RefusedError(said, (said,))


def refusal(proposal: Proposal) -> RefusedError:
    """The error for a promotion that something speaks against."""
    reasons = (*proposal.refusals, *proposal.objections)
    name = f"{proposal.manifest.run}/{proposal.manifest.name}"
    return RefusedError(f"{name} does not become {proposal.alias}: {'; '.join(reasons)}", reasons)


def check_why(act: str, why: str) -> str:
    """Return a reason, if it is one.

    Raises:
        ConfigError: it is empty, or cannot be written.
    """
    if not check_text(f"the reason of {act}", why).strip():
        raise ConfigError(f"{act} needs a reason (--why): it is what tells everybody later why this was done")
    return why


@dataclass(frozen=True, slots=True)
class RolledBack:
    """A roll back.

    Attributes:
        record: the new one.
        before: the one that counted until then.
        passed_over: former holders that cannot be gone back to, a sentence each.
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

    Going back again goes further back. Former holders that are gone, damaged, or not signed as the policy asks are
    passed over. When the newest record itself is damaged, it goes back to the newest one that is not.

    Args:
        repository: where.
        alias: which.
        why: the reason, which stays on record.
        to: the number of the record to go back to; the one before by default.
        seen: the number of the newest record that the caller has seen: if there is a newer one, nothing is done.
        policy: who may, and by which key it must be signed; by default as for ``propose``.
        by: who rolls back; the present user by default.
        clock: tells the time.

    Raises:
        NotFoundError: there is no such alias, or nothing to go back to.
        ConflictError: the alias was changed at the same moment; nothing was done.
        RefusedError: the policy does not allow it to this user.
        ConfigError: no reason is given.

    Example:
        >>> import tempfile, peakpoint as pp
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"x": 1}, keep=[pp.Last(9)]) as ckpt:
        ...     _ = ckpt.report(step=1), ckpt.report(step=2)
        >>> repository = pp.open(root)
        >>> for ref in ("r:1", "r:2"):
        ...     proposal = propose(repository, ref, "champion")
        ...     record = promote(proposal, "an example", force=True)
        >>> back = rollback(repository, "champion", "an example")
        >>> back.record.number, back.record.restores, repository.find("@champion").step
        (3, 1, 1)
    """
    check_why("rollback", why)
    store = repository.store
    actor, policy = allowed_policy(store, alias, policy, by)
    newest = aliases.newest(store, check_alias(alias))
    present = newest if isinstance(newest, DamagedRecord) else aliases.holder(store, alias)
    if seen is not None and present.number != seen:
        raise ConflictError(f"{alias} is at record {present.number}, not at {seen}: somebody has changed it meanwhile")
    passed: list[str] = []
    for former in _as_far_as_known(_former(repository, present, to), passed):
        change = AliasChange(
            kind="rolled back",
            target=former.target,
            at=clock(),
            by=actor,
            why=why,
            restores=former.stands_for,
            validation=former.validation,
            keeps=former.keeps if isinstance(present, DamagedRecord) else present.keeps,
        )
        try:
            run, manifest = _still_there(repository, former, policy)
        except (NotFoundError, CorruptError, FormatError) as error:
            passed.append(f"record {former.number}: {error}")
            continue
        try:
            with announced(run, manifest, alias, present, actor, clock) as made_known:
                made_known.record = made = aliases.append(store, alias, change, after=present)
        except GoingError as error:
            passed.append(f"record {former.number}: {error}")
        else:
            return RolledBack(made, present, tuple(passed))
    reasons = "".join(f"\n  {one}" for one in passed)
    raise NotFoundError(
        f"there is nothing that {alias} could be rolled back to by itself; peakpoint history lists its records, and "
        f"--to N goes to any that still exists{':' if passed else ''}{reasons}"
    )


def _as_far_as_known(records: Iterator[AliasRecord], passed: list[str]) -> Iterator[AliasRecord]:
    """Records up to one that is damaged: what was before it is not known."""
    try:
        yield from records
    except CorruptError as error:
        passed.append(str(error))


def _former(repository: Repository, present: AliasRecord | DamagedRecord, to: int | None) -> Iterator[AliasRecord]:
    """What can be gone back to, the best first."""
    held = present.target if isinstance(present, AliasRecord) else None
    if to is None and isinstance(present, AliasRecord):
        return (one for one in aliases.back_from(repository.store, present) if one.target != held)
    if to is None:
        return _readable(repository.store, present.alias, present.number)
    found = aliases.read(repository.store, present.alias, to)
    if found.target is None:
        raise NotFoundError(f"record {to} of {present.alias} retired it: it points at nothing")
    if found.target == held:
        raise ConfigError(f"record {to} of {present.alias} points where it points now; there is nothing to go back to")
    return iter((found,))


def _readable(store: Store, alias: str, end: int) -> Iterator[AliasRecord]:
    for number in range(end - 1, 0, -1):
        with contextlib.suppress(CorruptError, NotFoundError):
            found = aliases.read(store, alias, number)
            if found.target is not None:
                yield found


def _still_there(repository: Repository, former: AliasRecord, policy: Policy | None) -> tuple[Run, Manifest]:
    assert former.target is not None
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
    """Let an alias point at nothing any more, so that it protects nothing. Its history stays.

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
    present = aliases.holder(repository.store, check_alias(alias))
    change = AliasChange(kind="retired", target=None, at=clock(), by=actor, why=why, keeps=0)
    return aliases.append(repository.store, alias, change, after=present)


@dataclass(slots=True)
class Announced:
    """A promotion that was announced.

    Attributes:
        record: the record of the alias, to be set when it is made.
    """

    record: AliasRecord | None = None


_AHEAD = timedelta(minutes=5)  # that clocks may differ


@contextmanager
def announced(
    run: Run, manifest: Manifest, alias: str, newest: AliasRecord | DamagedRecord | None, by: str, clock: Clock
) -> Iterator[Announced]:
    """Announce that an alias is about to point at a checkpoint, and afterwards what came of it.

    Args:
        run: of the checkpoint.
        manifest: of the checkpoint.
        alias: which.
        newest: its newest record, which the one to be made follows.
        by: who does it.
        clock: tells the time.

    Raises:
        GoingError: somebody is removing the checkpoint; nothing was done.
    """
    journal = journals.Journal(run.store, run.name, clock)
    facts: dict[str, Any] = {"checkpoint": manifest.id, "name": manifest.name, "alias": alias, "by": by}
    if isinstance(newest, AliasRecord) and newest.at - clock() > _AHEAD:
        warnings.warn(
            f"record {newest.number} of {alias} is of {newest.at:%Y-%m-%d %H:%M} UTC, which is still to come: a clock "
            "was wrong, and what served when cannot be told for that time",
            PeakpointWarning,
            stacklevel=4,
        )
    facts["token"] = secrets.token_hex(8)
    number = 1 if newest is None else newest.number + 1
    made = Announced()
    try:
        journal.append(Promoting(at=clock(), record=number, **facts))
        journal.sync()
        try:
            _check_stays(run, manifest)
            yield made
        finally:
            done, digest = (None, None) if made.record is None else (made.record.number, made.record.digest)
            journal.append(Promoted(at=clock(), record=done, digest=digest, **facts))
            journal.append(Closed(at=clock(), why=f"peakpoint {alias}"))
    finally:
        journal.close()


class GoingError(ConflictError):
    """A checkpoint is just being removed."""


def _check_stays(run: Run, manifest: Manifest) -> None:
    """Refuse a checkpoint that somebody is removing, or parts of it.

    Whoever removes has said so first, and looks at what is protected after that: one of the two sees the other.

    Raises:
        ConflictError: it is being removed, or gone, or has lost parts since it was looked at.
    """
    name = f"{run.name}/{manifest.name}"
    there = _manifest(run, manifest)
    going = there is None or run.is_being_removed(there)
    now = _manifest(run, manifest)  # once more: a removal may have been over before it was looked for
    if going or now is None:
        raise GoingError(
            f"{name} is just being removed, or parts of it are; nothing was done. peakpoint undo --list shows what "
            "can be restored"
        )
    if now.parts != manifest.parts:
        raise GoingError(f"{name} has lost parts meanwhile; nothing was done, look at it again")


def _manifest(run: Run, like: Manifest) -> Manifest | None:
    """A checkpoint as it is now; None when it is gone."""
    try:
        found = reader.read_manifest(run.store, run.name, like.name)
    except NotFoundError:
        return None
    return found if found.id == like.id else None


def complete(run: Run, manifest: Manifest, record: AliasRecord, by: str) -> None:
    """Say what came of announcements whose makers were killed after the record was made."""
    there = annotations_of(run.events()).promoting.values()
    mine = [one for one in there if (one.checkpoint, one.alias) == (manifest.id, record.alias)]
    over = [one for one in mine if one.record <= record.number]
    if not over:
        return
    journal = journals.Journal(run.store, run.name, utc_now)
    try:
        facts: dict[str, Any] = {"checkpoint": manifest.id, "name": manifest.name, "alias": record.alias, "by": by}
        for one in over:
            made = (record.number, record.digest) if one.record == record.number else (None, None)
            journal.append(Promoted(at=journal.now(), record=made[0], digest=made[1], token=one.token, **facts))
        journal.append(Closed(at=journal.now(), why=f"peakpoint {record.alias}"))
    finally:
        journal.close()
