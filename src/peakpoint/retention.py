"""Retention: which checkpoints stay and which go, with reasons. First a plan, then its application."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any

from peakpoint.dropping import drop, without
from peakpoint.errors import StoreError
from peakpoint.format.events import PartsDropped, Removed, Undone
from peakpoint.format.manifest import Manifest
from peakpoint.journal import Journal
from peakpoint.rules import Budget, Claim, Record, Rule, claims
from peakpoint.store import Store
from peakpoint.trash import discard
from peakpoint.writer import remove

NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Removal:
    """One checkpoint that goes.

    Attributes:
        manifest: which.
        reason: one sentence.
    """

    manifest: Manifest
    reason: str


@dataclass(frozen=True, slots=True)
class Thinning:
    """Parts of a checkpoint that go while the rest stays.

    Attributes:
        manifest: which checkpoint.
        parts: the names of the parts that go.
        reason: one sentence.
    """

    manifest: Manifest
    parts: tuple[str, ...]
    reason: str

    @property
    def left(self) -> Manifest:
        """What is left of the checkpoint."""
        return without(self.manifest, self.parts)

    @property
    def freed_bytes(self) -> int:
        """Bytes of the files that go."""
        return self.manifest.size_bytes - self.left.size_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """What stays and what goes.

    Attributes:
        keep: id to the claims and protections that keep a checkpoint.
        remove: what goes, oldest first.
        drop: what loses parts, oldest first.
    """

    keep: Mapping[str, tuple[Claim, ...]]
    remove: tuple[Removal, ...]
    drop: tuple[Thinning, ...] = ()

    @property
    def freed_bytes(self) -> int:
        """Bytes of the files that go."""
        dropped = sum(thinning.freed_bytes for thinning in self.drop)
        return dropped + sum(removal.manifest.size_bytes for removal in self.remove)


NEWEST = Claim("protection:newest", "the newest: the run continues from here")


def protections(
    manifests: Sequence[Manifest],
    pinned: Mapping[str, str],
    cut: Collection[str] = (),
    read: Collection[str] = (),
    aliased: Mapping[str, str] = NOTHING,
) -> dict[str, tuple[Claim, ...]]:
    """What stays whatever the rules say.

    That is the newest, what was saved on request, what is pinned, what an alias points at, what is being read.

    When the newest has lost parts (``cut``), also the newest that has not.
    """
    found: dict[str, tuple[Claim, ...]] = {}
    newest = max(manifests, key=lambda manifest: manifest.sequence, default=None)
    whole = [manifest for manifest in manifests if manifest.id not in cut]
    continued = max(whole, key=lambda manifest: manifest.sequence, default=None)
    for manifest in manifests:
        why = []
        if manifest.asked is not None:
            why.append(Claim("protection:asked", f"saved on request: {manifest.asked}"))
        if manifest.id in pinned:
            why.append(Claim("protection:pinned", f"pinned: {pinned[manifest.id]}"))
        if manifest.id in aliased:
            why.append(Claim("protection:aliased", aliased[manifest.id]))
        if manifest.id in read:
            why.append(Claim("protection:read", "somebody is reading it"))
        if manifest is newest:
            why.append(NEWEST if manifest is continued else Claim(NEWEST.rule, "the newest"))
        elif manifest is continued:
            why.append(Claim("protection:newest-whole", "the newest with all its parts: the run continues from here"))
        if why:
            found[manifest.id] = tuple(why)
    return found


def kept_ids(records: Sequence[Record], rules: Sequence[Rule], protected: Collection[str]) -> set[str]:
    """The ids of what stays."""
    claimed = claims(rules, records)
    stay = {*claimed, *protected}
    for rule in rules:
        if isinstance(rule, Budget):
            left = [record for record in records if record.id in stay]
            stay -= set(rule.exceeded(left, claimed, protected))
    return stay


def plan(
    manifests: Sequence[Manifest],
    rules: Sequence[Rule],
    pinned: Mapping[str, str] = NOTHING,
    *,
    damaged: Mapping[str, str] = NOTHING,
    cut: Collection[str] = (),
    read: Collection[str] = (),
    aliased: Mapping[str, str] = NOTHING,
) -> Plan:
    """Keep what a rule or a protection claims, as far as budgets allow; everything else goes.

    Pure and idempotent: a plan over what a plan has kept removes nothing.

    Args:
        manifests: every checkpoint that exists, with all that is known of its metrics.
        rules: the rules in force.
        pinned: ids that are pinned, with the reasons.
        damaged: ids that are known to be damaged, with what is wrong: they neither go nor count, so that a damaged
            best never costs a good one.
        cut: ids without some of their parts.
        read: ids that are being read at this moment.
        aliased: ids that an alias protects, with the reasons.
    """
    good = [manifest for manifest in manifests if manifest.id not in damaged]
    claimed, protected = claims(rules, good), protections(good, pinned, cut, read, aliased)
    drops = _drops(good, rules, claimed, protected)
    slim = {thinning.manifest.id: thinning.left for thinning in drops}
    stay = kept_ids([slim.get(manifest.id, manifest) for manifest in good], rules, protected.keys())
    texts = " ".join(rule.text for rule in rules) or "no rules"
    going = []
    for manifest in good:
        if manifest.id in stay:
            continue
        why = f"no rule claims it any more ({texts})"
        if manifest.id in claimed:
            count = len(claimed[manifest.id])
            budgets = ", ".join(rule.text for rule in rules if isinstance(rule, Budget))
            why = f"over the budget ({budgets}) and claimed least, by {count} rule{'s' if count > 1 else ''}"
        going.append(Removal(manifest, why))
    keep = {id: (*claimed.get(id, ()), *protected.get(id, ())) for id in stay}  # noqa: A001 - the vocabulary's word
    for manifest in manifests:
        if manifest.id in damaged:
            keep[manifest.id] = (Claim("protection:damaged", f"{damaged[manifest.id]}; rules leave it to you"),)
    return Plan(
        keep,
        tuple(sorted(going, key=lambda removal: removal.manifest.sequence)),
        tuple(thinning for thinning in drops if thinning.manifest.id in stay),
    )


def _drops(
    manifests: Sequence[Manifest],
    rules: Sequence[Rule],
    claimed: Mapping[str, Sequence[Claim]],
    protected: Collection[str],
) -> list[Thinning]:
    """What loses parts, oldest first, if it stays."""
    needs = {rule.text: rule.needs for rule in rules}
    drops = []
    for manifest in sorted(manifests, key=lambda manifest: manifest.sequence):
        if manifest.id in claimed and manifest.id not in protected:
            parts = _needless(manifest, [needs[claim.rule] for claim in claimed[manifest.id]])
            if parts:
                texts = ", ".join(claim.rule for claim in claimed[manifest.id])
                drops.append(
                    Thinning(manifest, parts, f"the rules that claim it do not need {', '.join(parts)} ({texts})")
                )
    return drops


_OURS = frozenset({"rng", "loop"})


def _needless(manifest: Manifest, needs: Sequence[tuple[str, ...] | None]) -> tuple[str, ...]:
    """The parts that none of the rules needs; nothing when a rule needs everything, or nothing that is there."""
    if any(parts is None for parts in needs):
        return ()
    wanted = {part for parts in needs if parts is not None for part in parts}
    if not wanted & manifest.parts.keys():
        return ()  # names of parts that do not exist: better to keep too much
    return tuple(part for part in manifest.parts if part not in wanted and part not in _OURS)


def apply(
    store: Store,
    journal: Journal,
    removals: Sequence[Removal],
    *,
    by: str,
    pinned: Callable[[], Collection[str]] = tuple,
    until: datetime | None = None,
) -> list[str]:
    """Remove, recording each reason durably before the first file goes.

    A checkpoint that cannot be removed stays and is tried again by the next plan. On a full disk what goes at once
    makes the room for its record.

    Args:
        store: where.
        journal: receives a ``Removed`` for each.
        removals: what goes.
        by: who decided, for the record.
        pinned: what is protected now, by a pin or an alias. Asked once the removals are recorded: whoever pins or
            promotes at the same time either sees the record, or is seen here.
        until: keep the files in the trash until then; None lets them go at once.

    Returns:
        One sentence for each removal that failed.
    """
    if not removals:
        return []
    recorded = _record(journal, removals, by, until)
    spared, failures = set(pinned()), []
    for removal in removals:
        if removal.manifest.id in spared:
            failures.append(f"{removal.manifest.name} stays: it is pinned, or an alias points at it")
            journal.record([_taken_back(journal, removal.manifest, (), by)], later=not recorded)
            continue
        try:
            if until is None:
                remove(store, removal.manifest)
            else:
                discard(store, removal.manifest, until=until, at=journal.now(), why=removal.reason, by=by)
        except StoreError as error:
            hint = f"; {_FOR_GOOD}" if error.is_full and until is not None else ""
            failures.append(f"{removal.manifest.name} could not be removed: {error}{hint}")
        if not recorded:  # others do not know yet of those that follow, and may protect them
            recorded, spared = journal.record((), later=True), set(pinned())
    if not recorded and len(failures) < len(removals):
        failures.append("the journal does not tell of this removal: the disk is full all the same; free some space")
    return failures


_FOR_GOOD = "removing for good, with --undo-for 0, needs no room"


def _record(journal: Journal, removals: Sequence[Removal], by: str, until: datetime | None) -> bool:
    """Record the reasons durably; where there is no room for that, as soon as a removal has made it.

    Returns:
        Whether they are recorded.
    """
    events = []
    for removal in removals:
        moment = {"step": removal.manifest.step, "epoch": removal.manifest.epoch}
        about = _about(removal.manifest, by) | moment
        events.append(Removed(at=journal.now(), **about, reason=removal.reason, until=until))
    try:
        return journal.record(events, later=until is None)
    except StoreError as error:
        if not error.is_full:
            raise
        raise StoreError(
            error.errno, f"nothing was removed, since the trash needs room: {error}; {_FOR_GOOD}"
        ) from error


def _about(manifest: Manifest, by: str) -> dict[str, Any]:
    return {"checkpoint": manifest.id, "name": manifest.name, "by": by}


def _taken_back(journal: Journal, manifest: Manifest, parts: tuple[str, ...], by: str) -> Undone:
    """Without it the journal would go on saying that the checkpoint is being removed, and it could not be pinned."""
    return Undone(at=journal.now(), **_about(manifest, by), parts=parts)


def thin(
    store: Store,
    journal: Journal,
    drops: Sequence[Thinning],
    *,
    by: str,
    pinned: Callable[[], Collection[str]] = tuple,
) -> tuple[dict[str, Manifest], list[str]]:
    """Drop parts, recording each reason durably before the first file goes; they cannot be brought back.

    Returns:
        The manifests as they are now, by id, and one sentence for each that failed.
    """
    changed: dict[str, Manifest] = {}
    failures = []
    for thinning in drops:
        about = _about(thinning.manifest, by)
        journal.append(PartsDropped(at=journal.now(), **about, parts=thinning.parts, reason=thinning.reason))
    if drops:
        journal.sync()
    spared = set(pinned()) if drops else set()
    for thinning in drops:
        if thinning.manifest.id in spared:
            failures.append(f"{thinning.manifest.name} stays whole: it is pinned, or an alias points at it")
            journal.append(_taken_back(journal, thinning.manifest, thinning.parts, by))
            continue
        try:
            changed[thinning.manifest.id] = drop(
                store, thinning.manifest, thinning.parts, at=journal.now(), why=thinning.reason, by=by
            )
        except StoreError as error:
            failures.append(f"parts of {thinning.manifest.name} could not be dropped: {error}")
    return changed, failures
