"""Reports: what the runs of a repository came to, and what of it is more than chance.

::

    import peakpoint as pp
    from peakpoint.reports import evaluation

    found = evaluation.evaluate(pp.open("runs"), n_eval=10_000)
    for one in found.peaks:
        print(one.run, one.label, one.peak.best, one.peak.lost, one.verdict)
    evaluation.write(found, "report.html")

``run_data`` reads, ``noise`` knows what chance does, ``peaks`` compares best and last, ``groups`` compares runs,
``sparsity`` and ``compressed`` are about compressed models; ``tables``, ``figures``, ``pages`` and ``files`` show it.
SciPy, Jinja2 and Matplotlib are imported when they are used.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from peakpoint.errors import ConfigError, NotFoundError
from peakpoint.format.names import check_metric, did_you_mean, no_part
from peakpoint.reports.evaluation.compressed import (
    CompressedComparison,
    MetricChange,
    ModelSize,
    RunCheckpoint,
    compare_compressed,
)
from peakpoint.reports.evaluation.files import write
from peakpoint.reports.evaluation.groups import Grouping, RunGroup, compare_groups, group_key, optimizer_of
from peakpoint.reports.evaluation.noise import Interval, Noise
from peakpoint.reports.evaluation.peaks import Examples, RunPeak, directions, run_peaks
from peakpoint.reports.evaluation.run_data import RunData, read_run_data, ref_of
from peakpoint.reports.evaluation.sparsity import BestAtTarget, SparsityPoint, Tradeoff, tradeoff
from peakpoint.reports.evaluation.tables import few, printable
from peakpoint.repository import refs
from peakpoint.repository.root import Repository
from peakpoint.rules import Mode, check_mode, ranked

__all__ = [
    "BestAtTarget",
    "CompressedComparison",
    "Evaluation",
    "Examples",
    "Grouping",
    "Interval",
    "MetricChange",
    "ModelSize",
    "Noise",
    "RunData",
    "RunGroup",
    "RunPeak",
    "SparsityPoint",
    "Tradeoff",
    "evaluate",
    "write",
]

_SPARSITY, _PART = "sparsity", "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What ``evaluate`` found.

    Attributes:
        location: the repository.
        runs: each run as it was read; ``RunData.rows`` is every value.
        optimizers: run to the class of its optimizer.
        peaks: best against last, by run and metric.
        groups: runs side by side, by metric.
        tradeoffs: accuracy against sparsity, by metric.
        comparisons: compressed against original.
        remarks: what a reader should know, a sentence each.
    """

    location: str
    runs: tuple[RunData, ...]
    optimizers: Mapping[str, str]
    peaks: tuple[RunPeak, ...]
    groups: tuple[Grouping, ...]
    tradeoffs: tuple[Tradeoff, ...]
    comparisons: tuple[CompressedComparison, ...]
    remarks: tuple[str, ...]


