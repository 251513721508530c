"""The plan of retention: what stays, for which reasons, and what goes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from peakpoint.format.manifest import Manifest, without_parts
from peakpoint.rules import Budget, CheckpointRecord, Claim, Rule, claims

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
class PartRemoval:
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
    drop: tuple[PartRemoval, ...] = ()

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


def kept_ids(records: Sequence[CheckpointRecord], rules: Sequence[Rule], protected: Collection[str]) -> set[str]:
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
    slim = {thinning.manifest.id: thinning.remaining for thinning in drops}
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
    return RetentionPlan(
        keep,
        tuple(sorted(going, key=lambda removal: removal.manifest.sequence)),
        tuple(thinning for thinning in drops if thinning.manifest.id in stay),
    )


def _drops(
    manifests: Sequence[Manifest],
    rules: Sequence[Rule],
    claimed: Mapping[str, Sequence[Claim]],
    protected: Collection[str],
) -> list[PartRemoval]:
    """What loses parts, oldest first, if it stays."""
    needs = {rule.text: rule.needs for rule in rules}
    drops = []
    for manifest in sorted(manifests, key=lambda manifest: manifest.sequence):
        if manifest.id in claimed and manifest.id not in protected:
            parts = _needless(manifest, [needs[claim.rule] for claim in claimed[manifest.id]])
            if parts:
                texts = ", ".join(claim.rule for claim in claimed[manifest.id])
                drops.append(
                    PartRemoval(manifest, parts, f"the rules that claim it do not need {', '.join(parts)} ({texts})")
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
