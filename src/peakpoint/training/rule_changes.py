"""What a change of rules removes: found when a run is continued, so that people are warned before it happens."""

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
    """What the earlier rules would keep and those in force do not.

    Attributes:
        removed: checkpoints, in the order of ``manifests``.
        thinned: id of each checkpoint that only loses parts, with the names of those.
        best: metrics that the earlier rules ranked by, where ``removed`` has the best value: name, value, checkpoint.
    """

    removed: tuple[Manifest, ...]
    thinned: Mapping[str, tuple[str, ...]]
    best: tuple[tuple[str, float, str], ...]

    def sentences(self, location: str, undo_for: timedelta) -> list[str]:
        """Return warnings before anything is removed, with what can be done about it."""
        sentences = []
        if self.removed:
            ref = f"{shlex.quote(location)} {self.removed[0].run}/NAME"
            names = listing([manifest.name for manifest in self.removed], _SHOWN)
            best = "".join(
                f"; by the earlier rules the best {metric}, {value:.6g}, is {name}" for metric, value, name in self.best
            )
            hours = undo_for / timedelta(hours=1)
            undo = (
                f"can be brought back for {hours:g} h with: peakpoint undo {ref}" if hours else "is permanently deleted"
            )
            sentences.append(
                f"the rules have changed and no longer keep {_checkpoints(self.removed)}: {names}{best}. What they do "
                f"not keep is removed with the next save or at the end of this training, and {undo}. To keep one, put "
                f"its rule back, or: peakpoint pin {ref}"
            )
        if self.thinned:
            parts = sorted({part for parts in self.thinned.values() for part in parts})
            sentences.append(
                f"the rules have changed and no longer need {listing(parts)} of {_checkpoints(self.thinned)}; this is "
                "removed with the next save or at the end of this training, for good"
            )
        return sentences


def _checkpoints(checkpoints: Collection[object]) -> str:
    return f"{len(checkpoints)} checkpoint{'s' if len(checkpoints) > 1 else ''}"


def earlier_rules(events: Iterable[Event]) -> list[Rules | None]:
    """Return the rules by which checkpoints were kept; None for rules that keep everything or cannot be read.

    Those of the last process that has applied its rules, and of every one that has opened the run since: one that was
    killed right after its first save may not have applied them.
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
    earlier: Sequence[Rules | None],
    plan: Callable[[Sequence[Manifest], Rules], RetentionPlan],
) -> RuleChange:
    """Compare what the rules in force and earlier ones would remove, now and after a next checkpoint.

    Args:
        manifests: the checkpoints that exist, with all their metrics, also those measured later.
        following: a next checkpoint: what is kept only for being the newest is removed with it.
        earlier: the earlier rules; None keeps everything.
        plan: makes the plan of rules for checkpoints.
    """
    lost_parts: set[tuple[str, str]] = set()
    removed: set[str] = set()
    for existing in (manifests, [*manifests, following]):
        new_plan = plan(existing, rules)
        stays = _parts_kept(existing, new_plan)
        for previous in earlier:
            lost_parts |= _parts_kept(existing, None if previous is None else plan(existing, previous)) - stays
        removed |= {removal.manifest.id for removal in new_plan.remove}
    removed &= {checkpoint for checkpoint, _ in lost_parts}
    thinned: dict[str, tuple[str, ...]] = {}
    for checkpoint, part in sorted(lost_parts):
        if checkpoint not in removed:
            thinned[checkpoint] = (*thinned.get(checkpoint, ()), part)
    going = {manifest.id: manifest for manifest in manifests if manifest.id in removed}
    watching = ranking_metrics(rule for previous in earlier for rule in previous or ())
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
    """Return checkpoint and part of everything that a plan keeps; no plan keeps everything."""
    manifests_kept = [manifest for manifest in manifests if plan is None or manifest.id in plan.keep]
    dropped = {(thinning.manifest.id, part) for thinning in (plan.drop if plan else ()) for part in thinning.parts}
    return {(manifest.id, part) for manifest in manifests_kept for part in manifest.parts} - dropped
