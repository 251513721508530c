"""A proposal: a candidate beside the holder of an alias, with the objections to its promotion."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from fractions import Fraction

import msgspec

from peakpoint.errors import CorruptError, FormatError, RefusedError, SignatureError
from peakpoint.format.manifest import Manifest
from peakpoint.production.comparison import HolderComparison, compare_with, known_of
from peakpoint.production.paired_test import Paired
from peakpoint.production.policy import Improvement, Policy, read_policies
from peakpoint.production.validation import with_golden
from peakpoint.repository import aliases, reader, signing, validations
from peakpoint.repository.aliases import AliasRecord, AliasTarget, DamagedRecord
from peakpoint.repository.provenance import Clock, present_user, utc_now
from peakpoint.repository.refs import check_alias
from peakpoint.repository.root import Repository
from peakpoint.repository.run import Run
from peakpoint.repository.validations import MAX_AGE, Validation, ValidationSpec
from peakpoint.store import Store

CLOCK_SLACK = timedelta(minutes=5)  # how far the clocks of two machines may differ


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A promotion that is considered. Nothing has been changed.

    Attributes:
        run: of the candidate.
        manifest: of the candidate.
        target: what the alias would point at.
        newest: the newest record of the alias; None when there is none.
        validation: the last of the candidate; None when there is none.
        comparison: with the current holder; None when there is none, or it is the candidate.
        objections: reasons against it, a sentence each; a promotion that is forced overrides and records them.
        refusals: reasons that no force overrides.
        policy: of the alias; None when there is none.
    """

    alias: str
    run: Run
    manifest: Manifest
    target: AliasTarget
    newest: AliasRecord | DamagedRecord | None
    validation: Validation | None = None
    comparison: HolderComparison | None = None
    objections: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    policy: Policy | None

    @property
    def current(self) -> AliasRecord | None:
        """The newest record, if it can be read."""
        return self.newest if isinstance(self.newest, AliasRecord) else None

    @property
    def holder(self) -> AliasTarget | None:
        """The checkpoint that the alias points at, as far as that is known."""
        return None if self.current is None else self.current.target

    @property
    def unchanged(self) -> bool:
        """Return whether the alias points at the candidate already."""
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
        ref: the candidate.
        alias: what it is to become, such as ``"champion"``.
        policy: what is asked; by default the alias's table in ``production.toml``, if there is one. A ``Policy`` with
            nothing but the alias asks nothing.
        by: who promotes; the current user by default.
        to_be_signed: a missing signature that the policy asks for is no refusal: it will be made.

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
        policy=policy,
    )
    if proposal.unchanged:
        return proposal
    refusals = _refusals(repository, manifest, policy, by or present_user(), to_be_signed=to_be_signed)
    return replace(_with_objections(repository, proposal, clock), refusals=refusals)


def _with_objections(repository: Repository, proposal: Proposal, clock: Clock) -> Proposal:
    """A proposal with its validation, the comparison with the holder, and what both leave to object to."""
    reasons: tuple[str, ...] = ()
    if isinstance(proposal.newest, DamagedRecord):
        reasons = (f"the current holder of {proposal.alias} is unknown: {proposal.newest.error}",)
    try:
        newest = validations.newest(proposal.run.store, proposal.target.run, proposal.target.checkpoint)
    except (CorruptError, FormatError) as error:
        reasons += (f"its last validation cannot be read: {error}; validate it again",)
    else:
        proposal = replace(proposal, validation=newest)
        reasons += stale(proposal, clock)
    holder = proposal.holder
    if holder is not None:
        comparison = compare_with(repository, proposal.run, proposal.manifest, proposal.validation, holder)
        proposal = replace(proposal, comparison=comparison)
        improvement = None if proposal.policy is None else proposal.policy.improvement
        reasons += () if improvement is None else tuple(_no_improvement(improvement, comparison))
    return replace(proposal, objections=reasons)


def _refusals(
    repository: Repository, manifest: Manifest, policy: Policy | None, by: str, *, to_be_signed: bool
) -> tuple[str, ...]:
    not_allowed = () if policy is None or policy.allows(by) else (_not_allowed(policy, by),)
    try:
        reader.check_sizes(repository.store, manifest)
    except (CorruptError, FormatError) as error:
        return (*not_allowed, str(error))
    reason = None if to_be_signed else unsigned(repository, manifest, policy)
    return not_allowed if reason is None else (*not_allowed, reason)


