"""A proposal: a candidate beside the holder of an alias, and what speaks against it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import msgspec

from peakpoint.errors import CorruptError, FormatError, RefusedError, SignatureError
from peakpoint.format.manifest import Manifest
from peakpoint.production.comparison import HolderComparison, compare_with, known_of
from peakpoint.production.paired_test import judge_improvement
from peakpoint.production.policy import Policy, read_policies
from peakpoint.production.validation import with_golden
from peakpoint.repository import aliases, reader, signing, validations
from peakpoint.repository.aliases import AliasRecord, AliasTarget, DamagedRecord
from peakpoint.repository.provenance import Clock, present_user, utc_now
from peakpoint.repository.refs import check_alias
from peakpoint.repository.root import Repository
from peakpoint.repository.run import Run
from peakpoint.repository.validations import MAX_AGE, Validation, ValidationSpec
from peakpoint.store import Store


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
    target: AliasTarget
    newest: AliasRecord | DamagedRecord | None
    validation: Validation | None
    comparison: HolderComparison | None
    objections: tuple[str, ...]
    refusals: tuple[str, ...]
    policy: Policy | None

    @property
    def current(self) -> AliasRecord | None:
        """The newest record, if it can be read."""
        return self.newest if isinstance(self.newest, AliasRecord) else None

    @property
    def holder(self) -> AliasTarget | None:
        """What the alias points at, as far as that is known."""
        return None if self.current is None else self.current.target

    @property
    def unchanged(self) -> bool:
        """Whether the alias points there already."""
        return self.holder == self.target


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
        >>> propose(pp.open(root), "r:1", "champion").objections
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
        target=AliasTarget(run=manifest.run, checkpoint=manifest.id, name=manifest.name, manifest=digest),
        newest=aliases.newest(store, alias),
        validation=None,
        comparison=None,
        objections=(),
        refusals=(),
        policy=policy,
    )
    if proposal.unchanged:
        return proposal
    proposal, objections = _validated(proposal, clock)
    held = proposal.holder
    if held is not None:
        comparison = compare_with(repository, run, manifest, proposal.validation, held)
        objections += () if policy is None else _not_enough(policy, comparison)
        proposal = replace(proposal, comparison=comparison)
    refusals = _refusals(repository, manifest, policy, by or present_user(), to_be_signed=to_be_signed)
    return replace(proposal, objections=objections, refusals=refusals)


def _validated(proposal: Proposal, clock: Clock) -> tuple[Proposal, tuple[str, ...]]:
    """A proposal with its validation, and what speaks against it so far."""
    found: tuple[str, ...] = ()
    if isinstance(proposal.newest, DamagedRecord):
        found = (f"what {proposal.alias} points at now is not known: {proposal.newest.error}",)
    try:
        validation = validations.newest(proposal.run.store, proposal.target.run, proposal.target.checkpoint)
    except (CorruptError, FormatError) as error:
        return proposal, (*found, f"its last validation cannot be read: {error}; validate it again")
    proposal = replace(proposal, validation=validation)
    return proposal, (*found, *stale(proposal, clock))


def stale(proposal: Proposal, clock: Clock = utc_now, *, failures: bool = True) -> tuple[str, ...]:
    """Why a promotion cannot rest on the validation of a proposal; see ``objections``.

    Raises:
        NotFoundError: the golden inputs that the policy names are not there.
    """
    policy, last = proposal.policy, proposal.validation
    # whether that is still the champion that it was compared with, whatever the checkpoint is to become
    beside = proposal.newest if last is None or last.alias is None else aliases.newest(proposal.run.store, last.alias)
    held = beside.target if isinstance(beside, AliasRecord) else None
    return objections(
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


def _not_enough(policy: Policy, comparison: HolderComparison) -> tuple[str, ...]:
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


def allowed_policy(store: Store, alias: str, policy: Policy | None, by: str) -> tuple[str, Policy | None]:
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


_AHEAD = timedelta(minutes=5)  # that clocks may differ


def objections(
    validation: Validation | None,
    *,
    manifest: str,
    parts: Sequence[str],
    metrics: Mapping[str, float],
    now: datetime,
    max_age: timedelta = MAX_AGE,
    wanted: ValidationSpec | None = None,
    champion: str | None = None,
    failures: bool = True,
) -> tuple[str, ...]:
    """Why a promotion cannot rest on a validation, a sentence each; none when it can.

    Args:
        validation: the last of the checkpoint.
        manifest: digest of the checkpoint's manifest now.
        parts: the parts that it has now.
        metrics: what is recorded of it now.
        now: the time.
        max_age: how old it may be.
        wanted: what a policy asks to be checked; None when there is no policy.
        champion: id of the present holder of the alias.
        failures: whether checks that failed count; without, only whether it answers what is asked today.
    """
    if validation is None:
        return ("it was never validated",)
    found = [f"its last validation failed: {one.check}: {one.said}" for one in validation.failures if failures]
    if not failures and any(
        one.evidence.get("cut_short") or one.evidence.get("misnamed") for one in validation.failures
    ):
        found.append("its last validation could not be carried out")
    if validation.manifest != manifest:
        found.append("its manifest is another than the one that was validated")
    part = validation.wanted.part
    if wanted is None and part != "model" and "model" in parts:
        found.append(f"it was validated as to its part {part}, and not to its model")
    if part in validation.parts and part not in parts:
        found.append(f"it has lost the part {part} since it was validated")
    if now - validation.at > max_age:
        found.append(f"its validation is stale: of {validation.at:%Y-%m-%d %H:%M} UTC, older than {max_age}")
    if validation.at - now > _AHEAD:
        found.append(f"its validation is of {validation.at:%Y-%m-%d %H:%M} UTC, which is still to come")
    if wanted is not None and wanted.digest != validation.wanted.digest:
        found.append(
            f"it was validated otherwise than the policy asks ({', '.join(_different(wanted, validation.wanted))}); "
            "peakpoint validate ROOT REF checks what the policy asks"
        )
    found += _recorded_since(validation, metrics)
    compared = validation.against is not None or validation.wanted.agreement > 0
    if compared and champion not in {None, validation.against, validation.checkpoint}:
        found.append("its validation is stale: it was not compared with what is champion now")
    return tuple(found)


def _different(one: ValidationSpec, other: ValidationSpec) -> list[str]:
    a, b = (msgspec.to_builtins(each) for each in (one, other))
    return [name for name in a if a[name] != b[name] and name != "golden"]


def within(one: float, other: float, tolerance: float) -> bool:
    """Whether two values of a metric are the same but for a tolerance; what is not finite is the same as nothing.

    Digits that binary fractions do not have are no difference: 0.901 - 0.9 is a little more than 0.001.

    Example:
        >>> within(0.901, 0.9, 1e-3), within(0.5, float("inf"), 1e-3)
        (True, False)
    """
    finite = math.isfinite(one) and math.isfinite(other)
    return finite and abs(one - other) <= tolerance + 4 * math.ulp(max(abs(one), abs(other)))


def _recorded_since(validation: Validation, metrics: Mapping[str, float]) -> Iterator[str]:
    """What has been recorded since, and is not what was found."""
    for finding in validation.findings:
        rows = finding.evidence.get("metrics") if finding.check == "metrics" else None
        for name, row in (rows or {}).items():
            # evidence is plain JSON: NaN and infinities are texts there
            then, found = (math.nan if row[one] is None else float(row[one]) for one in ("recorded", "evaluated"))
            now = metrics.get(name)
            if now is None or row["evaluated"] is None or now == then or (math.isnan(now) and math.isnan(then)):
                continue
            if not within(now, found, validation.wanted.tolerance):
                yield f"{name} was recorded as {now:.6g} since it was validated, which had found {found:.6g}"