def evaluate(
    repository: Repository,
    runs: Sequence[str] | None = None,
    *,
    metrics: Mapping[str, Mode] | None = None,
    n_eval: int | Mapping[str, int] | None = None,
    percent: bool = False,
    group_by: str = "optimizer",
    sparsity: str = _SPARSITY,
    compare: Sequence[tuple[str, str]] = (),
    part: str = _PART,
) -> Evaluation:
    """Evaluate runs; reads journals and manifests, no weights.

    Args:
        repository: where they are.
        runs: their names; all by default.
        metrics: which to look at, with their directions; by default those that the rules of each run rank by.
        n_eval: on how many examples each value of a metric was measured, for metrics that are proportions of them: a
            number for every metric that is to be maximised, or the number by metric.
        percent: these proportions are percentages, from 0 to 100, instead of fractions.
        group_by: ``"optimizer"``, or a regular expression with one group, searched for in the run's name.
        sparsity: the metric that holds the sparsity, from 0 to 1.
        compare: pairs of original and compressed, each a ref, or a run whose best checkpoint is meant. By default the
            best dense checkpoint of a run with its best at each target of a ``BestAtSparsity`` rule.
        part: the part whose parameters are counted.

    Returns:
        Frozen values; nothing is printed or written.

    Raises:
        NotFoundError: a run, metric, part or checkpoint that does not exist; names near ones.
        ConfigError: an argument that cannot be.

    Example:
        >>> import tempfile, peakpoint as pp
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"x": 1}, keep=[pp.Best("acc", "max")]) as ckpt:
        ...     for step, acc in enumerate([0.50, 0.72, 0.70, 0.61]):
        ...         _ = ckpt.report(acc=acc, step=step)
        >>> [found] = evaluate(pp.open(root), n_eval=10_000).peaks
        >>> found.verdict, found.peak.best_step, round(found.points)
        ('peak', 1, 11)
    """
    if isinstance(runs, str) or not isinstance(metrics, Mapping | None):
        raise ConfigError('runs is a list of names, and metrics a dict such as {"val_accuracy": "max"}')
    examples = _examples(n_eval, percent=percent)
    wanted = {check_metric(name): mode for name, mode in (metrics or {}).items()}
    for name, mode in wanted.items():
        check_mode(f"metric {name!r}", mode)
    group_key(group_by)
    chosen = [repository.run(name) for name in dict.fromkeys(runs)] if runs else repository.runs()
    # what is compared need not be evaluated
    named = [name for pair in compare for name in map(_run_of, pair)]
    materials = {run.name: read_run_data(run) for run in chosen}
    others = {name: read_run_data(repository.run(name)) for name in dict.fromkeys(named) if name not in materials}
    read = tuple(materials.values())
    _check_known(read, [*wanted, *examples.by_metric])
    _check_compressed([*read, *others.values()], sparsity, part)
    pairs = {one.name: tuple(wanted.items()) or directions(one.rules, sparsity) for one in read}
    peaks = [found for one in read for name, mode in pairs[one.name] for found in run_peaks(one, name, mode, examples)]
    every = tuple(dict.fromkeys(pair for some in pairs.values() for pair in some))
    watching = {pair: [one for one in read if pair in pairs[one.name]] for pair in every}
    tradeoffs = [found for (name, mode), some in watching.items() if (found := tradeoff(some, name, mode, sparsity))]
    modes = dict(pair for one in others.values() for pair in directions(one.rules, sparsity)) | dict(every)
    side = partial(_side, repository=repository, materials=materials | others, wanted=wanted, modes=modes)
    dense = list(_dense_pairs(materials, tradeoffs))
    asked = [(f"{one} and {other}", side(one), side(other)) for one, other in compare]
    return Evaluation(
        location=repository.store.location,
        runs=read,
        optimizers={one.name: optimizer_of(one.state) for one in read},
        peaks=tuple(peaks),
        groups=tuple(compare_groups(read, peaks, group_by)),
        tradeoffs=tuple(tradeoffs),
        comparisons=tuple(
            compare_compressed(one, other, modes, examples, why=why, part=part, sparsity=sparsity)
            for why, one, other in (asked if compare else _having(dense, part))
        ),
        remarks=(
            *_doubts([*read, *others.values()], modes, examples),
            *(() if compare else _without(dense, part)),
            *_remarks(read, peaks, pairs, asked=bool(wanted)),
        ),
    )


def _examples(n_eval: int | Mapping[str, int] | None, *, percent: bool) -> Examples:
    if isinstance(n_eval, Mapping):
        return Examples(by_metric={check_metric(name): count for name, count in n_eval.items()}, percent=percent)
    return Examples(default=n_eval, percent=percent)


def _run_of(name: str) -> str:
    return refs.parse(name).run if any(mark in name for mark in "@:/") else name


def _check_known(materials: Iterable[RunData], metrics: Iterable[str]) -> None:
    have = sorted({name for material in materials for name in material.metrics})
    for metric in metrics:
        if metric not in have:
            shown = ", ".join(have[:20]) + (", ..." if len(have) > 20 else "")
            raise NotFoundError(
                f"no run here has a metric {metric!r}{did_you_mean(metric, have)}; "
                f"metrics: {printable(shown) or 'none'}"
            )


def _check_compressed(materials: Sequence[RunData], sparsity: str, part: str) -> None:
    """What was named must be there; that nothing is sparse, or no part is called model, is no mistake."""
    if sparsity != _SPARSITY:
        _check_known(materials, [sparsity])
    manifests = [manifest for material in materials for manifest in material.checkpoints]
    parts = list(dict.fromkeys(name for manifest in manifests for name in manifest.parts))
    if part not in (_PART, *parts):
        raise no_part(part, parts, where="any of these checkpoints")


def _doubts(materials: Iterable[RunData], modes: Mapping[str, Mode], examples: Examples) -> Iterator[str]:
    """Percentages that look like fractions."""
    for material in materials if examples.percent else ():
        for name, mode in modes.items():
            if examples.of(name, mode) is not None and 0 < max(material.series(name), default=0) <= 1:
                yield (
                    f"{material.name}: {name} is never above 1, and --percent takes it for 1 % at most; if it is a "
                    "fraction, leave --percent out: its ±, verdict and intervals are wrong otherwise"
                )


