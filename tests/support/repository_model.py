"""What a repository must hold, as plain dictionaries: repository/test_state_machine.py plays beside it.

A checkpoint is in one of three places: here with some of its parts, in the trash, or gone. A verb that ends says where
each checkpoint is after it; a verb that was cut short leaves each where it was or where it was to be. ``may`` holds
these alternatives until somebody has looked.
"""

import math
from dataclasses import dataclass, field
from datetime import datetime

PARTS = frozenset({"model", "optimizer"})
KEEPS = 3  # former holders of an alias that stay
TRASH, GONE = ("trash", frozenset()), ("gone", frozenset())


def here(parts):
    return ("here", frozenset(parts))


@dataclass(eq=False)
class Checkpoint:
    run: str
    value: int  # what its tensors hold
    step: int
    metrics: dict
    reported: dict = field(
        default_factory=dict
    )  # what the training said, which counts again when a record is taken back
    recorded: bool = False
    asked: bool = False
    id: str = ""
    name: str = ""
    sequence: int = 0
    place: tuple = field(default_factory=lambda: here(PARTS))
    left: frozenset = PARTS  # the parts that it would come back with
    until: datetime | None = None
    pinned: bool = False
    may: set = field(default_factory=set)
    may_be_pinned: set = field(default_factory=set)

    @property
    def parts(self):
        return self.place[1]

    @property
    def acc(self):
        return self.metrics.get("acc", math.nan)

    def becomes(self, *places, cut_short):
        self.may |= {*places, *([self.place] if cut_short or not places else [])}

    def becomes_pinned(self, pinned, *, cut_short):
        self.may_be_pinned |= {pinned, self.pinned} if cut_short else {pinned}

    def is_seen(self, place):
        """Where somebody has found it; an error when it cannot be there."""
        possible = self.may or {self.place}
        assert place in possible, f"{self.run}/{self.name} ({self.id}) is {place}, and must be one of {possible}"
        if place[0] == "here":
            self.left = place[1]
        self.place, self.may = place, set()


def claims(rules, checkpoints):
    """Who is claimed by which rules, and the parts that each of them needs; None for all."""
    found = {}
    ordered = sorted(checkpoints, key=lambda one: one.sequence)
    for text in rules:
        kind, *rest = text.split(":")
        needs = None
        if rest[-1].startswith("parts="):
            needs = frozenset(rest.pop()[len("parts=") :].split("+"))
        able = [one for one in ordered if math.isfinite(one.acc)]
        by_acc = sorted(able, key=lambda one: (-one.acc, one.sequence))
        match kind:
            case "best":
                claimed = by_acc[:1]
            case "topk":
                claimed = by_acc[: int(rest[-1])]
            case "last":
                claimed = ordered[-int(rest[-1]) :]
        for one in claimed:
            found.setdefault(one, []).append(needs)
    return found


@dataclass
class Model:
    rules: dict = field(default_factory=dict)  # of each run, texts
    may_be_rules: dict = field(default_factory=dict)
    checkpoints: dict = field(default_factory=dict)  # by id; the gone ones, too
    pending: list = field(default_factory=list)  # what a training that was cut short may have saved
    archived: dict = field(default_factory=dict)  # run to whether its files are in packs
    may_be_archived: dict = field(default_factory=dict)
    aliases: dict = field(default_factory=dict)  # name to (id or None, number that it stands for) of each record
    about: list = field(default_factory=list)  # ids that a promotion that was cut short may protect

    def here(self, run=None):
        """What exists, the earliest first."""
        there = [one for one in self.checkpoints.values() if one.place[0] == "here" and run in (None, one.run)]
        return sorted(there, key=lambda one: (one.run, one.sequence))

    def in_trash(self, run):
        return [one for one in self.checkpoints.values() if one.place == TRASH and one.run == run]

    def newest_whole(self, run):
        whole = [one for one in self.here(run) if one.parts == PARTS]
        return whole[-1] if whole else None

    def holder(self, alias):
        """The id that an alias points at; None when it points at nothing."""
        records = self.aliases.get(alias, ())
        return records[-1][0] if records else None

    def way_back(self, alias):
        """The numbers and ids that a roll back can restore, the first that it would take first."""
        records = self.aliases[alias]
        at = records[-1][1]
        while at > 1:
            checkpoint, stands_for = records[at - 2]
            number, at = at - 1, stands_for
            if checkpoint is not None:
                yield number, checkpoint

    def aliased(self):
        """The ids that aliases protect."""
        found = set()
        for alias, records in self.aliases.items():
            held = records[-1][0]
            keeps = 0 if held is None else KEEPS
            found |= {held} - {None}
            found |= _first(keeps, [one[0] for one in reversed(records[:-1])], held)
            found |= _first(keeps, [checkpoint for _, checkpoint in self.way_back(alias)], held)
        return found

    def protected(self, existing):
        """Of what exists in a run, what stays whatever the rules say."""
        aliased = self.aliased()
        whole = [one for one in existing if one.parts == PARTS]
        ends = {max(some, key=lambda one: one.sequence) for some in (existing, whole) if some}
        return ends | {one for one in existing if one.asked or one.pinned or one.id in aliased}

    def retained(self, existing, rules):
        """What rules leave: each checkpoint that stays, with the parts that stay."""
        claimed, protected = claims(rules, existing), self.protected(existing)
        stays = {}
        for one in existing:
            needs = claimed.get(one)
            if one in protected:
                stays[one] = one.parts
            elif needs is not None:
                wanted = None if None in needs else frozenset().union(*needs)
                stays[one] = one.parts if wanted is None or not wanted & one.parts else one.parts & wanted
        return stays

    def applies(self, existing, rules, *, cut_short, at_once=None):
        """Say what becomes of what exists in a run when rules are applied.

        Args:
            existing: what exists.
            rules: texts.
            cut_short: whether it may not have been done.
            at_once: whether what goes is gone at once, or in the trash; None where both may be.
        """
        stays = self.retained(existing, rules)
        ends = {None: (GONE, TRASH), True: (GONE,), False: (TRASH,)}[at_once]
        for one in existing:
            places = (here(stays[one]),) if one in stays else ends
            one.becomes(*places, cut_short=cut_short or one.id in self.about)


def _first(count, ids, held):
    found = set()
    for one in ids:
        if len(found) >= count:
            break
        found |= {one} - {None, held}
    return found
