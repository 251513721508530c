"""The plan of retention: which checkpoints stay, for which reasons, and which are removed."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from peakpoint.format.manifest import Manifest, without_parts
from peakpoint.format.names import OWN_PARTS
from peakpoint.rules import Budget, CheckpointRecord, Claim, Rule, claims

NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Removal:
    """The removal of a checkpoint, or of some parts of it.

    Attributes:
        manifest: which checkpoint.
        reason: one sentence.
        parts: the names of the parts that go while the others stay; empty when the whole checkpoint goes.
    """

    manifest: Manifest
    reason: str
    parts: tuple[str, ...] = ()

    @property
    def remaining(self) -> Manifest:
        """The manifest without these parts."""
        return without_parts(self.manifest, self.parts)

    @property
    def freed_bytes(self) -> int:
        """Bytes of the files that go."""
        return self.manifest.size_bytes - self.remaining.size_bytes


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """What stays and what goes.

    Attributes:
        keep: id to the claims and protections that keep a checkpoint.
        remove: what goes, oldest first.
        drop: what loses parts, oldest first.
    """

    keep: Mapping[str, tuple[Claim, ...]]
    remove: tuple[Removal, ...]
    drop: tuple[Removal, ...] = ()

    @property
    def freed_bytes(self) -> int:
        """Bytes of the files that go."""
        dropped = sum(removal.freed_bytes for removal in self.drop)
        return dropped + sum(removal.manifest.size_bytes for removal in self.remove)


NEWEST = Claim("protection:newest", "the newest: the run continues from here")


def protections(
    manifests: Sequence[Manifest],
    pinned: Mapping[str, str],
    incomplete: Collection[str] = (),
    being_read: Collection[str] = (),
    aliased: Mapping[str, str] = NOTHING,
) -> dict[str, tuple[Claim, ...]]:
    """Return the protections of checkpoints, which hold whatever the rules say.

    Protected are the newest, what was saved on request, what is pinned, what an alias points at, what is being read.
    When the newest has lost parts (``incomplete``), also the newest that has not.
    """
    claims_by_id: dict[str, tuple[Claim, ...]] = {}
    newest = max(manifests, key=lambda manifest: manifest.sequence, default=None)
    complete = [manifest for manifest in manifests if manifest.id not in incomplete]
    continued = max(complete, key=lambda manifest: manifest.sequence, default=None)
    for manifest in manifests:
        reasons = []
        if manifest.asked is not None:
            reasons.append(Claim("protection:asked", f"saved on request: {manifest.asked}"))
        if manifest.id in pinned:
            reasons.append(Claim("protection:pinned", f"pinned: {pinned[manifest.id]}"))
        if manifest.id in aliased:
            reasons.append(Claim("protection:aliased", aliased[manifest.id]))
        if manifest.id in being_read:
            reasons.append(Claim("protection:read", "somebody is reading it"))
        if manifest is newest:
            reasons.append(NEWEST if manifest is continued else Claim(NEWEST.rule, "the newest"))
        elif manifest is continued:
            reasons.append(
                Claim("protection:newest-whole", "the newest with all its parts: the run continues from here")
            )
        if reasons:
            claims_by_id[manifest.id] = tuple(reasons)
    return claims_by_id


def kept_ids(records: Sequence[CheckpointRecord], rules: Sequence[Rule], protected: Collection[str]) -> set[str]:
    """Return the ids of the checkpoints that stay."""
    claimed = claims(rules, records)
    staying = {*claimed, *protected}
    for rule in rules:
        if isinstance(rule, Budget):
            remaining = [record for record in records if record.id in staying]
            staying -= set(rule.exceeded(remaining, claimed, protected))
    return staying


def plan(
    manifests: Sequence[Manifest],
    rules: Sequence[Rule],
    pinned: Mapping[str, str] = NOTHING,
    *,
    damaged: Mapping[str, str] = NOTHING,
    cut: Collection[str] = (),
    read: Collection[str] = (),
    aliased: Mapping[str, str] = NOTHING,
) -> RetentionPlan:
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
    shrunk = {removal.manifest.id: removal.remaining for removal in drops}
    staying = kept_ids([shrunk.get(manifest.id, manifest) for manifest in good], rules, protected.keys())
    keep = {id: (*claimed.get(id, ()), *protected.get(id, ())) for id in staying}  # noqa: A001 - the vocabulary's word
    for id in damaged.keys() & {manifest.id for manifest in manifests}:  # noqa: A001
        keep[id] = (Claim("protection:damaged", f"{damaged[id]}; rules do not remove it, peakpoint rm does"),)
    removed = sorted(
        (manifest for manifest in good if manifest.id not in staying), key=lambda manifest: manifest.sequence
    )
    return RetentionPlan(
        keep,
        tuple(Removal(manifest, _removal_reason(rules, claimed.get(manifest.id, ()))) for manifest in removed),
        tuple(removal for removal in drops if removal.manifest.id in staying),
    )


def _removal_reason(rules: Sequence[Rule], claims: Sequence[Claim]) -> str:
    """Return why a checkpoint is removed although rules have ``claims`` on it, or because they have none."""
    if not claims:
        return f"no rule claims it any more ({' '.join(rule.text for rule in rules) or 'no rules'})"
    budgets = ", ".join(rule.text for rule in rules if isinstance(rule, Budget))
    return f"over the budget ({budgets}) and claimed least, by {len(claims)} rule{'s' if len(claims) > 1 else ''}"


def _drops(
    manifests: Sequence[Manifest],
    rules: Sequence[Rule],
    claimed: Mapping[str, Sequence[Claim]],
    protected: Collection[str],
) -> list[Removal]:
    """Return the removals of parts, oldest first, of checkpoints that may stay."""
    needs = {rule.text: rule.needs for rule in rules}
    drops = []
    for manifest in sorted(manifests, key=lambda manifest: manifest.sequence):
        if manifest.id in claimed and manifest.id not in protected:
            parts = _needless(manifest, [needs[claim.rule] for claim in claimed[manifest.id]])
            if parts:
                texts = ", ".join(claim.rule for claim in claimed[manifest.id])
                drops.append(
                    Removal(manifest, f"the rules that claim it do not need {', '.join(parts)} ({texts})", parts)
                )
    return drops


def _needless(manifest: Manifest, needs_of_rules: Sequence[tuple[str, ...] | None]) -> tuple[str, ...]:
    """The parts that none of the rules needs; nothing when a rule needs everything, or nothing that is there."""
    if any(parts is None for parts in needs_of_rules):
        return ()
    needed_parts = {part for parts in needs_of_rules if parts is not None for part in parts}
    if not needed_parts & manifest.parts.keys():
        return ()  # names of parts that do not exist: better to keep too much
    return tuple(part for part in manifest.parts if part not in needed_parts and part not in OWN_PARTS)
