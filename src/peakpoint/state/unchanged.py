"""Which tensors of a part stand still from save to save: they stand in a file of their own, to be written once.

What is found here is evidence: version counters, optimizers, the digests of what was committed. It says in which file
a tensor goes, and which files are worth comparing with those of the checkpoint before. Whether a file is shared is
decided by its digest alone, so a wrong guess costs a write and never a byte.
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
        sizes: name to bytes, of all that have any.
        frozen: those that are parameters which no optimizer steps on.
        stepped: those that optimizers step on. Fused optimizers change them behind the back of the version counters.
    """

    names: tuple[str, ...]
    sizes: Mapping[str, int]
    frozen: frozenset[str] = NO_TENSORS
    stepped: frozenset[str] = NO_TENSORS

    @property
    def frozen_apart(self) -> frozenset[str]:
        """The frozen ones, if they are worth a file."""
        return self.frozen if _bytes(self.frozen, self.sizes) >= WORTH_A_FILE else NO_TENSORS


class UnchangedTensors:
    """What stands still in one part.

    A tensor is expected to be what it was when its version counter has not moved, unless optimizers step on it, or when
    its digest was the same in so many checkpoints. It is expected to change when its counter has moved which used to
    stand still. Counters that were wrong once are not listened to again. A tensor that changes leaves the file of those
    that stand still, and from then on tensors must have stood still twice as long to be in it: in n saves, tensors
    leave at most ``1 + log2(n)`` times. When none leaves, tensors come in as soon as what was written in vain for them
    is worth writing the whole file again.

    Attributes:
        apart: what stands in the file of its own.
        calm: whether everything else is expected to be what it was.
    """

    def __init__(self) -> None:
        self.apart = NO_TENSORS
        self.calm = False
        self._digests: Mapping[str, str] = {}  # in the last commit
        self._still: dict[str, int] = {}  # commits in a row in which a digest was that of the commit before
        self._changed: AbstractSet[str] = NO_TENSORS  # in the last commit
        self._deaf: AbstractSet[str] = NO_TENSORS  # whose version counters have been wrong
        self._honest: AbstractSet[str] = NO_TENSORS  # whose version counters have stood still with the digests
        self._left: AbstractSet[str] = NO_TENSORS  # frozen ones that have changed all the same
        self._patience = 1
        self._place: object = None  # as of the last commit
        self._versions: Sequence[int] = ()
        self._seen: tuple[object, Sequence[int]] = (None, ())  # as of the last capture
        self._untouched: AbstractSet[str] = NO_TENSORS  # between the last commit and the last capture
        self._listened = False  # whether all others are known to have been written to

    def inherit(self, digests: Mapping[str, str], apart: AbstractSet[str], shared: AbstractSet[str]) -> None:
        """Go on from a checkpoint of an earlier process.

        Args:
            digests: of all tensors of the part.
            apart: those that stood in the file of their own.
            shared: those in files that were shared with a checkpoint before.
        """
        self._digests, self.apart, self._still = digests, frozenset(apart), dict.fromkeys(shared, 1)

    def decide(self, facts: PartTensors, place: object, versions: Sequence[int]) -> None:
        """Say what is expected to be what it was in the last commit: sets ``apart`` and ``calm``.

        Args:
            facts: about the tensors.
            place: the same object as long as all tensors are where they were; None when that is not known.
            versions: the version counters of ``facts.names``, negative for tensors without one.
        """
        names = facts.sizes.keys()
        self._listen(facts, place, versions)
        if not (self._untouched or self._still or self.apart or facts.frozen):
            self.calm = not names
            return  # everything moves: the usual case, decided quickly
        touched = names - self._untouched if self._listened else NO_TENSORS
        quiet = (self._untouched - self._deaf - facts.stepped) & names
        moving = (touched & self._honest) | (self._changed - quiet)
        standing = ((quiet | self._still.keys()) - moving) & names
        self._left = self._left | (facts.frozen & moving)
        frozen = facts.frozen - self._left
        apart = self.apart & names
        staying = apart - moving
        if staying == apart and not names - apart - standing - frozen:
            self.apart, self.calm = apart, True  # nothing moves, so nothing has to move
            return
        if not apart - facts.frozen <= staying:
            self._patience *= 2
        counts = {name: self._still.get(name, 0) + (name in quiet) for name in standing}
        together = frozenset(frozen | {name for name, count in counts.items() if count >= self._patience})
        if staying == apart:  # the file stays as it is unless enough comes in
            in_vain = sum(facts.sizes[name] * max(1, counts.get(name, 0)) for name in together - staying)
            together = staying | together if in_vain >= _bytes(staying, facts.sizes) else staying
        self.apart = together if _bytes(together, facts.sizes) >= WORTH_A_FILE else NO_TENSORS
        self.calm = not names - self.apart - standing - frozen

    def _listen(self, facts: PartTensors, place: object, versions: Sequence[int]) -> None:
        """Compare the version counters with those of the last commit."""
        self._seen, before, self._untouched = (place, versions), self._versions, NO_TENSORS
        self._listened = place is not None and place is self._place
        if self._listened and any(map(operator.eq, versions, before)):
            compared = zip(facts.names, versions, before, strict=True)
            self._untouched = {name for name, now, then in compared if now == then >= 0}

    def learn(self, digests: Mapping[str, str]) -> None:
        """What was captured last has been committed, and these are the digests of all tensors."""
        before = self._digests
        same = {name for name, digest in digests.items() if before.get(name) == digest}
        self._changed = (digests.keys() & before.keys()) - same
        self._still = {name: self._still.get(name, 0) + 1 for name in same}
        overwritten = same - self._untouched if self._listened else NO_TENSORS  # with what they were
        self._deaf = self._deaf | (self._untouched & self._changed) | overwritten
        self._honest = (self._honest | (self._untouched & same)) - self._deaf
        self._digests = digests
        self._place, self._versions = self._seen


def _bytes(names: AbstractSet[str], sizes: Mapping[str, int]) -> int:
    return sum(sizes[name] for name in names)
