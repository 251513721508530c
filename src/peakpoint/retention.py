"""Retention: which checkpoints stay and which go, with reasons. First a plan, then its application."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peakpoint.errors import StoreError
from peakpoint.journal import Journal, Removed
from peakpoint.manifest import Manifest
from peakpoint.rules import Claim, Rule, claims
from peakpoint.store import Store
from peakpoint.writer import remove


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
class Plan:
    """What stays and what goes.

    Attributes:
        keep: id to the claims and protections that keep a checkpoint.
        remove: what goes, oldest first.
    """

    keep: Mapping[str, tuple[Claim, ...]]
    remove: tuple[Removal, ...]

    @property
    def freed_bytes(self) -> int:
        """Bytes of the files that go."""
        return sum(removal.manifest.size_bytes for removal in self.remove)


def why_kept(manifests: Sequence[Manifest], rules: Sequence[Rule]) -> dict[str, tuple[Claim, ...]]:
    """The claims on each checkpoint, protections among them; what is missing here is kept by nothing."""
    kept = claims(rules, manifests)
    for protection in (*_asked(manifests), *_newest(manifests)):
        identity, claim = protection
        kept[identity] = (*kept.get(identity, ()), claim)
    return kept


def _asked(manifests: Sequence[Manifest]) -> list[tuple[str, Claim]]:
    return [
        (manifest.id, Claim("protection:asked", f"saved on request: {manifest.asked}"))
        for manifest in manifests
        if manifest.asked is not None
    ]


def _newest(manifests: Sequence[Manifest]) -> list[tuple[str, Claim]]:
    if not manifests:
        return []
    newest = max(manifests, key=lambda manifest: manifest.sequence)
    return [(newest.id, Claim("protection:newest", "the newest: the run continues from here"))]


def plan(manifests: Sequence[Manifest], rules: Sequence[Rule]) -> Plan:
    """Keep what a rule or a protection claims; everything else goes.

    Pure and idempotent: a plan over what a plan has kept removes nothing.
    """
    kept = why_kept(manifests, rules)
    texts = " ".join(rule.text for rule in rules) or "no rules"
    going = [
        Removal(manifest, f"no rule claims it any more ({texts})") for manifest in manifests if manifest.id not in kept
    ]
    return Plan(kept, tuple(sorted(going, key=lambda removal: removal.manifest.sequence)))


def apply(store: Store, journal: Journal, removals: Sequence[Removal], *, by: str) -> list[str]:
    """Remove, recording each reason durably before the first file goes.

    A checkpoint that cannot be removed stays and is tried again by the next plan.

    Args:
        store: where.
        journal: receives a ``Removed`` for each.
        removals: what goes.
        by: who decided, for the record.

    Returns:
        One sentence for each removal that failed.
    """
    failures = []
    for removal in removals:
        manifest = removal.manifest
        journal.append(
            Removed(
                at=journal.now(),
                checkpoint=manifest.id,
                name=manifest.name,
                step=manifest.step,
                epoch=manifest.epoch,
                reason=removal.reason,
                by=by,
            )
        )
    if removals:
        journal.sync()
    for removal in removals:
        try:
            remove(store, removal.manifest)
        except StoreError as error:
            failures.append(f"{removal.manifest.name} could not be removed: {error}")
    return failures