def _side(
    name: str,
    *,
    repository: Repository,
    materials: Mapping[str, RunData],
    wanted: Mapping[str, Mode],
    modes: Mapping[str, Mode],
) -> RunCheckpoint:
    """A ref, or a run whose best checkpoint is meant; with all that is known of its metrics."""
    material = materials[_run_of(name)]
    if name == material.name:
        pairs = tuple(wanted.items()) or directions(material.rules, "") or tuple(modes.items())
        if not pairs:
            raise ConfigError(f"which checkpoint of {name} is its best? no rule says; give --metric NAME:max, or a ref")
        best = ranked(material.checkpoints, *pairs[0])
        if not best:
            raise NotFoundError(f"no checkpoint of run {name!r} has a finite value of {pairs[0][0]!r}; give a ref")
        identity = best[0].id
    else:
        identity = repository.find_manifest(name).id
    return material, next(manifest for manifest in material.checkpoints if manifest.id == identity)


_Pair = tuple[str, RunCheckpoint, RunCheckpoint]


def _having(pairs: Iterable[_Pair], part: str) -> list[_Pair]:
    """Those in which both checkpoints have the part."""
    return [pair for pair in pairs if all(part in manifest.parts for _, manifest in pair[1:])]


def _without(pairs: Sequence[_Pair], part: str) -> Iterator[str]:
    """The runs of which nothing was compared because the part is not there."""
    for name in dict.fromkeys(one.name for _, (one, _), _ in pairs):
        manifests = [manifest for _, *both in pairs for material, manifest in both if material.name == name]
        lacking = [manifest for manifest in manifests if part not in manifest.parts]
        if lacking:
            missing = no_part(part, lacking[0].parts, where=lacking[0].name)
            yield f"{name}: compressed is not compared with original. {missing}"


def _dense_pairs(materials: Mapping[str, RunData], tradeoffs: Iterable[Tradeoff]) -> Iterator[_Pair]:
    """The best dense checkpoint of a run with its best at each target."""
    seen = set()
    for found in tradeoffs:
        dense = {spot.run: spot for spot in found.dense}
        for at in found.targets:
            if at.spot is None or at.run not in dense or at.spot == dense[at.run]:
                continue
            material = materials[at.run]
            by_ref = {ref_of(manifest): manifest for manifest in material.checkpoints}
            pair = by_ref[dense[at.run].ref], by_ref[at.spot.ref]
            if (pair[0].id, pair[1].id) not in seen:
                seen.add((pair[0].id, pair[1].id))
                why = f"{at.run}: dense, and the best {found.metric} at {found.sparsity} {at.target:g}"
                yield why, (material, pair[0]), (material, pair[1])


def _not_ranked(materials: Sequence[RunData], pairs: Mapping[str, Sequence[tuple[str, Mode]]]) -> Iterator[str]:
    """Metrics that are shown of other runs only."""
    for name, mode in dict.fromkeys(pair for some in pairs.values() for pair in some):
        without = [
            one.name
            for one in materials
            if pairs[one.name] and one.series(name) and name not in {metric for metric, _ in pairs[one.name]}
        ]
        if without:
            yield (
                f"{name} of {few(without)} is in no picture or table: no rule there ranks by it; "
                f"--metric {name}:{mode} shows it of all runs"
            )


def _remarks(
    materials: Sequence[RunData],
    peaks: Sequence[RunPeak],
    pairs: Mapping[str, Sequence[tuple[str, Mode]]],
    *,
    asked: bool,
) -> Iterator[str]:
    shown = {one.run for one in peaks}
    for one in materials:
        yield from (f"{one.name}: {remark}" for remark in one.remarks)
        if not one.history:
            yield f"{one.name} has no reports yet"
        elif not one.metrics:
            yield f"{one.name}: none of its reports has a metric"
        elif not pairs[one.name]:
            yield f"{one.name}: no rule ranks by a metric; give --metric NAME:max, of {', '.join(one.metrics[:10])}"
        elif one.name not in shown:
            which = ", ".join(name for name, _ in pairs[one.name])
            yield f"{one.name} has no finite value of {which}" + ("" if asked else " yet")
        if one.abandoned:
            count = sum(map(len, one.abandoned))
            yield (
                f"{one.name}: {count} {'reports' if count > 1 else 'report'} of abandoned branches left out "
                "(the run was continued from before them)"
            )
    yield from _not_ranked(materials, pairs)
    for judged in peaks:
        peak = judged.peak
        if peak.missing and judged.window == 1:
            yield f"{judged.run}: {peak.missing} values of {peak.metric} are NaN or infinite, and left out"
