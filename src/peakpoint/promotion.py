"""Promoting checkpoints to aliases, and going back: first a proposal with all that speaks against it, then the act.

The act is a compare-and-swap on the record that the proposal has seen. Before the record is made, the run's journal
says that it is about to be, durably, and a removal that was announced meanwhile is looked for: so a checkpoint that an
alias points at is never one that retention is removing at the same moment. A crash leaves the alias as it was or as it
is to be, and at most a checkpoint that stays protected until the alias changes again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peakpoint import aliases, reader, signing, validations
from peakpoint import journal as journals
from peakpoint.actor import present_user
from peakpoint.aliases import AliasRecord, Change, Target
from peakpoint.clock import Clock, utc_now
from peakpoint.compare import judge_improvement
from peakpoint.comparison import Comparison, compare_with
from peakpoint.errors import (
    ConfigError,
    ConflictError,
    CorruptError,
    FormatError,
    NotFoundError,
    RefusedError,
    SignatureError,
)
from peakpoint.manifest import Manifest
from peakpoint.names import check_text
from peakpoint.notes import notes
from peakpoint.policy import Policy
from peakpoint.refs import check_alias
from peakpoint.repository import Repository, Run
from peakpoint.validations import Validation

CHAMPION = "champion"  # an alias of this name is never without a checkpoint


# --- the proposal -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a promotion would do, and what speaks against it. Nothing has been changed.

    Attributes:
        alias: which.
        run: of the candidate.
        manifest: of the candidate.
        target: what the alias would point at.
        present: the newest record of the alias; None when there is none.
        validation: the last of the candidate; None when there is none.
        comparison: with the present holder; None when there is none, or it is the candidate.
        objections: what speaks against it, a sentence each; a promotion that is forced overrides them, and says so.
        refusals: what no force overrides.
        policy: of the alias; None when there is none.
    """

    alias: str
    run: Run
    manifest: Manifest
    target: Target
    present: AliasRecord | None
    validation: Validation | None
    comparison: Comparison | None
    objections: tuple[str, ...]
    refusals: tuple[str, ...]
    policy: Policy | None

    @property
    def unchanged(self) -> bool:
        """Whether the alias points there already."""
        return self.present is not None and self.present.target == self.target


def propose(
    repository: Repository,
    ref: str,
    alias: str,
    *,
    policy: Policy | None = None,
    by: str = "",
    to_be_signed: bool = False,
    clock: Clock = utc_now,
) -> Proposal:
    """Look at everything that a promotion depends on; changes nothing, and opens no weight file but for signatures.

    Args:
        repository: where.
        ref: the candidate.
        alias: what it is to become, such as ``"champion"``.
        policy: what the alias's policy asks; see ``peakpoint.policy``.
        by: who promotes; the present user by default.
        to_be_signed: a signature that the policy asks for and that is missing is no refusal: it will be made.
        clock: tells the time.

    Raises:
        NotFoundError: there is no such checkpoint.
        ConfigError: a name that cannot be.
        CorruptError: the newest record of the alias, or the last validation, is damaged.

    Example:
        >>> import tempfile, peakpoint as pp
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"x": 1}, keep=[pp.Last(9)]) as ckpt:
        ...     _ = ckpt.report(step=1), ckpt.report(step=2)
        >>> pp.promotion.propose(pp.open(root), "r:1", "champion").objections
        ('it was never validated',)
    """
    store = repository.store
    run, manifest = repository.locate(ref)
    present = aliases.head(store, check_alias(alias))
    digest = reader.manifest_digest(store, manifest)
    target = Target(run=manifest.run, checkpoint=manifest.id, name=manifest.name, manifest=digest)
    validation = validations.newest(store, manifest.run, manifest.id)
    held = None if present is None else present.target
    comparison = None if held is None or held == target else compare_with(repository, run, manifest, validation, held)
    objections = validations.objections(
        validation,
        manifest=digest,
        parts=tuple(manifest.parts),
        now=clock(),
        max_age=validations.MAX_AGE if policy is None else policy.max_age,
        wanted=None if policy is None else policy.wanted,
        champion=None if held is None else held.checkpoint,
    )
    if policy is not None and comparison is not None:
        objections += _not_enough(policy, comparison)
    return Proposal(
        alias=alias,
        run=run,
        manifest=manifest,
        target=target,
        present=present,
        validation=validation,
        comparison=comparison,
        objections=objections,
        refusals=_refusals(repository, manifest, policy, by or present_user(), to_be_signed=to_be_signed),
        policy=policy,
    )


