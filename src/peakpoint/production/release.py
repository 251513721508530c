"""A release: select, validate, compare and promote by a policy, as one step that can be repeated.

Every part leaves what it has found on record before the next one begins: the validation, the record of the alias, that
the hooks were told, the record of the release. A release that was killed in between is repeated by running it again:
what is on record is not done twice. Where everything is as it should be, a release changes nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from peakpoint.catalogue import Catalogue, SelectionQuery
from peakpoint.catalogue.query import parse
from peakpoint.catalogue.ranking import ranking_keys
from peakpoint.errors import ConfigError, ConflictError, CorruptError, FormatError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.manifest import Checkpoint
from peakpoint.format.names import did_you_mean
from peakpoint.format.sealed import FORMAT, digest, seal
from peakpoint.production import hooks, promotion
from peakpoint.production.hooks import HookResult
from peakpoint.production.policy import Policies, Policy
from peakpoint.production.proposal import Proposal, propose, stale, unsigned
from peakpoint.production.validation import with_golden
from peakpoint.repository import aliases, signing, validations
from peakpoint.repository.aliases import AliasRecord, AliasTarget
from peakpoint.repository.provenance import Clock, present_user, utc_now
from peakpoint.repository.releases import ReleaseRecord, Step
from peakpoint.repository.root import Repository
from peakpoint.repository.validations import Validation, ValidationSpec
from peakpoint.store import establish

ReleaseOutcome = Literal["promoted", "unchanged", "refused", "nothing fits", "would promote", "would validate"]


class Validate(Protocol):
    """Validates a checkpoint and records what it found."""

    def __call__(
        self,
        repository: Repository,
        ref: str,
        wanted: ValidationSpec,
        *,
        alias: str,
        timeout: float | None,
        progress: Callable[[str], None],
    ) -> Validation:
        """See ``peakpoint.production.validation.validate``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What a release did, or would do.

    Attributes:
        id: the same for the same candidate, holder, policy and validation; None when there was nothing to decide.
        alias: what was released to.
        outcome: in a word.
        steps: in their order.
        candidate: what was selected; None when nothing fits.
        proposal: what was decided on.
        record: of the alias, when it points at the candidate now.
        reasons: why not, a sentence each.
        hook_results: what became of the hooks.
    """

    id: str | None
    alias: str
    outcome: ReleaseOutcome
    steps: tuple[Step, ...]
    candidate: Checkpoint | None = None
    proposal: Proposal | None = None
    record: AliasRecord | None = None
    reasons: tuple[str, ...] = ()
    hook_results: tuple[HookResult, ...] = ()


def release(
    repository: Repository,
    alias: str,
    policies: Policies,
    validate: Validate,
    *,
    why: str = "",
    private_key: Path | None = None,
    dry_run: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    catalogue: str | None = None,
    clock: Clock = utc_now,
) -> Release:
    """Release the best checkpoint that a policy finds.

    Args:
        repository: where.
        alias: to what.
        policies: what ``production.toml`` says.
        validate: validates a candidate; see ``peakpoint.production.validation.validate``.
        why: the reason, for the record; the rule that selected it by default.
        private_key: sign what is promoted with this key, unless it is signed as the policy asks.
        dry_run: only say what would be done; nothing is validated or changed.
        progress: called with each thing that is about to be done.
        catalogue: where the index is; see ``Catalogue``.
        clock: tells the time.

    Raises:
        ConfigError: there is no policy for the alias, or it says nothing of what to select.
        ConflictError: somebody else has changed the alias meanwhile; run it again.
    """
    policy = _policy_of(policies, alias)
    work = _Release(repository, catalogue, policy, policies.text, validate, why, private_key, progress, clock)
    return work.run(dry_run=dry_run)


def _policy_of(policies: Policies, alias: str) -> Policy:
    policy = policies.of(alias)
    if policy is None or not policy.by:
        lacks = "has no table" if policy is None else "says nothing of what to select in the table"
        lacks = lacks if policies.text else "does not exist, and so has no table"
        have = (", ".join(policies.content) or "none") + did_you_mean(alias, list(policies.content))
        raise ConfigError(
            f"{policies.where} {lacks} [{_quoted(alias)}]: a release needs select = '...' and "
            f'rank = ["max METRIC"] there; tables: {have}'
        )
    return policy


_NAMED = 3  # checkpoints that were passed over


@dataclass(frozen=True, slots=True)
class _Since:
    """A roll back that is the last change.

    Attributes:
        at: when.
        id: of the checkpoint that came back.
    """

    at: datetime
    id: str


def _unread(unread: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{name} cannot be read, and may be better: {why}" for name, why in unread.items())


def _quoted(alias: str) -> str:
    """The name of a table in TOML."""
    return alias if alias.replace("_", "").replace("-", "").isalnum() else f'"{alias}"'


class _Release:
    def __init__(
        self,
        repository: Repository,
        catalogue: str | None,
        policy: Policy,
        text: str,
        validate: Validate,
        why: str,
        private_key: Path | None,
        progress: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self._repository, self._store, self._where = repository, repository.store, catalogue
        self._policy, self._text, self._alias = policy, text, policy.alias
        self._validate, self._why, self._progress, self._clock = validate, why, progress, clock
        self._by, self._private_key = present_user(), private_key
        self._steps: list[Step] = []
        self._rule = ""

    def _step(self, name: str, said: str) -> None:
        self._steps.append(Step(name=name, said=said))

    def _ends(self, outcome: ReleaseOutcome, **more: Any) -> Release:
        return Release(**({"id": None} | more), alias=self._alias, outcome=outcome, steps=tuple(self._steps))

    def run(self, *, dry_run: bool) -> Release:
        """Go through the steps."""
        candidate, unread = self._selected()
        if unread:
            return self._ends("refused", reasons=unread)
        if candidate is None:
            return self._ends("nothing fits", reasons=("no checkpoint meets the condition of the policy",))
        ref = f"{candidate.run}/{candidate.id}"
        proposal = self._proposal(ref)
        if proposal.unchanged:
            return self._unchanged(candidate, proposal, dry_run=dry_run)
        if proposal.refusals:
            return self._refused(candidate, proposal, dry_run=dry_run)
        missing = stale(proposal, self._clock, failures=False)
        if missing and dry_run:
            self._step("validate", f"would validate {candidate.ref}: {'; '.join(missing)}")
            return self._ends("would validate", candidate=candidate, proposal=proposal)
        if not dry_run:
            proposal = self._examined(ref, proposal, again=bool(missing))
            if proposal.unchanged:  # somebody else was faster
                return self._unchanged(candidate, proposal, dry_run=False)
        return self._decided(candidate, proposal, dry_run=dry_run)

    def _decided(self, candidate: Checkpoint, proposal: Proposal, *, dry_run: bool) -> Release:
        self._say_validation(proposal)
        self._say_comparison(proposal)
        if proposal.objections or proposal.refusals:
            return self._refused(candidate, proposal, dry_run=dry_run)
        if dry_run:
            self._step("promote", f"would promote {candidate.ref} to {self._alias}")
            return self._ends("would promote", candidate=candidate, proposal=proposal)
        if self._private_key is not None and (unsigned := self._sign(proposal, self._private_key)) is not None:
            return self._refused(candidate, replace(proposal, refusals=(unsigned,)), dry_run=False)
        return self._promoted(candidate, proposal)

    def _examined(self, ref: str, proposal: Proposal, *, again: bool) -> Proposal:
        """Validate the candidate where that is needed, and the holder where it could not be compared with otherwise."""
        held = proposal.holder
        if again:
            self._examine(ref)
        if held is not None and self._policy.improvement is not None and not self._is_comparable(held):
            self._examine(held.ref)
        return self._proposal(ref)

    def _sign(self, proposal: Proposal, private_key: Path) -> str | None:
        """Sign the candidate, unless it is signed as the policy asks; what the policy still says against it then."""
        store, manifest = self._store, proposal.manifest
        asked = self._policy.public_key
        if asked is None or unsigned(self._repository, manifest, self._policy) is not None:
            self._progress("sign")
            made = signing.sign(store, manifest, private_key=private_key)
            self._step("sign", f"{made.record} with the key {made.fingerprint}")
        return unsigned(self._repository, manifest, self._policy)

    def _selected(self) -> tuple[Checkpoint | None, tuple[str, ...]]:
        """The best that the policy finds, and what could not be read and may be better, a sentence each.

        What the alias was rolled back from comes back by hand only. As long as a roll back is what was done last, so
        does everything that was there before it: somebody is at work on an incident, and knows why.
        """
        self._progress("select")
        catalogue = Catalogue(self._repository, self._where)
        catalogue.prove()
        policy = self._policy
        ranked = ", ".join(f"{mode} {name}" for name, mode in policy.by.items())
        rule = self._rule = f"{policy.select or 'all'}; {ranked}"
        bad, since = self._rolled_back()
        top = None if bad or since else 1
        passed = 0
        wish = SelectionQuery(
            query=parse(policy.select), keys=ranking_keys(policy.by), top=top, within=policy.within_se
        )
        chosen = catalogue.select(wish)
        for candidate in chosen:
            back = bad.get(candidate.id)
            late = back is None and since is not None and candidate.created_at <= since.at and candidate.id != since.id
            if back is None and not late:
                self._step("select", f"{candidate.ref} by {rule}")
                return candidate, _unread(chosen.unread)
            passed += 1
            if passed <= _NAMED:
                when = f"{back.at:%Y-%m-%d %H:%M} UTC by {back.by}: {back.why}" if back else "it is older than that"
                self._step("select", f"passed over {candidate.ref}: {'rolled back at ' if back else ''}{when}")
        self._step("select", f"nothing by {rule}" + (f"; {passed} passed over" if passed else ""))
        return None, _unread(chosen.unread)

    def _rolled_back(self) -> tuple[dict[str, AliasRecord], "_Since | None"]:
        """What the alias was rolled back from; and since when nothing older may come, if it was rolled back last.

        Raises:
            CorruptError: the history of the alias does not tell.
        """
        if not aliases.numbers(self._store, self._alias):
            return {}, None
        history = aliases.history(self._store, self._alias)
        if history.damage:
            raise CorruptError(
                f"the history of {self._alias} is damaged, and may have told that something was rolled back: "
                f"{history.damage[0]}. Promote by hand; peakpoint history tells what is left"
            )
        last = history.records[-1]
        since = None
        if last.kind == "rolled back" and last.target is not None:
            since = _Since(last.at, last.target.checkpoint)
        return aliases.rolled_back(history.records), since

    def _proposal(self, ref: str) -> Proposal:
        return propose(
            self._repository,
            ref,
            self._alias,
            policy=self._policy,
            by=self._by,
            to_be_signed=self._private_key is not None,
            clock=self._clock,
        )

    def _examine(self, ref: str) -> None:
        self._progress(f"validate {ref}")
        self._validate(
            self._repository,
            ref,
            self._policy.wanted,
            alias=self._alias,
            timeout=self._policy.timeout,
            progress=self._progress,
        )

    def _is_comparable(self, held: AliasTarget) -> bool:
        """Whether the present holder was evaluated as the policy asks, so that a candidate can be compared with it."""
        try:
            last = validations.newest(self._store, held.run, held.checkpoint)
            self._repository.locate(held.ref)
        except (CorruptError, FormatError):
            return False
        except NotFoundError:
            return True  # nothing can be done about it
        return last is not None and last.wanted.alike(with_golden(self._policy.wanted))

    def _say_validation(self, proposal: Proposal) -> None:
        one = proposal.validation
        if one is not None:
            failed = f"failed: {', '.join(found.check for found in one.failures)}" if one.failures else "passed"
            self._step("validate", f"validation {one.number} of {one.at:%Y-%m-%d %H:%M} UTC {failed}")

    def _say_comparison(self, proposal: Proposal) -> None:
        found = proposal.comparison
        if found is None:
            self._step("compare", f"there is no other {self._alias} to compare with")
            return
        asked = self._policy.improvement
        pair = next((one for one in found.metrics if asked is not None and one.name == asked.metric), None)
        pairs = [pair] if pair is not None else list(found.metrics[:1])
        said = "".join(f"; {one.name} {one.champion:.6g} to {one.candidate:.6g}" for one in pairs)
        if found.paired is not None:
            said += f"; {found.paired.gained} gained and {found.paired.lost} lost of {found.paired.examples} examples"
        self._step("compare", f"with {found.champion}{said}")

    # --- ends

    def _id(self, proposal: Proposal) -> str:
        """The same whenever the same is decided: what was recorded by a release that was killed is found again."""
        present = "" if proposal.newest is None else proposal.newest.digest
        validation = "" if proposal.validation is None else proposal.validation.digest
        facts = (self._alias, self._policy.digest, proposal.target.ref, present, validation, *proposal.refusals)
        return digest("\n".join(facts).encode())[:16]

    def _unchanged(self, candidate: Checkpoint, proposal: Proposal, *, dry_run: bool) -> Release:
        """The alias points there already; what a release that was killed has left open is completed."""
        record = proposal.current
        assert record is not None
        said = f"{candidate.ref} is {self._alias} since {record.at:%Y-%m-%d %H:%M} UTC (record {record.number})"
        self._step("promote", said)
        told: tuple[HookResult, ...] = ()
        if not dry_run:
            promotion.promote(proposal, self._reason())
            told = self._told(record)
            if record.release is not None:
                self._note(record.release, "promoted", proposal, record)
        return self._ends(
            "unchanged", id=record.release, candidate=candidate, proposal=proposal, record=record, hook_results=told
        )

    def _refused(self, candidate: Checkpoint, proposal: Proposal, *, dry_run: bool) -> Release:
        reasons = proposal.refusals or proposal.objections  # before a validation, its absence is no reason
        release = self._id(proposal)
        self._step("promote", f"{candidate.ref} does not become {self._alias}")
        if not dry_run:
            self._note(release, "refused", proposal, None, reasons)
        return self._ends("refused", id=release, candidate=candidate, proposal=proposal, reasons=reasons)

    def _promoted(self, candidate: Checkpoint, proposal: Proposal) -> Release:
        self._progress("promote")
        release = self._id(proposal)
        record = promotion.promote(proposal, self._reason(), by=self._by, release=release, clock=self._clock)
        self._step("promote", f"{candidate.ref} is {self._alias} now (record {record.number})")
        told = self._told(record)
        release = record.release or release
        self._note(release, "promoted", proposal, record)
        return self._ends(
            "promoted", id=release, candidate=candidate, proposal=proposal, record=record, hook_results=told
        )

    def _reason(self) -> str:
        return self._why or f"released by the policy: {self._rule}"

    def _told(self, record: AliasRecord) -> tuple[HookResult, ...]:
        told = hooks.tell(self._store, record, self._policy, progress=self._progress, clock=self._clock)
        for one in told:
            self._step("tell", f"{one.hook}: {one.error or 'told'}")
        return tuple(told)

    def _note(
        self,
        release: str,
        outcome: str,
        proposal: Proposal,
        record: AliasRecord | None,
        reasons: tuple[str, ...] = (),
    ) -> None:
        """Put the release on record, unless it is: by this one before it was killed, or by another at the same time."""
        if self._store.size(layout.release_key(release)) is not None:
            return
        former = self._former(proposal, record)
        rests_on = None if proposal.validation is None else proposal.validation.digest
        content = ReleaseRecord(
            id=release,
            alias=self._alias,
            outcome=outcome,
            at=self._clock() if record is None else record.at,
            by=self._by if record is None else record.by,
            candidate=proposal.target,
            former=former,
            validation=rests_on if record is None else record.validation,
            record=None if record is None else record.number,
            steps=tuple(self._steps),
            reasons=reasons,
            policy=self._text,
        )
        try:
            establish(self._store, layout.release_key(release), seal({"format": FORMAT, **asdict(content)}))
        except ConflictError:
            return

    def _former(self, proposal: Proposal, record: AliasRecord | None) -> AliasTarget | None:
        """What the alias pointed at before."""
        if record is None or proposal.current is None or proposal.current.number != record.number:
            return proposal.holder
        return aliases.read(self._store, self._alias, record.number - 1).target if record.number > 1 else None
