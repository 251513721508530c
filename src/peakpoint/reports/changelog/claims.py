"""Claims that rules have given up, because another checkpoint took the place: computed, as nobody records them.

The recorded commits, measurements and removals are played again with the rules that were in force, as in
``peakpoint.reports.explain``. A rule is asked among what it claims already and what is new: what it did not claim
before cannot matter, by the laws of ``peakpoint.rules``. So a commit costs what the rule takes to rank its own claims,
and not the whole run; where a run was resumed from an older checkpoint, a claimed one was removed, or the rules have
changed, the rule looks at everything once. ``Every`` without ``keep`` gives nothing up as long as nothing was
abandoned, and is not asked until then.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from peakpoint.rules import BestAtSparsity, Every, Moment, Reasons, Rule


@dataclass(frozen=True, slots=True)
class Passed:
    """A rule claims one checkpoint no more.

    Attributes:
        rule: the rule's text.
        ranks: whether it ranks by a metric.
        lost: id of the checkpoint that it claimed.
        was: why it did.
        taker: id of the one that it claims instead; None when it claims none instead.
        reason: why it claims that.
    """

    rule: str
    ranks: bool
    lost: str
    was: str
    taker: str | None
    reason: str


@dataclass(slots=True)
class _Asked:
    """A rule, and what it claims among what exists; None when it has to be asked anew."""

    rule: Rule
    claimed: Reasons | None = None

    @property
    def only_adds(self) -> bool:
        """Whether no commit takes a claim away, as long as no branch was abandoned."""
        return isinstance(self.rule, Every) and self.rule.keep is None

    @property
    def metrics(self) -> set[str]:
        """The metrics whose values decide."""
        names = {name for name, _ in self.rule.ranks_by}
        return names | ({self.rule.sparsity} if isinstance(self.rule, BestAtSparsity) else set())


class Claims:
    """The claims of the rules in force on what exists, followed through a run."""

    def __init__(self) -> None:
        self._asked: list[_Asked] = []
        self._there: dict[str, Moment] = {}
        self._newest: Moment | None = None

    def rules(self, rules: Iterable[Rule]) -> None:
        """From now on these rules are in force; claims that end with a rule are not passed to others."""
        self._asked = [_Asked(rule) for rule in rules]

    def add(self, moment: Moment) -> list[Passed]:
        """A checkpoint is there: it was committed, or brought back."""
        follows = (
            self._newest is not None and moment.sequence > self._newest.sequence and moment.forks == self._newest.forks
        )
        passed: list[Passed] = []
        for asked in self._asked:
            if follows and asked.only_adds and not moment.forks:
                asked.claimed = None
                continue
            before = self._claimed(asked)
            few = [*(self._there[one] for one in before), moment] if follows else [*self._there.values(), moment]
            asked.claimed = asked.rule.claims(few)
            passed += _passed(asked, before, moment.id)
        self._there[moment.id] = moment
        if self._newest is None or moment.sequence > self._newest.sequence:
            self._newest = moment
        return passed

    def measure(self, checkpoint: str, metrics: Mapping[str, float]) -> list[Passed]:
        """Values of a checkpoint that exists have been added, or changed."""
        old = self._there[checkpoint]
        self._there[checkpoint] = replace(old, metrics={**old.metrics, **metrics})
        passed: list[Passed] = []
        for asked in self._asked:
            if asked.metrics.isdisjoint(metrics):
                continue
            now, self._there[checkpoint] = self._there[checkpoint], old
            before = self._claimed(asked)
            self._there[checkpoint] = now
            asked.claimed = asked.rule.claims(list(self._there.values()))
            passed += _passed(asked, before, checkpoint)
        return passed

    def remove(self, checkpoint: str) -> None:
        """A checkpoint is gone."""
        gone = self._there.pop(checkpoint, None)
        newest = gone is not None and gone is self._newest
        if newest:
            self._newest = max(self._there.values(), key=lambda one: one.sequence, default=None)
        for asked in self._asked:
            if newest or (asked.claimed is not None and checkpoint in asked.claimed):
                asked.claimed = None

    def moment(self, checkpoint: str) -> Moment | None:
        """What is known of a checkpoint that exists; None when there is none of that id."""
        return self._there.get(checkpoint)

    def __contains__(self, checkpoint: str) -> bool:
        return checkpoint in self._there

    def _claimed(self, asked: _Asked) -> Reasons:
        if asked.claimed is None:
            asked.claimed = asked.rule.claims(list(self._there.values()))
        return asked.claimed


def _passed(asked: _Asked, before: Reasons, cause: str) -> Iterator[Passed]:
    now = asked.claimed
    assert now is not None
    lost = [one for one in before if one not in now]
    gained = [one for one in now if one not in before]
    taker = cause if cause in now else gained[0] if gained else None
    for one in lost:
        yield Passed(
            asked.rule.text, bool(asked.rule.ranks_by), one, before[one], taker, "" if taker is None else now[taker]
        )
