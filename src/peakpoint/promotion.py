"""Promoting checkpoints to aliases, and going back: first a proposal with all that speaks against it, then the act.

The act is a compare-and-swap on the record that the proposal has seen. Before the record is made, the run's journal
says that it is about to be, durably, and a removal that was announced meanwhile is looked for: so a checkpoint that an
alias points at is never one that retention is removing at the same moment. A crash leaves the alias as it was or as it
is to be, and at most a checkpoint that stays protected until the alias changes again.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from peakpoint.announcing import GoingError, announced, complete
from peakpoint.asking import with_golden
from peakpoint.compare import judge_improvement
from peakpoint.comparison import Comparison, compare_with, known_of
from peakpoint.errors import (
    ConfigError,
    ConflictError,
    CorruptError,
    FormatError,
    NotFoundError,
    RefusedError,
    SignatureError,
)
from peakpoint.format.manifest import Manifest
from peakpoint.format.names import check_text
from peakpoint.policy import Policy, read_policies
from peakpoint.repository import aliases, reader, signing, validations
from peakpoint.repository.aliases import AliasRecord, Broken, Change, Target
from peakpoint.repository.provenance import Clock, present_user, utc_now
from peakpoint.repository.refs import check_alias
from peakpoint.repository.root import Repository
from peakpoint.repository.run import Run
from peakpoint.repository.validations import Validation
from peakpoint.store import Store

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
        newest: the newest record of the alias; None when there is none.
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
    newest: AliasRecord | Broken | None
    validation: Validation | None
    comparison: Comparison | None
    objections: tuple[str, ...]
    refusals: tuple[str, ...]
    policy: Policy | None

    @property
    def present(self) -> AliasRecord | None:
        """The newest record, if it can be read."""
        return self.newest if isinstance(self.newest, AliasRecord) else None

    @property
    def held(self) -> Target | None:
        """What the alias points at, as far as that is known."""
        return None if self.present is None else self.present.target

    @property
    def unchanged(self) -> bool:
        """Whether the alias points there already."""
        return self.held == self.target


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
        policy: what is asked; by default the alias's table in ``production.toml``, if there is one. A ``Policy`` with
            nothing but the alias asks nothing.
        by: who promotes; the present user by default.
        to_be_signed: a signature that the policy asks for and that is missing is no refusal: it will be made.
        clock: tells the time.

    Raises:
        NotFoundError: there is no such checkpoint.
        ConfigError: a name that cannot be.
        FormatError: a newer release has written the newest record of the alias.

    Example:
        >>> import tempfile, peakpoint as pp
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"x": 1}, keep=[pp.Last(9)]) as ckpt:
        ...     _ = ckpt.report(step=1), ckpt.report(step=2)
        >>> pp.promotion.propose(pp.open(root), "r:1", "champion").objections
        ('it was never validated',)
    """
    store = repository.store
    policy = policy or read_policies(store).of(check_alias(alias))
    run, manifest = repository.locate(ref)
    digest = reader.manifest_digest(store, manifest)
    proposal = Proposal(
        alias=alias,
        run=run,
        manifest=manifest,
        target=Target(run=manifest.run, checkpoint=manifest.id, name=manifest.name, manifest=digest),
        newest=aliases.tip(store, alias),
        validation=None,
        comparison=None,
        objections=(),
        refusals=(),
        policy=policy,
    )
    if proposal.unchanged:
        return proposal
    proposal, objections = _validated(proposal, clock)
    held = proposal.held
    if held is not None:
        comparison = compare_with(repository, run, manifest, proposal.validation, held)
        objections += () if policy is None else _not_enough(policy, comparison)
        proposal = replace(proposal, comparison=comparison)
    refusals = _refusals(repository, manifest, policy, by or present_user(), to_be_signed=to_be_signed)
    return replace(proposal, objections=objections, refusals=refusals)


