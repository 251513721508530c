"""Reports: what the runs of a repository achieved, and what of it is more than chance.

::

    import peakpoint as pp
    from peakpoint.reports import evaluation

    result = evaluation.evaluate(pp.open("runs"), n_eval=10_000)
    for run_peak in result.peaks:
        print(run_peak.run, run_peak.label, run_peak.peak.best, run_peak.peak.lost, run_peak.verdict)
    evaluation.write(result, "report.html")

``run_data`` reads, ``noise`` estimates what chance does, ``peaks`` compares best and last, ``groups`` compares runs,
``sparsity`` and ``compressed`` are about compressed models; ``tables``, ``figures``, ``pages`` and ``files`` show it.
SciPy, Jinja2 and Matplotlib are imported when they are used.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from peakpoint.errors import ConfigError, NotFoundError, printable
from peakpoint.format.names import check_metric, did_you_mean, listing, no_part
from peakpoint.reports.evaluation.compressed import CheckpointPair, RunCheckpoint, compare_compressed
from peakpoint.reports.evaluation.files import write
from peakpoint.reports.evaluation.groups import check_setting, compare_groups, group_key, optimizer_of
from peakpoint.reports.evaluation.peaks import Examples, result_metrics, run_peaks
from peakpoint.reports.evaluation.remarks import Metrics, doubted_percentages, missing_parts, run_remarks
from peakpoint.reports.evaluation.result import Evaluation
from peakpoint.reports.evaluation.run_data import RunData, read_run_data, ref_of
from peakpoint.reports.evaluation.sparsity import Tradeoff, tradeoff
from peakpoint.repository import refs
from peakpoint.repository.root import Repository
from peakpoint.rules import Mode, check_mode

__all__ = ["Evaluation", "evaluate", "write"]

_SPARSITY, _PART = "sparsity", "model"


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
    """Evaluate runs from their journals and manifests; no weights are read.

    Args:
        runs: their names; all by default.
        metrics: which to look at, with their directions; by default those that the rules of each run rank by.
        n_eval: on how many examples each value of a metric was measured, for metrics that are proportions of them: a
            number for every metric that is to be maximised, or the number by metric.
        percent: these proportions are percentages, from 0 to 100, instead of fractions.
        group_by: ``"optimizer"``; a setting such as ``"config.lr"``; or a regular expression with one group, searched
            for in the run's name.
        sparsity: the metric that holds the sparsity, from 0 to 1.
        compare: pairs of original and compressed, each a ref, or a run whose best checkpoint is meant. By default the
            best dense checkpoint of a run with its best at each target of a ``BestAtSparsity`` rule.
        part: the part whose parameters are counted.

    Raises:
        NotFoundError: a run, metric, part, setting or checkpoint that does not exist; names near ones.
        ConfigError: an argument is not valid.

    Example:
        >>> import tempfile, peakpoint as pp
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"x": 1}, keep=[pp.Best("acc", "max")]) as ckpt:
        ...     for step, acc in enumerate([0.50, 0.72, 0.70, 0.61]):
        ...         _ = ckpt.report(acc=acc, step=step)
        >>> [result] = evaluate(pp.open(root), n_eval=10_000).peaks
        >>> result.verdict, result.peak.best_step, round(result.points)
        ('peak', 1, 11)
    """
    if isinstance(runs, str) or not isinstance(metrics, Mapping | None):
        raise ConfigError('runs is a list of names, and metrics a dict such as {"val_accuracy": "max"}')
    request = _Request(repository, _directions(metrics or {}), _examples(n_eval, percent), group_by, sparsity, part)
    unread: dict[str, str] = {}
    if runs:
        data = {name: read_run_data(repository.run(name)) for name in dict.fromkeys(runs)}
    else:
        data, unread = repository.read_runs(read_run_data)
    # what is compared need not be evaluated
    compared = dict.fromkeys(_run_of(name) for name in itertools.chain(*compare))
    compared_only = {name: read_run_data(repository.run(name)) for name in compared if name not in data}
    return replace(request.evaluate(data, compared_only, compare), unread=unread)


def _directions(metrics: Mapping[str, Mode]) -> dict[str, Mode]:
    for name, mode in metrics.items():
        check_mode(f"metric {name!r}", mode)
    return {check_metric(name): mode for name, mode in metrics.items()}


def _examples(n_eval: int | Mapping[str, int] | None, percent: bool) -> Examples:  # noqa: FBT001
    if isinstance(n_eval, Mapping):
        return Examples(by_metric={check_metric(name): count for name, count in n_eval.items()}, percent=percent)
    return Examples(default=n_eval, percent=percent)


def _run_of(name: str) -> str:
    """Return the run of a ref, or the run that is named."""
    return refs.parse(name).run if any(mark in name for mark in "@:/") else name


@dataclass(frozen=True, slots=True)
class _Request:
    """The arguments of ``evaluate``, checked as far as that needs no run."""

    repository: Repository
    directions: dict[str, Mode]
    examples: Examples
    group_by: str
    sparsity: str
    part: str

    def __post_init__(self) -> None:
        group_key(self.group_by)

    def evaluate(
        self, data: dict[str, RunData], compared_only: dict[str, RunData], compare: Sequence[tuple[str, str]]
    ) -> Evaluation:
        runs, every_run = tuple(data.values()), data | compared_only
        _check_metrics(runs, [*self.directions, *self.examples.by_metric])
        check_setting(runs, self.group_by)
        self._check_compressed(every_run.values())
        metrics = {run.name: self._metrics_of(run) for run in runs}
        peaks = [
            run_peak
            for run in runs
            for metric, mode in metrics[run.name]
            for run_peak in run_peaks(run, metric, mode, self.examples)
        ]
        tradeoffs = list(self._tradeoffs(runs, metrics))
        modes = dict(pair for run in compared_only.values() for pair in result_metrics(run.rules, self.sparsity))
        modes |= dict(itertools.chain(*metrics.values()))
        pairs = list(self._named_pairs(compare, every_run, modes) if compare else _dense_pairs(data, tradeoffs))
        comparable = pairs if compare else [pair for pair in pairs if pair.has_part(self.part)]
        remarks = [
            *doubted_percentages(every_run.values(), modes, self.examples),
            *missing_parts(() if compare else pairs, self.part),
            *run_remarks(runs, peaks, metrics, metrics_were_named=bool(self.directions)),
        ]
        return Evaluation(
            location=self.repository.store.location,
            runs=runs,
            optimizers={run.name: optimizer_of(run.state) for run in runs},
            peaks=tuple(peaks),
            groups=tuple(compare_groups(runs, peaks, self.group_by)),
            tradeoffs=tuple(tradeoffs),
            comparisons=tuple(
                compare_compressed(pair, modes, self.examples, part=self.part, sparsity=self.sparsity)
                for pair in comparable
            ),
            remarks=tuple(remarks),
        )

    def _metrics_of(self, run: RunData) -> Metrics:
        return tuple(self.directions.items()) or result_metrics(run.rules, self.sparsity)

    def _tradeoffs(self, runs: Iterable[RunData], metrics: Mapping[str, Metrics]) -> Iterator[Tradeoff]:
        for metric, mode in dict.fromkeys(itertools.chain(*metrics.values())):
            ranking_runs = [run for run in runs if (metric, mode) in metrics[run.name]]
            if result := tradeoff(ranking_runs, metric, mode, self.sparsity):
                yield result

    def _check_compressed(self, runs: Iterable[RunData]) -> None:
        """Refuse a named metric or part that no run has; the default ones may be missing."""
        if self.sparsity != _SPARSITY:
            _check_metrics(runs, [self.sparsity])
        parts = list(dict.fromkeys(part for run in runs for checkpoint in run.checkpoints for part in checkpoint.parts))
        if self.part not in (_PART, *parts):
            raise no_part(self.part, parts, where="any of these checkpoints")

    def _named_pairs(
        self, compare: Iterable[tuple[str, str]], runs: Mapping[str, RunData], modes: Mapping[str, Mode]
    ) -> Iterator[CheckpointPair]:
        for names in compare:
            original, compressed = (self._checkpoint(name, runs[_run_of(name)], modes) for name in names)
            yield CheckpointPair(f"{names[0]} and {names[1]}", original, compressed)

    def _checkpoint(self, name: str, run: RunData, modes: Mapping[str, Mode]) -> RunCheckpoint:
        """Return the checkpoint of a ref, or the best of a run."""
        if name != run.name:
            identity = self.repository.find_manifest(name).id
            return run, next(checkpoint for checkpoint in run.checkpoints if checkpoint.id == identity)
        metrics = tuple(self.directions.items()) or result_metrics(run.rules, "") or tuple(modes.items())
        if not metrics:
            raise ConfigError(
                f"which checkpoint of {name} is its best? no rule says; pass --metric NAME:max, or name a checkpoint"
            )
        best = run.best_checkpoint(*metrics[0])
        if best is None:
            raise NotFoundError(
                f"no checkpoint of run {name!r} has a finite value of {metrics[0][0]!r}; name a checkpoint"
            )
        return run, best


def _check_metrics(runs: Iterable[RunData], metrics: Iterable[str]) -> None:
    names = sorted({name for run in runs for name in run.metrics})
    for metric in metrics:
        if metric not in names:
            raise NotFoundError(
                f"no run here has a metric {metric!r}{did_you_mean(metric, names)}; "
                f"metrics: {printable(listing(names, 20)) or 'none'}"
            )


def _dense_pairs(runs: Mapping[str, RunData], tradeoffs: Iterable[Tradeoff]) -> Iterable[CheckpointPair]:
    """Return the best dense checkpoint of each run with its best at each target."""
    pairs: dict[tuple[str, str], CheckpointPair] = {}
    for result in tradeoffs:
        dense = {point.run: point.ref for point in result.dense}
        for best in result.targets:
            if best.spot is not None and best.spot.ref != dense.get(best.run, best.spot.ref):
                run, refs_of_pair = runs[best.run], (dense[best.run], best.spot.ref)
                checkpoints = {ref_of(checkpoint): checkpoint for checkpoint in run.checkpoints}
                original, compressed = ((run, checkpoints[ref]) for ref in refs_of_pair)
                why = f"{best.run}: dense, and the best {result.metric} at {result.sparsity} {best.target:g}"
                pairs.setdefault(refs_of_pair, CheckpointPair(why, original, compressed))
    return pairs.values()
