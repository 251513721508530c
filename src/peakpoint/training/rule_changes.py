"""What a change of rules lets go: looked for when a run is continued, so that it can be said before anything goes."""

import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from peakpoint.errors import ConfigError
from peakpoint.format.events import Closed, Event, Opened, Saved
from peakpoint.format.manifest import Manifest
from peakpoint.format.names import listing
from peakpoint.rules import Rule, parse, ranked, ranking_metrics
from peakpoint.rules.retention import RetentionPlan

Rules = tuple[Rule, ...]
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class RuleChange:
    """What the rules before would keep and those in force do not.

    Attributes:
        removed: checkpoints, in the order of ``manifests``.
        thinned: id of each checkpoint that only loses parts, with the names of those.
        best: metrics that the rules before ranked by, where ``removed`` has the best value: name, value, checkpoint.
    """

    removed: tuple[Manifest, ...]
    thinned: Mapping[str, tuple[str, ...]]
    best: tuple[tuple[str, float, str], ...]

    def sentences(self, location: str, undo_for: timedelta) -> list[str]:
        """What to say before anything goes, and what can be done about it."""
        said = []
        if self.removed:
            ref = f"{shlex.quote(location)} {self.removed[0].run}/NAME"
            names = listing([manifest.name for manifest in self.removed], _SHOWN)
            best = "".join(f"; by the former rules the best {one[0]}, {one[1]:.6g}, is {one[2]}" for one in self.best)
            hours = undo_for / timedelta(hours=1)
            back = f"can be brought back for {hours:g} h with: peakpoint undo {ref}" if hours else "is gone for good"
            said.append(
                f"the rules have changed and no longer keep {_checkpoints(self.removed)}: {names}{best}. What they do "
                f"not keep is removed with the next save or at the end of this training, and {back}. To keep one, put "
                f"its rule back, or: peakpoint pin {ref}"
            )
        if self.thinned:
            parts = sorted({part for parts in self.thinned.values() for part in parts})
            said.append(
                f"the rules have changed and no longer need {listing(parts)} of {_checkpoints(self.thinned)}; this is "
                "removed with the next save or at the end of this training, for good"
            )
        return said


def _checkpoints(those: Collection[object]) -> str:
    return f"{len(those)} checkpoint{'s' if len(those) > 1 else ''}"


def former_rules(events: Iterable[Event]) -> list[Rules | None]:
    """The rules that what exists was kept by; None for rules that keep everything, or that this release cannot read.

    Those of the last process that has applied its rules, and of every one that has opened the run since: one that was
    killed right after its first save may not have come to applying them.
    """
    openings: list[tuple[str, ...]] = []
    saved = False
    for event in events:
        if isinstance(event, Opened):
            openings.append(event.rules)
            saved = False
        elif saved and isinstance(event, Saved | Closed):
            openings = openings[-1:]
        elif isinstance(event, Saved):
            saved = True
    return [_parsed(texts) for texts in dict.fromkeys(openings)] or [None]


def _parsed(texts: Sequence[str]) -> Rules | None:
    try:
        return tuple(map(parse, texts)) or None
    except ConfigError:
        return None


def rule_change(
    manifests: Sequence[Manifest],
    following: Manifest,
    rules: Rules,
    former: Sequence[Rules | None],
    plan: Callable[[Sequence[Manifest], Rules], RetentionPlan],
) -> RuleChange:
    """Compare what the rules in force and those before would let go, now and once there is a next checkpoint.

    Args:
        manifests: the checkpoints that exist, with all that is known of their metrics.
        following: a next checkpoint: what is kept only for being the newest goes with it.
        rules: those in force.
        former: those before; None keeps everything.
        plan: what rules make of checkpoints.
    """
    lost: set[tuple[str, str]] = set()
    removed: set[str] = set()
    for existing in (manifests, [*manifests, following]):
        now = plan(existing, rules)
        kept = _parts_kept(existing, now)
        for before in former:
            lost |= _parts_kept(existing, None if before is None else plan(existing, before)) - kept
        removed |= {removal.manifest.id for removal in now.remove}
    removed &= {checkpoint for checkpoint, _ in lost}
    thinned: dict[str, tuple[str, ...]] = {}
    for checkpoint, part in sorted(lost):
        if checkpoint not in removed:
            thinned[checkpoint] = (*thinned.get(checkpoint, ()), part)
    going = {manifest.id: manifest for manifest in manifests if manifest.id in removed}
    watching = ranking_metrics(rule for before in former for rule in before or ())
    leaders = [(metric, ranked(manifests, metric, mode)[:1]) for metric, mode in watching]
    best = {
        (metric, record.id): going[record.id] for metric, first in leaders for record in first if record.id in going
    }
    return RuleChange(
        removed=tuple(going.values()),
        thinned=thinned,
        best=tuple((metric, manifest.metrics[metric], manifest.name) for (metric, _), manifest in best.items()),
    )


def _parts_kept(manifests: Sequence[Manifest], plan: RetentionPlan | None) -> set[tuple[str, str]]:
    """Checkpoint and part of everything that a plan keeps; no plan keeps everything."""
    kept = [manifest for manifest in manifests if plan is None or manifest.id in plan.keep]
    dropped = {(thinning.manifest.id, part) for thinning in (plan.drop if plan else ()) for part in thinning.parts}
    return {(manifest.id, part) for manifest in kept for part in manifest.parts} - dropped
