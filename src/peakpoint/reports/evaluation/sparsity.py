"""What sparsity costs: checkpoints by sparsity, the front that no other beats, the best at each target."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peakpoint.reports.evaluation.run_data import RunData, ref_of
from peakpoint.rules import BestAtSparsity, CheckpointRecord, Mode, Pareto, ranked


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsityPoint:
    """One checkpoint in the plane of sparsity and metric.

    Attributes:
        run: its run.
        ref: its ref.
        step: optimizer steps completed.
        epoch: the epoch's index; None outside epochs.
        sparsity: from 0 (dense) to 1, as recorded.
        value: of the metric.
        on_front: whether no other checkpoint beats it in both.
    """

    run: str
    ref: str
    step: int
    epoch: int | None
    sparsity: float
    value: float
    on_front: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BestAtTarget:
    """The best checkpoint of a run at one sparsity.

    Attributes:
        run: the run.
        target: the sparsity that a rule asks for.
        tolerance: how far from it still counts.
        spot: the checkpoint; None when there is none.
        cost: how much worse it is than the best dense checkpoint of the run, in the metric's unit; negative when it is
            better; None when either is missing.
    """

    run: str
    target: float
    tolerance: float
    spot: SparsityPoint | None
    cost: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tradeoff:
    """Accuracy against sparsity, for one metric.

    Attributes:
        metric: which metric.
        mode: its direction.
        sparsity: the metric that holds the sparsity.
        spots: every checkpoint that has both, by run and sparsity.
        targets: by run and target; none without a ``BestAtSparsity`` rule.
        dense: the best dense checkpoint of each run that has one.
    """

    metric: str
    mode: Mode
    sparsity: str
    spots: tuple[SparsityPoint, ...]
    targets: tuple[BestAtTarget, ...]
    dense: tuple[SparsityPoint, ...]


def tradeoff(runs: Sequence[RunData], metric: str, mode: Mode, sparsity: str) -> Tradeoff | None:
    """Return the trade-off among the checkpoints of some runs; None when fewer than two sparsities are there.

    Args:
        sparsity: the metric that holds the sparsity, of which more is better.
    """
    measured = [
        manifest
        for run in runs
        for manifest in run.checkpoints
        if all(math.isfinite(manifest.metrics.get(name, math.nan)) for name in (metric, sparsity))
    ]
    if len({manifest.metrics[sparsity] for manifest in measured}) < 2:
        return None
    front = set(Pareto({metric: mode, sparsity: "max"}).claims(measured))
    spots = {
        manifest.id: SparsityPoint(
            run=manifest.run,
            ref=ref_of(manifest),
            step=manifest.step,
            epoch=manifest.epoch,
            sparsity=manifest.metrics[sparsity],
            value=manifest.metrics[metric],
            on_front=manifest.id in front,
        )
        for manifest in measured
    }

    def best_of(checkpoints: Iterable[CheckpointRecord]) -> SparsityPoint | None:
        return next((spots[checkpoint.id] for checkpoint in ranked(checkpoints, metric, mode)), None)

    targets, dense = [], []
    for run in runs:
        own_checkpoints = [manifest for manifest in measured if manifest.run == run.name]
        rules = [rule for rule in run.rules if isinstance(rule, BestAtSparsity)]
        rules = [rule for rule in rules if (rule.metric, rule.mode, rule.sparsity) == (metric, mode, sparsity)]
        targets_of_rules = [(rule, target) for rule in rules for target in rule.targets]
        tolerance = min((rule.tolerance for rule in rules), default=0.01)
        unpruned = best_of(manifest for manifest in own_checkpoints if abs(manifest.metrics[sparsity]) <= tolerance)
        dense += [unpruned] if unpruned else []
        for rule, target in targets_of_rules:
            spot = best_of(record for record in rule.considered(own_checkpoints) if rule.target_of(record) == target)
            loss = None if spot is None or unpruned is None else spot.value - unpruned.value
            cost = -loss if loss is not None and mode == "max" else loss
            targets.append(BestAtTarget(run=run.name, target=target, tolerance=rule.tolerance, spot=spot, cost=cost))
    ordered = sorted(spots.values(), key=lambda spot: (spot.run, spot.sparsity, spot.step))
    return Tradeoff(
        metric=metric, mode=mode, sparsity=sparsity, spots=tuple(ordered), targets=tuple(targets), dense=tuple(dense)
    )
