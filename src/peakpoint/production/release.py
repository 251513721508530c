"""A release: select, validate, compare, promote and tell by a policy, as one command that can be repeated.

Every step leaves what it has found on record before the next one begins: the validation, the record of the alias, that
the hooks were told. A release that was killed in between is repeated by running it again: what is on record is not done
twice. Where the best checkpoint is promoted already, a release changes nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Literal, Self

from peakpoint.catalogue import Catalogue, SelectionQuery
from peakpoint.catalogue.query import parse
from peakpoint.catalogue.ranking import ranking_keys
from peakpoint.errors import ConfigError, CorruptError, FormatError, NotFoundError
from peakpoint.format.manifest import Checkpoint
from peakpoint.format.names import did_you_mean
from peakpoint.format.sealed import digest
from peakpoint.production import hooks, promotion
from peakpoint.production.hooks import HookResult
from peakpoint.production.policy import Policies, Policy
from peakpoint.production.proposal import Proposal, propose, stale, unsigned
from peakpoint.production.validation import with_golden
from peakpoint.repository import aliases, signing, validations
from peakpoint.repository.aliases import AliasRecord, AliasTarget
from peakpoint.repository.provenance import Clock, present_user, utc_now
from peakpoint.repository.root import Repository
from peakpoint.repository.validations import Validation

ReleaseOutcome = Literal["promoted", "unchanged", "refused", "nothing fits", "would promote", "would validate"]


Validate = Callable[..., Validation]
"""Validates a checkpoint and records what it found; called like ``peakpoint.production.validation.validate``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a release.

    Attributes:
        name: ``select``, ``validate``, ``compare``, ``sign``, ``promote`` or ``tell``.
        said: what came of it, in one sentence.
        outcome: of the release as far as this step decides it; None when it decides nothing.
        reasons: why not, a sentence each.
    """

    name: str
    said: str
    outcome: ReleaseOutcome | None = None
    reasons: tuple[str, ...] = ()

    @property
    def ends(self) -> bool:
        """Return whether no further step is taken."""
        return self.outcome in {"refused", "nothing fits", "would validate", "would promote"}


@dataclass(slots=True)
class Release:
    """The release of the best checkpoint that a policy finds: ``run`` takes its steps.

    Attributes:
        repository: holds the checkpoints and the alias.
        alias: what is released to.
        policies: what ``production.toml`` says.
        validate: validates a candidate; see ``peakpoint.production.validation.validate``.
        why: the reason, for the record; the rule that selected it by default.
        private_key: sign what is promoted with this key, unless it is signed as the policy asks.
        dry_run: only say what would be done; nothing is validated or changed.
        progress: called with each thing that is about to be done.
        catalogue: where the index is; see ``Catalogue``.
        policy: of the alias.
        id: the same for the same candidate, holder, policy and validation; None when there was nothing to decide.
        outcome: in a word.
        steps: in their order.
        candidate: the selected checkpoint; None when no checkpoint matches.
        proposal: what was decided on.
        record: of the alias, when it points at the candidate now.
        reasons: why not, a sentence each.
        hook_results: what became of the hooks.

    Raises:
        ConfigError: there is no policy for the alias, or it says nothing of what to select.
    """

    repository: Repository
    alias: str
    policies: Policies
    validate: Validate
    _: KW_ONLY
    why: str = ""
    private_key: Path | None = None
    dry_run: bool = False
    progress: Callable[[str], None] = lambda _: None
    catalogue: str | None = None
    clock: Clock = utc_now
    by: str = field(default_factory=present_user)
    policy: Policy = field(init=False)
    id: str | None = None
    outcome: ReleaseOutcome = "refused"
    steps: list[Step] = field(default_factory=list)
    candidate: Checkpoint | None = None
    proposal: Proposal | None = None
    record: AliasRecord | None = None
    reasons: tuple[str, ...] = ()
    hook_results: tuple[HookResult, ...] = ()

    def __post_init__(self) -> None:
        self.policy = _policy_of(self.policies, self.alias)

    def run(self) -> Self:
        """Take one step after the other, until one refuses.

        Raises:
            ConflictError: somebody else has changed the alias meanwhile; run it again.
        """
        for take in (_select, _validate, _compare, _promote, _tell):
            step = take(self)
            if step is not None:
                self.steps.append(step)
                self.outcome, self.reasons = step.outcome or self.outcome, step.reasons
                if step.ends:
                    break
        return self

    @property
    def rule(self) -> str:
        """The condition and the ranking of the policy."""
        ranked = ", ".join(f"{mode} {name}" for name, mode in self.policy.by.items())
        return f"{self.policy.select or 'all'}; {ranked}"

    @property
    def chosen(self) -> tuple[Checkpoint, Proposal]:
        """The candidate and its proposal, which every step after the selection has."""
        assert self.candidate is not None
        assert self.proposal is not None
        return self.candidate, self.proposal

    def propose(self, candidate: Checkpoint) -> None:
        """Look at the candidate as it is now."""
        self.candidate = candidate
        self.proposal = propose(
            self.repository,
            f"{candidate.run}/{candidate.id}",
            self.alias,
            policy=self.policy,
            by=self.by,
            to_be_signed=self.private_key is not None,
            clock=self.clock,
        )

    def run_validation(self, ref: str) -> None:
        """Validate a checkpoint as the policy asks."""
        self.progress(f"validate {ref}")
        policy, progress = self.policy, self.progress
        self.validate(self.repository, ref, policy.wanted, alias=self.alias, timeout=policy.timeout, progress=progress)

    def refuse(self, reasons: tuple[str, ...]) -> Step:
        """End the release."""
        candidate, proposal = self.chosen
        self.id = _id(self.policy, proposal)
        summary = f"{candidate.ref} was not promoted to {self.alias}"
        return Step(name="promote", said=summary, outcome="refused", reasons=reasons)


def _policy_of(policies: Policies, alias: str) -> Policy:
    policy = policies.of(alias)
    if policy is None or not policy.rank:
        lacks = "has no table" if policy is None else "says nothing of what to select in the table"
        begin = "" if policies.text else "; the file begins with format = 1"
        lacks = lacks if policies.text else "does not exist, and so has no table"
        tables = (", ".join(policies.content) or "none") + did_you_mean(alias, list(policies.content))
        quoted = alias if alias.replace("_", "").replace("-", "").isalnum() else f'"{alias}"'
        raise ConfigError(
            f"{policies.where} {lacks} [{quoted}]: a release needs select = '...' and "
            f'rank = ["max METRIC"] there{begin}; tables: {tables}'
        )
    return policy


def _id(policy: Policy, proposal: Proposal) -> str:
    newest = "" if proposal.newest is None else proposal.newest.digest
    validation = "" if proposal.validation is None else proposal.validation.digest
    facts = (policy.alias, policy.digest, proposal.target.ref, newest, validation, *proposal.refusals)
    return digest("\n".join(facts).encode())[:16]


# --- select -------------------------------------------------------------------------------------------------------

_NAMED = 3  # checkpoints that were passed over and are named


def _select(release: Release) -> Step:
    """Select the best checkpoint that the policy finds and that was not rolled back.

    What the alias was rolled back from comes back by hand only. As long as a rollback is the last change, so does
    everything that was there before it: somebody is at work on an incident, and knows why.
    """
    release.progress("select")
    catalogue = Catalogue(release.repository, release.catalogue)
    catalogue.prove()
    policy = release.policy
    rolled_back, last = _rollbacks(release)
    top = None if rolled_back or last else 1
    query = SelectionQuery(query=parse(policy.select), keys=ranking_keys(policy.by), top=top, within=policy.within_se)
    selection = catalogue.select(query)
    passed_over: list[Step] = []
    for candidate in selection:
        reason = _passed_over(candidate, rolled_back, last)
        if reason is None:
            break
        passed_over.append(Step(name="select", said=f"passed over {candidate.ref}: {reason}"))
    else:
        candidate = None
    release.steps += passed_over[:_NAMED]
    more = f"; {len(passed_over)} passed over" if passed_over else ""
    summary = (
        f"no checkpoint matches {release.rule}{more}" if candidate is None else f"{candidate.ref} by {release.rule}"
    )
    if selection.unread:
        unread = tuple(f"{name} cannot be read, and may be better: {why}" for name, why in selection.unread.items())
        return Step(name="select", said=summary, outcome="refused", reasons=unread)
    if candidate is None:
        reasons = ("no checkpoint meets the condition of the policy",)
        return Step(name="select", said=summary, outcome="nothing fits", reasons=reasons)
    release.propose(candidate)
    return Step(name="select", said=summary)


def _rollbacks(release: Release) -> tuple[dict[str, AliasRecord], AliasRecord | None]:
    """The checkpoints that the alias was rolled back from, and the last change if that is a rollback.

    Raises:
        CorruptError: the history of the alias is damaged, and may hide a rollback.
    """
    store, alias = release.repository.store, release.alias
    if not aliases.numbers(store, alias):
        return {}, None
    history = aliases.history(store, alias)
    if history.damage:
        raise CorruptError(
            f"the history of {alias} is damaged and may hide a rollback: {history.damage[0]}. Promote by hand; "
            "peakpoint history lists the records that are left"
        )
    last = history.records[-1]
    return aliases.rolled_back(history.records), last if last.kind == "rolled back" else None


def _passed_over(candidate: Checkpoint, rolled_back: Mapping[str, AliasRecord], last: AliasRecord | None) -> str | None:
    """Why a candidate is passed over; None when it is not."""
    record = rolled_back.get(candidate.id)
    if record is not None:
        return f"rolled back at {record.at:%Y-%m-%d %H:%M} UTC by {record.by}: {record.why}"
    restored = last is not None and last.target is not None and last.target.checkpoint == candidate.id
    if last is None or restored or candidate.created_at > last.at:
        return None
    return "it is older than the last rollback"


def _validate(release: Release) -> Step | None:
    """Validate the candidate where that is missing, and the holder where it cannot be compared with otherwise."""
    candidate, proposal = release.chosen
    if proposal.unchanged:
        return None
    if proposal.refusals:
        return release.refuse(proposal.refusals)
    missing = stale(proposal, release.clock, failures=False)
    if missing and release.dry_run:
        summary = f"would validate {candidate.ref}: {'; '.join(missing)}"
        return Step(name="validate", said=summary, outcome="would validate")
    if not release.dry_run:
        if missing:
            release.run_validation(f"{candidate.run}/{candidate.id}")
        if (
            proposal.holder is not None
            and release.policy.improvement is not None
            and not _is_comparable(release, proposal.holder)
        ):
            release.run_validation(proposal.holder.ref)
        release.propose(candidate)
    _, proposal = release.chosen
    validation = proposal.validation
    if validation is None or proposal.unchanged:  # somebody else was faster
        return None
    failures = ", ".join(finding.check for finding in validation.failures)
    outcome = f"failed: {failures}" if failures else "passed"
    summary = f"validation {validation.number} of {validation.at:%Y-%m-%d %H:%M} UTC {outcome}"
    return Step(name="validate", said=summary)


def _is_comparable(release: Release, holder: AliasTarget) -> bool:
    """Whether the current holder was evaluated as the policy asks, so that a candidate can be compared with it."""
    try:
        validation = validations.newest(release.repository.store, holder.run, holder.checkpoint)
        release.repository.locate(holder.ref)
    except (CorruptError, FormatError):
        return False
    except NotFoundError:
        return True  # nothing can be done about it
    return validation is not None and validation.wanted.alike(with_golden(release.policy.wanted))


def _compare(release: Release) -> Step | None:
    """Put the comparison with the current holder into one line."""
    _, proposal = release.chosen
    comparison = proposal.comparison
    if proposal.unchanged:
        return None
    if comparison is None:
        return Step(name="compare", said=f"no other {release.alias} to compare with")
    improvement = release.policy.improvement
    pairs = [pair for pair in comparison.metrics if improvement is not None and pair.name == improvement.metric]
    texts = [f"{pair.name} {pair.champion:.6g} to {pair.candidate:.6g}" for pair in pairs or comparison.metrics[:1]]
    test = comparison.paired
    if test is not None:
        texts.append(f"{test.gained} gained and {test.lost} lost of {test.examples} examples")
    return Step(name="compare", said="; ".join([f"with {comparison.champion}", *texts]))


# --- promote and tell ---------------------------------------------------------------------------------------------


def _promote(release: Release) -> Step:
    """Promote the candidate, or refuse to."""
    candidate, proposal = release.chosen
    alias, reason = release.alias, release.why or f"released by the policy: {release.rule}"
    if proposal.unchanged:
        release.record = record = proposal.current
        assert record is not None
        release.id = record.release
        if not release.dry_run:
            promotion.promote(proposal, reason)  # completes what a release that was killed has left open
        summary = f"{candidate.ref} is {alias} since {record.at:%Y-%m-%d %H:%M} UTC (record {record.number})"
        return Step(name="promote", said=summary, outcome="unchanged")
    if proposal.objections or proposal.refusals:
        return release.refuse(proposal.refusals or proposal.objections)
    if release.dry_run:
        return Step(name="promote", said=f"would promote {candidate.ref} to {alias}", outcome="would promote")
    missing_signature = None if release.private_key is None else _sign(release, proposal, release.private_key)
    if missing_signature is not None:
        release.proposal = replace(proposal, refusals=(missing_signature,))
        return release.refuse((missing_signature,))
    release.progress("promote")
    steps = [{"name": step.name, "said": step.said} for step in release.steps]
    release.record = record = promotion.promote(
        proposal,
        reason,
        by=release.by,
        release=_id(release.policy, proposal),
        decision={"steps": steps, "policy": release.policies.text},
        clock=release.clock,
    )
    release.id = record.release
    summary = f"{candidate.ref} is {alias} now (record {record.number})"
    return Step(name="promote", said=summary, outcome="promoted")


def _sign(release: Release, proposal: Proposal, private_key: Path) -> str | None:
    """Sign the candidate, unless it is signed as the policy asks; returns why the policy still refuses it then."""
    manifest = proposal.manifest
    if release.policy.public_key is None or unsigned(release.repository, manifest, release.policy) is not None:
        release.progress("sign")
        signature = signing.sign(release.repository.store, manifest, private_key=private_key)
        release.steps.append(Step(name="sign", said=f"{signature.record} with the key {signature.fingerprint}"))
    return unsigned(release.repository, manifest, release.policy)


def _tell(release: Release) -> Step | None:
    """Tell the hooks of the change, unless all of them were told."""
    if release.dry_run or release.record is None:
        return None
    store = release.repository.store
    results = hooks.tell(store, release.record, release.policy, progress=release.progress, clock=release.clock)
    release.hook_results = tuple(results)
    lines = [Step(name="tell", said=f"{result.hook}: {result.error or 'notified'}") for result in results]
    release.steps.extend(lines[:-1])
    return lines[-1] if lines else None