def unsigned(repository: Repository, manifest: Manifest, policy: Policy | None) -> str | None:
    """Say why a checkpoint is not signed as a policy asks; None when it is, or nothing is asked. Reads every byte."""
    if policy is None or policy.public_key is None:
        return None
    try:
        signing.verify(repository.store, manifest, public_key=policy.public_key)
    except SignatureError as error:
        return f"the policy asks for a signature: {error}"
    return None


def allowed_policy(store: Store, alias: str, policy: Policy | None, by: str) -> tuple[str, Policy | None]:
    """Return who acts, and by which policy.

    Raises:
        RefusedError: the policy does not allow it.
    """
    actor = by or present_user()
    policy = policy or read_policies(store).of(check_alias(alias))
    if policy is not None and not policy.allows(actor):
        reason = _not_allowed(policy, actor)
        raise RefusedError(reason, (reason,))
    return actor, policy


def _not_allowed(policy: Policy, actor: str) -> str:
    return f"{actor} may not change {policy.alias}: the policy allows {', '.join(policy.may_promote)}"


# --- objections ---------------------------------------------------------------------------------------------------


def stale(proposal: Proposal, clock: Clock = utc_now, *, failures: bool = True) -> tuple[str, ...]:
    """List why a promotion cannot rest on the validation of a proposal, a sentence each.

    Args:
        failures: whether failed checks count; without, only whether the validation checked what is asked today.

    Raises:
        NotFoundError: the golden inputs that the policy names are missing.
    """
    validation = proposal.validation
    spec = None if proposal.policy is None else with_golden(proposal.policy.wanted)
    if validation is None:
        return ("it was never validated",)
    return (
        *_failed_checks(validation, failures=failures),
        *_outdated(validation, proposal, spec, clock()),
        *_recorded_since(validation, known_of(proposal.run, proposal.manifest)),
        *_compared_with_another(validation, proposal),
    )


def _failed_checks(validation: Validation, *, failures: bool) -> list[str]:
    if failures:
        return [f"its last validation failed: {finding.check}: {finding.said}" for finding in validation.failures]
    evidence = [finding.evidence for finding in validation.failures]
    broken_off = any(figures.get("cut_short") or figures.get("misnamed") for figures in evidence)
    return ["its last validation could not be carried out"] if broken_off else []


def _outdated(validation: Validation, proposal: Proposal, spec: ValidationSpec | None, now: datetime) -> Iterator[str]:
    """What has changed since the validation: the checkpoint, the date, and what the policy asks."""
    part, parts = validation.wanted.part, proposal.manifest.parts
    max_age = MAX_AGE if proposal.policy is None else proposal.policy.max_age
    if validation.manifest != proposal.target.manifest:
        yield "its manifest has changed since it was validated"
    if spec is None and part != "model" and "model" in parts:
        yield f"its last validation checked the part {part}, not the model"
    if part in validation.parts and part not in parts:
        yield f"its part {part} was dropped after the validation"
    if now - validation.at > max_age:
        yield f"its validation is stale: of {validation.at:%Y-%m-%d %H:%M} UTC, older than {max_age}"
    if validation.at - now > CLOCK_SLACK:
        yield f"its validation has the time {validation.at:%Y-%m-%d %H:%M} UTC, which is in the future"
    if spec is not None and spec.digest != validation.wanted.digest:
        policy, validated = msgspec.to_builtins(spec), msgspec.to_builtins(validation.wanted)
        different = [name for name in policy if policy[name] != validated[name] and name != "golden"]
        yield (
            f"its validation differs from what the policy asks in {', '.join(different)}; "
            "peakpoint validate ROOT REF checks what the policy asks"
        )


def _recorded_since(validation: Validation, metrics: Mapping[str, float]) -> Iterator[str]:
    """Metrics that were recorded anew, with another value than the validation has found."""
    rows = [finding.evidence.get("metrics") for finding in validation.findings if finding.check == "metrics"]
    for name, row in (pair for metric_rows in rows for pair in (metric_rows or {}).items()):
        # evidence is plain JSON: NaN and infinities are texts there
        recorded, evaluated = (math.nan if row[key] is None else float(row[key]) for key in ("recorded", "evaluated"))
        current = metrics.get(name)
        if current is None or row["evaluated"] is None or current == recorded:
            continue
        if not (math.isnan(current) and math.isnan(recorded)) and not within(
            current, evaluated, validation.wanted.tolerance
        ):
            yield f"{name} was recorded as {current:.6g} after the validation, which had found {evaluated:.6g}"