def _refusals(
    repository: Repository, manifest: Manifest, policy: Policy | None, by: str, *, to_be_signed: bool
) -> tuple[str, ...]:
    found = []
    if policy is not None and not policy.allows(by):
        found.append(f"{by} may not promote: the policy allows {', '.join(policy.may_promote)}")
    try:
        reader.check_sizes(repository.store, manifest)
    except (CorruptError, FormatError) as error:
        return (*found, str(error))
    if not to_be_signed and (said := unsigned(repository, manifest, policy)) is not None:
        found.append(said)
    return tuple(found)


def unsigned(repository: Repository, manifest: Manifest, policy: Policy | None) -> str | None:
    """Why a checkpoint is not signed as a policy asks; None when it is, or nothing is asked. Reads every byte of it."""
    if policy is None or policy.public_key is None:
        return None
    try:
        signing.verify(repository.store, manifest, public_key=policy.public_key)
    except SignatureError as error:
        return f"the policy asks for a signature: {error}"
    return None


def _not_enough(policy: Policy, comparison: Comparison) -> tuple[str, ...]:
    asked = policy.improvement
    if asked is None:
        return ()
    pair = next((one for one in comparison.metrics if one.name == asked.metric), None)
    if pair is None:
        return (f"the policy asks for an improvement of {asked.metric}, which only one of the two has, or none",)
    judged = judge_improvement(
        metric=asked.metric,
        mode=asked.mode,
        champion=pair.champion,
        candidate=pair.candidate,
        paired=comparison.paired,
        minimum=asked.minimum,
        significance=asked.significance,
    )
    return () if judged.passed else (judged.said,)


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
        ...     proposal = pp.promotion.propose(repository, ref, "champion")
        ...     record = pp.promotion.promote(proposal, "an example", force=True)
        >>> record.number, record.forced, repository.find("@champion").step
        (2, ('it was never validated',), 2)
    """
    check_why("promote", why)
    store, actor = proposal.run.store, by or present_user()
    if proposal.unchanged:
        assert proposal.present is not None
        _complete(proposal.run, proposal.manifest, proposal.present, actor)
        return proposal.present
    if proposal.refusals or (proposal.objections and not force):
        raise refusal(proposal)
    change = Change(
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
    number = 1 if proposal.present is None else proposal.present.number + 1
    with _announced(proposal.run, proposal.manifest, proposal.alias, number, actor, clock) as announced:
        announced.record = made = aliases.append(store, proposal.alias, change, after=proposal.present)
    return made


def refusal(proposal: Proposal) -> RefusedError:
    """The error for a promotion that something speaks against."""
    reasons = (*proposal.refusals, *proposal.objections)
    hint = "" if proposal.refusals else "; with --force it is done all the same, and that stays on record"
    name = f"{proposal.manifest.run}/{proposal.manifest.name}"
    return RefusedError(f"{name} does not become {proposal.alias}: {'; '.join(reasons)}{hint}", reasons)


def check_why(act: str, why: str) -> str:
    """Return a reason, if it is one.

    Raises:
        ConfigError: it is empty, or cannot be written.
    """
    if not check_text(f"the reason of {act}", why).strip():
        raise ConfigError(f"{act} needs a reason (--why): it is what tells everybody later why this was done")
    return why


@dataclass(slots=True)
class _Announced:
    record: AliasRecord | None = None


@contextmanager
def _announced(run: Run, manifest: Manifest, alias: str, number: int, by: str, clock: Clock) -> Iterator[_Announced]:
    """Announce that an alias is about to point at a checkpoint, and afterwards what came of it."""
    journal = journals.Journal(run.store, run.name, clock)
    facts: dict[str, Any] = {"checkpoint": manifest.id, "name": manifest.name, "alias": alias, "by": by}
    made = _Announced()
    try:
        journal.append(journals.Promoting(at=clock(), record=number, **facts))
        journal.sync()
        try:
            _check_stays(run, manifest)
            yield made
        finally:
            done, digest = (None, None) if made.record is None else (made.record.number, made.record.digest)
            journal.append(journals.Promoted(at=clock(), record=done, digest=digest, **facts))
            journal.append(journals.Closed(at=clock(), why=f"peakpoint {alias}"))
    finally:
        journal.close()


def _check_stays(run: Run, manifest: Manifest) -> None:
    """Refuse a checkpoint that somebody is removing, or parts of it.

    Whoever removes has said so first, and looks at what is protected after that: one of the two sees the other.

    Raises:
        ConflictError: it is being removed, or gone, or has lost parts since it was looked at.
    """
    name = f"{run.name}/{manifest.name}"
    try:
        now = reader.read_manifest(run.store, run.name, manifest.name)
    except NotFoundError:
        now = None
    if now is None or now.id != manifest.id or run.is_being_removed(now):
        raise ConflictError(
            f"{name} is just being removed, or parts of it are; nothing was done. peakpoint trash shows what can be "
            "brought back"
        )
    if now.parts != manifest.parts:
        raise ConflictError(f"{name} has lost parts meanwhile; nothing was done, look at it again")


def _complete(run: Run, manifest: Manifest, record: AliasRecord, by: str) -> None:
    """Say what came of an announcement whose maker was killed after the record was made."""
    if (manifest.id, record.alias) not in notes(run.events()).promoting:
        return
    journal = journals.Journal(run.store, run.name, utc_now)
    try:
        facts: dict[str, Any] = {"checkpoint": manifest.id, "name": manifest.name, "alias": record.alias, "by": by}
        journal.append(journals.Promoted(at=journal.now(), record=record.number, digest=record.digest, **facts))
        journal.append(journals.Closed(at=journal.now(), why=f"peakpoint {record.alias}"))
    finally:
        journal.close()


@dataclass(frozen=True, slots=True)
class RolledBack:
    """A roll back.

    Attributes:
        record: the new one.
        before: the one that counted until then.
        passed_over: former holders that cannot be gone back to, a sentence each.
    """

    record: AliasRecord
    before: AliasRecord
    passed_over: tuple[str, ...]


def rollback(
    repository: Repository,
    alias: str,
    why: str,
    *,
    to: int | None = None,
    policy: Policy | None = None,
    by: str = "",
    clock: Clock = utc_now,
) -> RolledBack:
    """Let an alias point at what it pointed at before. Reads a few small files, whatever the size of the models.

    Going back again goes further back. Former holders that are gone or damaged are passed over.

    Args:
        repository: where.
        alias: which.
        why: the reason, which stays on record.
        to: the number of the record to go back to; the one before by default.
        policy: of the alias: who may, and how many former holders stay protected.
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
        ...     proposal = pp.promotion.propose(repository, ref, "champion")
        ...     record = pp.promotion.promote(proposal, "an example", force=True)
        >>> back = pp.promotion.rollback(repository, "champion", "an example")
        >>> back.record.number, back.record.restores, repository.find("@champion").step
        (3, 1, 1)
    """
    check_why("rollback", why)
    actor = by or present_user()
    if policy is not None and not policy.allows(actor):
        raise _not_allowed(alias, policy, actor)
    store = repository.store
    present = aliases.holder(store, check_alias(alias))
    passed: list[str] = []
    for former in _former(repository, present, to):
        try:
            run, manifest = _still_there(repository, former)
        except (NotFoundError, CorruptError, FormatError) as error:
            passed.append(f"record {former.number}: {error}")
            continue
        change = Change(
            kind="rolled back",
            target=former.target,
            at=clock(),
            by=actor,
            why=why,
            restores=former.stands_for,
            validation=former.validation,
            keeps=present.keeps,
        )
        with _announced(run, manifest, alias, present.number + 1, actor, clock) as announced:
            announced.record = made = aliases.append(store, alias, change, after=present)
        return RolledBack(made, present, tuple(passed))
    reasons = "".join(f"\n  {one}" for one in passed)
    raise NotFoundError(f"there is nothing that {alias} could be rolled back to{':' if passed else ''}{reasons}")


def _former(repository: Repository, present: AliasRecord, to: int | None) -> Iterator[AliasRecord]:
    if to is None:
        held = present.target
        return (one for one in aliases.back_from(repository.store, present) if one.target != held)
    try:
        found = aliases.read(repository.store, present.alias, to)
    except NotFoundError as error:
        raise NotFoundError(
            f"{present.alias} has no record {to}; peakpoint history ROOT {present.alias} lists them"
        ) from error
    if found.target is None:
        raise NotFoundError(f"record {to} of {present.alias} retired it: it points at nothing")
    if found.target == present.target:
        raise ConfigError(f"record {to} of {present.alias} points where it points now; there is nothing to go back to")
    return iter((found,))


def _still_there(repository: Repository, former: AliasRecord) -> tuple[Run, Manifest]:
    assert former.target is not None
    run, manifest = repository.locate(f"@{former.alias}:{former.number}")
    reader.check_sizes(repository.store, manifest)
    return run, manifest


def _not_allowed(alias: str, policy: Policy, actor: str) -> RefusedError:
    said = f"{actor} may not change {alias}: the policy allows {', '.join(policy.may_promote)}"
    return RefusedError(said, (said,))


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
    actor = by or present_user()
    if alias.rpartition("/")[2] == CHAMPION:
        raise ConfigError(f"{alias} is never without a checkpoint: promote another one to it instead")
    if policy is not None and not policy.allows(actor):
        raise _not_allowed(alias, policy, actor)
    present = aliases.holder(repository.store, check_alias(alias))
    change = Change(kind="retired", target=None, at=clock(), by=actor, why=why, keeps=0)
    return aliases.append(repository.store, alias, change, after=present)
