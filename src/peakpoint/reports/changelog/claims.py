"""Claims that rules gave up because another checkpoint took the place: computed, as no record holds them.

The recorded commits, measurements and removals are replayed with the rules that were in force. A rule is asked about
what it claims already and what is new: what it did not claim before cannot matter, by the laws of ``peakpoint.rules``.
So a commit costs what the rule takes to rank its own claims, and not the whole run. The rule looks at everything once
after a resume from an older checkpoint, the removal of a claimed one, or a change of rules. ``Every`` without ``keep``
gives nothing up as long as no branch was abandoned, and is not asked until then.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from peakpoint.rules import BestAtSparsity, Every, Moment, Reasons, Rule


@dataclass(frozen=True, slots=True)
class LostClaim:
    """The end of a rule's claim on one checkpoint.

    Attributes:
        rule: the rule's text.
        ranks: whether the rule ranks by a metric.
        checkpoint: the id of the checkpoint.
        reason: why the rule claimed it.
        successor: the id of the checkpoint that the rule claims instead; None without one.
        successor_reason: why it claims that one.
    """

    rule: str
    ranks: bool
    checkpoint: str
    reason: str
    successor: str | None
    successor_reason: str


@dataclass(slots=True)
class _TrackedRule:
    """A rule with its claims on what exists; None when it has to be asked about everything."""

    rule: Rule
    claims: Reasons | None = None

    @property
    def only_adds(self) -> bool:
        """Whether no commit ends a claim, as long as no branch was abandoned."""
        return isinstance(self.rule, Every) and self.rule.keep is None

    @property
    def metrics(self) -> set[str]:
        """The metrics that its claims depend on."""
        names = {name for name, _ in self.rule.ranks_by}
        return names | ({self.rule.sparsity} if isinstance(self.rule, BestAtSparsity) else set())

    def claims_on(self, existing: Mapping[str, Moment]) -> Reasons:
        """Return its claims; asks the rule only where they are not known."""
        if self.claims is None:
            self.claims = self.rule.claims(list(existing.values()))
        return self.claims


class ClaimTracker:
    """The claims of the rules in force, followed through a run."""

    def __init__(self) -> None:
        self._rules: list[_TrackedRule] = []
        self._existing: dict[str, Moment] = {}
        self._newest: Moment | None = None

    def set_rules(self, rules: Iterable[Rule]) -> None:
        """Put rules in force. The claims of the rules before end without a successor, and are not reported."""
        self._rules = [_TrackedRule(rule) for rule in rules]

    def add(self, moment: Moment) -> list[LostClaim]:
        """Add a checkpoint that was committed or restored; return the claims that this ends."""
        newest = self._newest
        follows = newest is not None and moment.sequence > newest.sequence and moment.forks == newest.forks
        lost_claims: list[LostClaim] = []
        for tracked in self._rules:
            if follows and tracked.only_adds and not moment.forks:
                tracked.claims = None
                continue
            claims_before = tracked.claims_on(self._existing)
            rivals = map(self._existing.__getitem__, claims_before) if follows else self._existing.values()
            tracked.claims = tracked.rule.claims([*rivals, moment])
            lost_claims += _lost_claims(tracked.rule, claims_before, tracked.claims, moment.id)
        self._existing[moment.id] = moment
        if newest is None or moment.sequence > newest.sequence:
            self._newest = moment
        return lost_claims

    def measure(self, checkpoint: str, metrics: Mapping[str, float | None]) -> list[LostClaim]:
        """Add or change metrics of an existing checkpoint, or remove those that are None; return the claims lost."""
        affected = [tracked for tracked in self._rules if not tracked.metrics.isdisjoint(metrics)]
        all_before = [tracked.claims_on(self._existing) for tracked in affected]
        moment = self._existing[checkpoint]
        self._existing[checkpoint] = replace(moment, metrics=changed_metrics(moment.metrics, metrics))
        lost_claims: list[LostClaim] = []
        for tracked, claims_before in zip(affected, all_before, strict=True):
            tracked.claims = tracked.rule.claims(list(self._existing.values()))
            lost_claims += _lost_claims(tracked.rule, claims_before, tracked.claims, checkpoint)
        return lost_claims

    def remove(self, checkpoint: str) -> None:
        """Remove a checkpoint."""
        removed = self._existing.pop(checkpoint, None)
        was_newest = removed is not None and removed is self._newest
        if was_newest:
            self._newest = max(self._existing.values(), key=lambda moment: moment.sequence, default=None)
        for tracked in self._rules:
            if was_newest or (tracked.claims is not None and checkpoint in tracked.claims):
                tracked.claims = None

    def moment(self, checkpoint: str) -> Moment | None:
        """Return what rules see of an existing checkpoint; None when it does not exist."""
        return self._existing.get(checkpoint)


def changed_metrics(metrics: Mapping[str, float], changes: Mapping[str, float | None]) -> dict[str, float]:
    """Return metrics after changes: new values, and None for what is there no more."""
    return {name: value for name, value in {**metrics, **changes}.items() if value is not None}


def _lost_claims(rule: Rule, old: Reasons, new: Reasons, cause: str) -> Iterator[LostClaim]:
    """Compare the claims of a rule before and after something became of the checkpoint ``cause``."""
    gained = [checkpoint for checkpoint in new if checkpoint not in old]
    successor = cause if cause in new else next(iter(gained), None)
    successor_reason = "" if successor is None else new[successor]
    for checkpoint, reason in old.items():
        if checkpoint not in new:
            yield LostClaim(rule.text, bool(rule.ranks_by), checkpoint, reason, successor, successor_reason)