def _compared_with_another(validation: Validation, proposal: Proposal) -> Iterator[str]:
    # whether that is still the champion that it was compared with, whatever the checkpoint is to become
    alias, store = validation.alias, proposal.run.store
    newest = proposal.newest if alias is None else aliases.newest(store, alias)
    champion = newest.target if isinstance(newest, AliasRecord) else None
    compared = validation.against is not None or validation.wanted.agreement > 0
    if compared and champion is not None and champion.checkpoint not in {validation.against, validation.checkpoint}:
        yield "its validation is stale: it was not compared with the current champion"


def within(a: float, b: float, tolerance: float) -> bool:
    """Return whether two finite values of a metric differ by no more than a tolerance.

    Digits that binary fractions do not have are no difference: 0.901 - 0.9 is a little more than 0.001.

    Example:
        >>> within(0.901, 0.9, 1e-3), within(0.5, float("inf"), 1e-3)
        (True, False)
    """
    finite = math.isfinite(a) and math.isfinite(b)
    return finite and abs(a - b) <= tolerance + 4 * math.ulp(max(abs(a), abs(b)))


# --- improvement --------------------------------------------------------------------------------------------------


def _no_improvement(improvement: Improvement, comparison: HolderComparison) -> Iterator[str]:
    pair = next((pair for pair in comparison.metrics if pair.name == improvement.metric), None)
    if pair is None:
        yield f"the policy asks for an improvement of {improvement.metric}, which one of the two lacks"
        return
    reason = lack_of_improvement(improvement, pair.champion, pair.candidate, comparison.paired)
    if reason is not None:
        yield reason


def lack_of_improvement(
    improvement: Improvement, champion: float, candidate: float, paired: Paired | None = None
) -> str | None:
    """Say why a candidate is not better than the champion by enough, and by more than chance; None when it is.

    The values count as the decimals that they print as: from 0.2 to 0.3 is an improvement of 0.1, although the floats'
    difference is less. What is not finite is never better.

    Args:
        paired: both models on the same examples; a significance needs it.

    Example:
        >>> improvement = Improvement(metric="val_accuracy", mode="max", minimum=0.005)
        >>> lack_of_improvement(improvement, champion=0.9, candidate=0.9012)
        'val_accuracy rose by 0.0012, less than the 0.005 that the policy asks for'
    """
    metric = improvement.metric
    for side, value in (("champion", champion), ("candidate", candidate)):
        if not math.isfinite(value):
            return f"{metric} of the {side} is {value}: there is nothing to compare"
    movement = f"{metric} {'rose' if candidate > champion else 'fell'} by {abs(candidate - champion):.6g}"
    if candidate == champion:
        movement = f"{metric} stayed at {champion:.6g}"
    rise = _exact(candidate) - _exact(champion)
    gain = rise if improvement.mode == "max" else -rise
    if gain < _exact(improvement.minimum):
        return movement + _too_little(gain, champion, candidate, improvement.minimum)
    return None if improvement.significance is None else _chance(movement, paired, improvement.significance)


def _exact(value: float) -> Fraction:
    return Fraction(repr(float(value)))


def _too_little(gain: Fraction, champion: float, candidate: float, minimum: float) -> str:
    policy = f"; the policy asks for an improvement of {minimum:.6g}" if minimum else ""
    if gain < 0:
        return f", from {champion:.6g} to {candidate:.6g}, and is worse{policy}"
    if not gain:
        return policy
    if f"{abs(candidate - champion):.6g}" == f"{minimum:.6g}":
        return f", just less than the {minimum!r} that the policy asks for"
    return f", less than the {minimum:.6g} that the policy asks for"


def _chance(movement: str, paired: Paired | None, significance: float) -> str | None:
    if paired is None:
        return (
            f"{movement}, but only predictions of both models on the same examples tell whether that is more than "
            "chance, and there are none"
        )
    tally = f"of {paired.examples} examples {paired.gained} were gained and {paired.lost} lost"
    if paired.gained <= paired.lost:
        return f"{movement}, but {tally}: the predictions are no better"
    if paired.p_value <= significance:
        return None
    limit = f"more than the {significance:g} that the policy asks for"
    return f"{movement}, which may be chance: {tally}, p = {paired.p_value:.2g}, {limit}"
