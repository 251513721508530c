"""The command ``ls``, and how runs look."""

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, RenderableType

from peakpoint import catalogue as catalogues
from peakpoint.cli import render, tables
from peakpoint.cli.command import CATALOGUE, INCOMPLETE, ROOT, RUN, Answer, command, run_bar
from peakpoint.cli.completion import RUNS
from peakpoint.cli.render import literal
from peakpoint.errors import ConfigError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.amounts import moment_label, size_text
from peakpoint.format.manifest import Manifest
from peakpoint.format.names import did_you_mean, listing
from peakpoint.format.settings import Settings, settings_of
from peakpoint.repository import journal as journals
from peakpoint.repository import reader
from peakpoint.repository.annotations import all_with_annotations
from peakpoint.repository.lost import damaged_checkpoints
from peakpoint.repository.packs import packed_bytes
from peakpoint.repository.root import Repository, open_repository
from peakpoint.repository.run import Run, rules_of
from peakpoint.repository.whole_run import rename_run
from peakpoint.rules import Claim, Rule, ranked, ranking_metrics
from peakpoint.rules.history import RunReplay, history
from peakpoint.rules.peaks import Peak, peaks

if TYPE_CHECKING:  # one run alone needs no database
    from peakpoint.catalogue import Catalogue, RunSummary

_ON_A_SCREEN = 30  # runs


@command(ROOT, click.argument("names", metavar="[RUN]...", nargs=-1, **RUNS))
@click.option("--all", "all_runs", is_flag=True, help=f"All runs, not only the first {_ON_A_SCREEN}.")
@click.option("--sort", "metric", metavar="METRIC", help="Best first, by a metric that their rules rank by.")
@click.option("--match", "pattern", metavar="PATTERN", help="Only runs of such names: 'resnet*'.")
@CATALOGUE
def ls(
    root: Path,
    names: tuple[str, ...],
    *,
    all_runs: bool,
    metric: str | None,
    pattern: str | None,
    catalogue: str | None,
) -> Answer:
    """List runs with best and last values; of one run, or those named, each checkpoint and why it is kept."""
    if names and (all_runs or metric or pattern):
        raise ConfigError(
            "--all, --sort and --match are about the list of all runs; leave them out, or the names of runs"
        )
    repository = open_repository(root)
    only_one = not (names or metric or pattern) and len(repository.store.children(layout.RUNS)) == 1
    runs = repository.runs() if only_one else [repository.run(name) for name in names]
    if not runs:
        index = catalogues.Catalogue(repository, catalogue)
        return _Listing(root, repository, index, metric, pattern).answer(all_runs=all_runs)
    views = list(map(view, runs))

    def text(console: Console) -> None:
        for run_view in views:
            print_run(console, run_view)

    problems = [f"run {run_view.run.name!r}: left out: {damage}" for run_view in views for damage in run_view.damaged]
    data = {"root": repository.store.location, "runs": list(map(_run_json, views))}
    return Answer(data, text, problems, INCOMPLETE if problems else 0)


