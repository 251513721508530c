"""The tensors of a part that do not change from save to save: a file of their own is written once.

The evidence is version counters, optimizers, and the digests of what was committed. It decides in which file a tensor
goes, and which files are worth comparing with those of the checkpoint before. Whether a file is shared is decided by
its digest alone, so a wrong guess costs a write and never a byte.
"""

import operator
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

WORTH_A_FILE = 64 * 1024  # bytes
NO_TENSORS: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class PartTensors:
    """The tensors of a part, as long as they are where they are.

    Attributes:
        names: all of them.
        sizes: name to bytes, of all that are not empty.
        frozen: those that are parameters which no optimizer steps on.
        stepped: those that optimizers step on. Fused optimizers change them without moving the version counters.
    """

    names: tuple[str, ...]
    sizes: Mapping[str, int]
    frozen: frozenset[str] = NO_TENSORS
    stepped: frozenset[str] = NO_TENSORS

    @property
    def separate_frozen(self) -> frozenset[str]:
        """The frozen ones, if they are worth a file."""
        return self.frozen if self.bytes_of(self.frozen) >= WORTH_A_FILE else NO_TENSORS

    def bytes_of(self, names: AbstractSet[str]) -> int:
        """Return how many bytes some of the tensors have."""
        return sum(self.sizes[name] for name in names)


class UnchangedTensors:
    """The tensors of one part that are expected to be what they were.

    A tensor is expected not to have changed when its version counter has not moved, unless optimizers step on it, or
    when its digest was the same in enough checkpoints. It is expected to have changed when its counter has moved and
    used to agree with the digests. Counters that were wrong once are ignored from then on. A tensor that changes leaves
    the separate file, and from then on tensors must have been the same twice as long to be in it: in n saves, tensors
    leave at most ``1 + log2(n)`` times. When none leaves, tensors come in as soon as what was written in vain for them
    is worth writing the whole file again.

    Attributes:
        separate: the tensors in a file of their own.
        rest_unchanged: whether all other tensors are expected to be what they were.
    """

    def __init__(self) -> None:
        self.separate = NO_TENSORS
        self.rest_unchanged = False
        self._digests: Mapping[str, str] = {}  # in the last commit
        self._same_commits: dict[str, int] = {}  # commits in a row in which a digest was that of the commit before
        self._changed: AbstractSet[str] = NO_TENSORS  # in the last commit
        self._wrong_counters: AbstractSet[str] = NO_TENSORS
        self._right_counters: AbstractSet[str] = NO_TENSORS  # have stood still together with the digests
        self._changed_frozen: AbstractSet[str] = NO_TENSORS
        self._required_commits = 1  # without a change, to get into the separate file
        self._committed: tuple[object, Sequence[int]] = (None, ())  # placement and version counters
        self._captured: tuple[object, Sequence[int]] = (None, ())
        self._same_counters: AbstractSet[str] = NO_TENSORS  # between the last commit and the last capture
        self._comparable_counters = False

    def inherit(self, digests: Mapping[str, str], separate: AbstractSet[str], shared: AbstractSet[str]) -> None:
        """Go on from a checkpoint of an earlier process.

        Args:
            digests: of all tensors of the part.
            separate: those that were in the separate file.
            shared: those in files that were shared with a checkpoint before.
        """
        self._digests, self.separate, self._same_commits = digests, frozenset(separate), dict.fromkeys(shared, 1)

    def decide(self, tensors: PartTensors, placement: object, versions: Sequence[int]) -> None:
        """Set ``separate`` and ``rest_unchanged`` from what is expected not to have changed since the last commit.

        Args:
            placement: the same object as long as all tensors are where they were; None when that is not known.
            versions: the version counters of ``tensors.names``, negative for tensors without one.
        """
        names = tensors.sizes.keys()
        self._compare_counters(tensors, placement, versions)
        if not (self._same_counters or self._same_commits or self.separate or tensors.frozen):
            self.rest_unchanged = not names
            return  # everything changes: the usual case, decided quickly
        touched = names - self._same_counters if self._comparable_counters else NO_TENSORS
        untouched = (self._same_counters - self._wrong_counters - tensors.stepped) & names
        changing = (touched & self._right_counters) | (self._changed - untouched)
        unchanged = ((untouched | self._same_commits.keys()) - changing) & names
        self._changed_frozen = self._changed_frozen | (tensors.frozen & changing)
        frozen = tensors.frozen - self._changed_frozen
        separate = self.separate & names
        staying = separate - changing
        if staying == separate and not names - separate - unchanged - frozen:
            self.separate, self.rest_unchanged = separate, True
            return
        if not separate - tensors.frozen <= staying:
            self._required_commits *= 2
        commits = {name: self._same_commits.get(name, 0) + (name in untouched) for name in unchanged}
        joined = frozenset(frozen | {name for name, count in commits.items() if count >= self._required_commits})
        if staying == separate:  # the file stays as it is unless enough comes in
            in_vain = sum(tensors.sizes[name] * max(1, commits.get(name, 0)) for name in joined - staying)
            joined = staying | joined if in_vain >= tensors.bytes_of(staying) else staying
        self.separate = joined if tensors.bytes_of(joined) >= WORTH_A_FILE else NO_TENSORS
        self.rest_unchanged = not names - self.separate - unchanged - frozen

    def _compare_counters(self, tensors: PartTensors, placement: object, versions: Sequence[int]) -> None:
        """Compare the version counters with those of the last commit."""
        committed_placement, committed = self._committed
        self._captured, self._same_counters = (placement, versions), NO_TENSORS
        self._comparable_counters = placement is not None and placement is committed_placement
        if self._comparable_counters and any(map(operator.eq, versions, committed)):
            compared = zip(tensors.names, versions, committed, strict=True)
            self._same_counters = {name for name, now, then in compared if now == then >= 0}

    def learn(self, digests: Mapping[str, str]) -> None:
        """Compare the digests of all tensors, after what was captured last has been committed."""
        same = {name for name, digest in digests.items() if self._digests.get(name) == digest}
        self._changed = (digests.keys() & self._digests.keys()) - same
        self._same_commits = {name: self._same_commits.get(name, 0) + 1 for name in same}
        # counters that moved although the tensor was overwritten with the values that it had
        overwritten = same - self._same_counters if self._comparable_counters else NO_TENSORS
        self._wrong_counters = self._wrong_counters | (self._same_counters & self._changed) | overwritten
        self._right_counters = (self._right_counters | (self._same_counters & same)) - self._wrong_counters
        self._digests, self._committed = digests, self._captured