def _validated(proposal: Proposal, clock: Clock) -> tuple[Proposal, tuple[str, ...]]:
    """A proposal with its validation, and what speaks against it so far."""
    found: tuple[str, ...] = ()
    if isinstance(proposal.newest, Broken):
        found = (f"what {proposal.alias} points at now is not known: {proposal.newest.error}",)
    try:
        validation = validations.newest(proposal.run.store, proposal.target.run, proposal.target.checkpoint)
    except (CorruptError, FormatError) as error:
        return proposal, (*found, f"its last validation cannot be read: {error}; validate it again")
    proposal = replace(proposal, validation=validation)
    return proposal, (*found, *stale(proposal, clock))


def stale(proposal: Proposal, clock: Clock = utc_now, *, failures: bool = True) -> tuple[str, ...]:
    """Why a promotion cannot rest on the validation of a proposal; see ``validations.objections``.

    Raises:
        NotFoundError: the golden inputs that the policy names are not there.
    """
    policy, last = proposal.policy, proposal.validation
    # whether that is still the champion that it was compared with, whatever the checkpoint is to become
    beside = proposal.newest if last is None or last.alias is None else aliases.tip(proposal.run.store, last.alias)
    held = beside.target if isinstance(beside, AliasRecord) else None
    return validations.objections(
        last,
        manifest=proposal.target.manifest,
        parts=tuple(proposal.manifest.parts),
        metrics=known_of(proposal.run, proposal.manifest),
        now=clock(),
        max_age=validations.MAX_AGE if policy is None else policy.max_age,
        wanted=None if policy is None else with_golden(policy.wanted),
        champion=None if held is None else held.checkpoint,
        failures=failures,
    )


def _refusals(
    repository: Repository, manifest: Manifest, policy: Policy | None, by: str, *, to_be_signed: bool
) -> tuple[str, ...]:
    found = []
    if policy is not None and not policy.allows(by):
        found.append(_not_allowed(policy, by))
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
        complete(proposal.run, proposal.manifest, proposal.present, actor)
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
    before: AliasRecord | Broken
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
        ...     proposal = pp.promotion.propose(repository, ref, "champion")
        ...     record = pp.promotion.promote(proposal, "an example", force=True)
        >>> back = pp.promotion.rollback(repository, "champion", "an example")
        >>> back.record.number, back.record.restores, repository.find("@champion").step
        (3, 1, 1)
    """
    check_why("rollback", why)
    store = repository.store
    actor, policy = _allowed(store, alias, policy, by)
    newest = aliases.tip(store, check_alias(alias))
    present = newest if isinstance(newest, Broken) else aliases.holder(store, alias)
    if seen is not None and present.number != seen:
        raise ConflictError(f"{alias} is at record {present.number}, not at {seen}: somebody has changed it meanwhile")
    passed: list[str] = []
    for former in _as_far_as_known(_former(repository, present, to), passed):
        change = Change(
            kind="rolled back",
            target=former.target,
            at=clock(),
            by=actor,
            why=why,
            restores=former.stands_for,
            validation=former.validation,
            keeps=former.keeps if isinstance(present, Broken) else present.keeps,
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


def _former(repository: Repository, present: AliasRecord | Broken, to: int | None) -> Iterator[AliasRecord]:
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


def _allowed(store: Store, alias: str, policy: Policy | None, by: str) -> tuple[str, Policy | None]:
    """Who acts, and by which policy.

    Raises:
        RefusedError: the policy does not allow it.
    """
    actor = by or present_user()
    policy = policy or read_policies(store).of(check_alias(alias))
    if policy is not None and not policy.allows(actor):
        raise RefusedError(said := _not_allowed(policy, actor), (said,))
    return actor, policy


def _not_allowed(policy: Policy, actor: str) -> str:
    return f"{actor} may not change {policy.alias}: the policy allows {', '.join(policy.may_promote)}"


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
    actor, _ = _allowed(repository.store, alias, policy, by)
    present = aliases.holder(repository.store, check_alias(alias))
    change = Change(kind="retired", target=None, at=clock(), by=actor, why=why, keeps=0)
    return aliases.append(repository.store, alias, change, after=present)