@dataclass(frozen=True, slots=True)
class _Listing:
    """Runs, a line each.

    Attributes:
        metric: by which the best comes first; the one that saved last without it.
        pattern: of the names.
    """

    root: Path
    repository: Repository
    catalogue: "Catalogue"
    metric: str | None
    pattern: str | None

    def answer(self, *, all_runs: bool) -> Answer:
        with run_bar() as progress:
            self.catalogue.refresh(progress)
        unread, unread_aliases = self.catalogue.unread, self.catalogue.unread_aliases
        problems = render.left_out(unread)
        problems += [f"cannot read what alias {name!r} points at: {why}" for name, why in unread_aliases.items()]

        def data() -> dict[str, Any]:
            runs = [_listed_json(run, self._writer(run)) for run in self._runs(None)]
            return {"root": self.repository.store.location, "runs": runs, "unread": unread}

        def text(console: Console) -> None:
            self._print(console, self._runs(None if all_runs else _ON_A_SCREEN))

        return Answer(data, text, problems, json_exit_code=INCOMPLETE if unread else 0)

    def _writer(self, run: "RunSummary") -> str | None:
        return None if run.name in self.catalogue.unread else Run(self.repository.store, run.name).holder()

    def _runs(self, top: int | None) -> list["RunSummary"]:
        """Return so many runs at most, in their order."""
        if self.metric is None and self.pattern is None:
            return self.catalogue.runs(top)
        runs = [run for run in self.catalogue.runs() if fnmatch.fnmatchcase(run.name, self.pattern or "*")]
        return (runs if self.metric is None else best_first(runs, self.metric))[:top]

    def _print(self, console: Console, runs: Sequence["RunSummary"]) -> None:
        if not runs:
            matching = "" if self.pattern is None else f" of a name that matches {self.pattern}"
            console.print(f"no runs yet{literal(matching)} in {literal(str(self.root))}")
            return
        writing = {run.name for run in runs if self._writer(run)}
        console.print(runs_table(console, [_with_peak_of(run, self.metric) for run in runs], writing))
        run_count, checkpoint_count, size_bytes = self._totals()
        if len(runs) < run_count:
            console.print(f"[dim]and {render.count(run_count - len(runs), 'more run')}; --all lists them all[/]")
        checkpoint_text = render.count(checkpoint_count, "checkpoint")
        console.print(f"{render.count(run_count, 'run')}, {checkpoint_text}, {size_text(size_bytes)}")
        hint = literal(render.command_line("ls", self.root, "RUN"))
        console.print(f"[dim]To see why each checkpoint is kept: {hint}[/]", soft_wrap=True)

    def _totals(self) -> tuple[int, int, int]:
        if self.pattern is None:
            return self.catalogue.totals()
        runs = self._runs(None)
        return len(runs), sum(run.checkpoints for run in runs), sum(run.size_bytes for run in runs)


def best_first(runs: Sequence["RunSummary"], metric: str) -> list["RunSummary"]:
    """Order runs by their best value of a metric, in the direction of their rules; runs without one come last.

    Raises:
        NotFoundError: no rule ranks by it; names near ones.
        ConfigError: their rules rank by it both ways.
    """
    best = {run.name: peak for run in runs for peak in run.peaks if peak.metric == metric}
    modes = {(peak.metric, peak.mode) for run in runs for peak in run.peaks}
    if runs and not best:
        names = sorted({name for name, _ in modes})
        raise NotFoundError(
            f"no rule of these runs ranks by {metric!r}{did_you_mean(metric, names)}; they rank by "
            f"{listing(names, 20) or 'nothing'}. To rank checkpoints by any metric: peakpoint select ROOT --max METRIC"
        )
    if {(metric, "max"), (metric, "min")} <= modes:
        raise ConfigError(
            f"some of these runs rank by the largest {metric}, others by the smallest; choose with --match"
        )
    sign = -1 if (metric, "max") in modes else 1
    return sorted(runs, key=lambda run: (run.name not in best, sign * best[run.name].best if run.name in best else 0))


def _with_peak_of(run: "RunSummary", metric: str | None) -> "RunSummary":
    return run if metric is None else replace(run, peaks=tuple(peak for peak in run.peaks if peak.metric == metric))


@command(ROOT, RUN, click.argument("new", metavar="NEW"))
def rename(root: Path, name: str, new: str) -> Answer:
    """Give a run another name; nothing that it holds changes.

    A run keeps its name when the records of an alias say it. A training that goes on needs the new name, too.
    """
    run = rename_run(open_repository(root).run(name), new)
    return Answer(
        {"run": run.name, "former": name}, f"run {name} is called {new} now; a training of it needs run={new!r}"
    )


# --- one run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunView:
    """Everything that ``ls RUN`` shows.

    Attributes:
        best_exists: metric to whether a checkpoint of its best exists.
        best_damaged: the metrics whose best was saved and cannot be read.
        best: metric to the id of its best checkpoint.
        packed: id to the bytes in the archive, of those that are there.
        aliases: id to the aliases that point at it.
        settings: those that count.
        writer: the process that has the run open.
        damaged: one sentence for each checkpoint and line of the journal that cannot be read.
    """

    run: Run
    rules: tuple[Rule, ...]
    reports: int
    manifests: Sequence[Manifest]
    claims: Mapping[str, tuple[Claim, ...]]
    peaks: Sequence[Peak]
    best_exists: Mapping[str, bool]
    best_damaged: Collection[str]
    best: Mapping[str, str]
    packed: Mapping[str, int]
    aliases: Mapping[str, tuple[str, ...]]
    settings: Settings
    writer: str | None
    damaged: Sequence[str]


def view(run: Run) -> RunView:
    """Gather what there is to show of a run."""
    journal, listing = journals.read(run.store, run.name), reader.list_run(run.store, run.name)
    events, existing = journal.events, listing.manifests
    damaged = damaged_checkpoints(run.store, run.name, listing)
    replay = RunReplay(events) if damaged else RunReplay()
    damaged_steps = {replay.moment(damage.saved.checkpoint).step for damage in damaged if damage.saved}
    rules, reports = rules_of(events), history(events)
    manifests = all_with_annotations(existing, events, ())
    pairs = ranking_metrics(rules)
    metric_peaks = peaks(reports, pairs)
    steps = {manifest.step for manifest in manifests}
    return RunView(
        run=run,
        rules=rules,
        reports=len(reports),
        manifests=manifests,
        claims=run.plan(None, events).keep,
        peaks=metric_peaks,
        best_exists={peak.metric: peak.best_step in steps for peak in metric_peaks},
        best_damaged=[peak.metric for peak in metric_peaks if peak.best_step in damaged_steps - steps],
        best={metric: ranking[0].id for metric, mode in pairs if (ranking := ranked(manifests, metric, mode))},
        packed=packed_bytes(run.store, run.name, manifests),
        aliases=render.aliases_of(run),
        settings=settings_of(events),
        writer=run.holder(),
        damaged=[*(str(damage.error) for damage in damaged), *journal.damage],
    )


def print_run(console: Console, run: RunView) -> None:
    """Print a run: its rules, best against last, and its checkpoints with the reasons why each is kept."""
    total = sum(manifest.size_bytes for manifest in run.manifests)
    packed = sum(run.packed.get(manifest.id, manifest.size_bytes) for manifest in run.manifests)
    console.print(
        f"[bold]{literal(run.run.name)}[/]: {render.count(len(run.manifests), 'checkpoint')}, {size_text(total)}"
        + (f", archived in {size_text(packed)}" if run.packed else "")
        + (f", newest {render.age(run.manifests[-1].created_at)}" if run.manifests else "")
        + (f", [cyan]being written by {literal(run.writer)}[/]" if run.writer else "")
    )
    console.print(f"rules: {literal(' '.join(rule.text for rule in run.rules)) or 'none'}")
    if run.settings.config:
        console.print(f"config: {render.setting_list(run.settings)}")
    if run.settings.tags:
        console.print(f"tags: {literal(', '.join(run.settings.tags))}")
    if run.peaks:
        heads = ("metric", "mode", ">best", ">at", ">last", ">at", ">lost since the best")
        console.print(tables.PlainTable(heads, [_peak_cells(peak, _fate(run, peak.metric)) for peak in run.peaks]))
    if run.manifests:
        console.print(_kept_table(console, run))
    console.print()


def _kept_table(console: Console, run: RunView) -> RenderableType:
    """The checkpoints and why each is kept: beside them, or below where it is too narrow."""

    def value(manifest: Manifest, metric: str) -> str:
        text = render.number(manifest.metrics.get(metric))
        return f"[bold green]{text} *[/]" if run.best.get(metric) == manifest.id else text + "  "

    def bytes_of(manifest: Manifest) -> str:
        archived = f"\n[dim]packed {size_text(run.packed[manifest.id])}[/]" if manifest.id in run.packed else ""
        return size_text(manifest.size_bytes) + archived

    manifests = run.manifests
    names = [metric for metric, _ in ranking_metrics(run.rules)]
    names = names or sorted({name for manifest in manifests for name in manifest.metrics})
    metrics = [tables.Column(literal(name), [value(manifest, name) for manifest in manifests]) for name in names[:4]]
    columns = [
        tables.Column("checkpoint", [literal(manifest.name) for manifest in manifests], right=False),
        *render.alias_columns([run.aliases.get(manifest.id, ()) for manifest in manifests]),
        tables.Column("epoch", [render.text(manifest.epoch) for manifest in manifests]),
        tables.Column("step", [str(manifest.step) for manifest in manifests]),
        *metrics,
        tables.Column("size", list(map(bytes_of, manifests))),
    ]
    spare = [*(metric.title for metric in metrics[:0:-1]), "step", "size", "epoch", "aliases"]
    reasons = [render.claims_text(run.claims.get(manifest.id, ())) for manifest in manifests]
    return tables.with_reasons(console, columns, spare, "kept because", reasons)


def _fate(run: RunView, metric: str) -> str:
    """Why there is no checkpoint of the best; nothing where there is one."""
    return "" if run.best_exists.get(metric) else "damaged" if metric in run.best_damaged else "removed"


def _peak_cells(peak: Peak, fate: str) -> tuple[str, ...]:
    return (
        literal(peak.metric),
        peak.mode,
        f"[bold green]{render.number(peak.best)}[/]",
        moment_label(peak.best_step, peak.best_epoch) + (f" [bold red]({fate})[/]" if fate else ""),
        render.number(peak.last),
        moment_label(peak.last_step, peak.last_epoch),
        "nothing" if peak.lost == 0 else f"[yellow]{render.number(render.rounded(peak.lost, peak.best, peak.last))}[/]",
    )


def _run_json(run: RunView) -> dict[str, Any]:
    return render.fields(run, "writer", "reports", "best_exists", "damaged") | {
        "name": run.run.name,
        "rules": [rule.text for rule in run.rules],
        "checkpoint_count": len(run.manifests),
        "size_bytes": sum(manifest.size_bytes for manifest in run.manifests),
        "newest": max((manifest.created_at for manifest in run.manifests), default=None),
        "peaks": list(map(_peak_json, run.peaks)),
        "aliases": sorted(alias for names in run.aliases.values() for alias in names),
        **asdict(run.settings),
        "checkpoints": [
            render.manifest_json(manifest, run.claims.get(manifest.id, ()))
            | {"packed_bytes": run.packed.get(manifest.id), "aliases": run.aliases.get(manifest.id, ())}
            for manifest in run.manifests
        ],
    }


def _peak_json(peak: Peak) -> dict[str, Any]:
    return asdict(peak) | {"lost": peak.lost}


# --- many runs -----------------------------------------------------------------------------------------------------


def runs_table(console: Console, runs: Sequence["RunSummary"], writing: Collection[str]) -> RenderableType:
    """Runs, a line each: best against last of the first metric that its rules watch; some are being written."""
    rows = [_run_row(run, writing=run.name in writing) for run in runs]
    titles = ("run", "aliases", "checkpoints", "size", "reports", "newest", "metric", "best", "at", "last", "lost")
    columns = [
        tables.Column(title, cells, right=title not in {"run", "aliases", "metric"})
        for title, cells in zip(titles, zip(*rows, strict=True), strict=True)
        if title != "aliases" or any(cells)
    ]
    spare = ["reports", "at", "checkpoints", "size", "newest", "last", "aliases"]
    return tables.fitted_table(columns, spare, console.width)


def _run_row(run: "RunSummary", *, writing: bool) -> tuple[str, ...]:
    peak = [""] * 5
    if run.peaks:
        fate = "" if run.kept.get(run.peaks[0].metric) else "removed or damaged" if run.damaged else "removed"
        metric, mode, best, best_moment, last, _, lost = _peak_cells(run.peaks[0], fate)
        peak = [f"{metric} ({mode})", best, best_moment, last, lost]
    return (
        literal(run.name) + (f" [bold red]{len(run.damaged)} damaged[/]" if run.damaged else ""),
        render.alias_text(run.aliases),
        f"{run.checkpoints:,}",
        size_text(run.size_bytes),
        f"{run.reports:,}",
        "[cyan]being written[/]" if writing else "" if run.newest is None else render.age(run.newest),
        *peak,
    )


def _listed_json(run: "RunSummary", writer: str | None) -> dict[str, Any]:
    data = asdict(run) | {"writer": writer, "peaks": list(map(_peak_json, run.peaks))}
    return data | {"checkpoint_count": data.pop("checkpoints"), "best_exists": dict(data.pop("kept"))}
