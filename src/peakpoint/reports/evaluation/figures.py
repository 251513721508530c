"""Pictures, drawn with Matplotlib: curves with their peaks, and accuracy against sparsity.

Colours are those of Okabe & Ito, "Color Universal Design", 2008, which people with any kind of colour vision tell
apart; runs also differ in their markers. The same values give the same bytes.
"""

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from peakpoint.format.events import Reported
from peakpoint.reports.evaluation.downsample import thin
from peakpoint.reports.evaluation.peaks import Examples, RunPeak, run_peaks
from peakpoint.reports.evaluation.run_data import RunData
from peakpoint.reports.evaluation.sparsity import Tradeoff
from peakpoint.reports.evaluation.tables import printable
from peakpoint.rules import Mode

if TYPE_CHECKING:
    from peakpoint.reports.evaluation import Evaluation

_STYLE = mpl.rc_params_from_file(
    str(files("peakpoint.reports.evaluation") / "figures.mplstyle"), use_default_template=False
)
INK = str(_STYLE["text.color"])
"""The colour of everything that is no data; a page replaces it by its own."""

MARK = "peakpoint report"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SHAPES = ("o", "s", "^", "D", "v", "P")
_PAIRS = [
    (colour, _SHAPES[(at + more) % len(_SHAPES)]) for more in range(len(_SHAPES)) for at, colour in enumerate(_COLOURS)
]
_LARGEST = 1e100  # Matplotlib's own arithmetic overflows some way above
_MOST_DOTS = 100
_LONG = 20  # points of a curve
_MANY_STEPS = 20_000
_SPLIT = re.compile(r"(?:train|training|val|valid|validation|test|eval|dev)[_/.-](?=.)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture.

    Attributes:
        name: of a file, without suffix.
        alt: what it shows, in words.
        draw: draws it.
        legend: what stands below it; each line has a label.
    """

    name: str
    alt: str
    draw: Callable[[Axes], None]
    legend: Sequence[Line2D]


def panels(evaluation: "Evaluation", *, separate: bool = False) -> list[Panel]:
    """Every picture: one for each metric (train and validation together), and one for each trade-off.

    Args:
        evaluation: what to show.
        separate: a picture for each run instead of all runs in one.
    """
    materials = {run.name: run for run in evaluation.runs}
    looks = _Looks({})
    drawn_panels = []
    for names in [{name} for name in materials] if separate else [set(materials)]:
        groups: dict[str, list[RunPeak]] = {}
        for run_peak in evaluation.peaks:
            if run_peak.window == 1 and run_peak.run in names:
                groups.setdefault(_split_off(run_peak.peak.metric), []).append(run_peak)
        drawn_panels += [_curves(title, run_peaks, materials, looks) for title, run_peaks in groups.items()]
    return drawn_panels + [_front(run_peak, looks) for run_peak in evaluation.tradeoffs]


def curve(material: RunData, metric: str, mode: Mode, marked: tuple[int, int | None, float] | None) -> Panel | None:
    """The curve of one metric of one run, with its peak.

    Args:
        material: the run.
        metric: which metric.
        mode: its direction.
        marked: step, epoch and value of a checkpoint to be marked.

    Returns:
        None when the metric never had a finite value.
    """
    raw_peaks = [run_peak for run_peak in run_peaks(material, metric, mode, Examples()) if run_peak.window == 1]
    if not raw_peaks:
        return None
    panel = _curves(_split_off(metric), raw_peaks, {material.name: material}, _Looks({}))
    if marked is None or not abs(marked[2]) < _LARGEST:
        return panel
    step, epoch, value = marked
    style: Any = {"marker": "o", "linestyle": "none", "color": INK, "markerfacecolor": "none", "markersize": 15}

    def draw(axes: Axes) -> None:
        panel.draw(axes)
        place = (epoch or 0) if material.counts_epochs() else step
        axes.plot([place], [value], **style, markeredgewidth=1.8, zorder=15)
        low, high = axes.get_ylim()
        low, high = min(low, value), max(high, value)
        margin = (high - low) * 0.06
        axes.set_ylim(min(low, value - margin), max(high, value + margin))

    return replace(panel, draw=draw, legend=[*panel.legend, Line2D([], [], **style, label="this checkpoint")])


def svg(panel: Panel) -> str:
    """One picture as SVG without a background."""
    with _style():
        return _saved(_figure([panel]), "svg", transparent=True).decode()


def save(chosen_panels: Sequence[Panel], suffix: str) -> bytes:
    """Pictures below one another in one file, on white.

    Args:
        chosen_panels: at least one.
        suffix: ``".png"`` or ``".svg"``.
    """
    with _style():
        return _saved(_figure(chosen_panels), suffix.removeprefix("."), transparent=False)


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # letters that the font lacks: a browser finds them elsewhere, a PNG shows boxes
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        yield


def _figure(chosen_panels: Sequence[Panel]) -> Figure:
    """Pictures below one another, each as high as its legend needs."""
    columns = [_columns(panel.legend) for panel in chosen_panels]
    heights = [
        3.5 + 0.19 * math.ceil(len(panel.legend) / count) for panel, count in zip(chosen_panels, columns, strict=True)
    ]
    figure = Figure(figsize=(7.2, sum(heights)), layout="constrained", facecolor="white")
    subfigures: list[Figure | SubFigure] = [figure]
    if len(chosen_panels) > 1:
        subfigures = list(figure.subfigures(len(chosen_panels), 1, squeeze=False, height_ratios=heights)[:, 0])
    for subfigure, panel, count in zip(subfigures, chosen_panels, columns, strict=True):
        panel.draw(subfigure.subplots())
        # a label that begins with an underscore would be left out
        texts = [str(line.get_label()) for line in panel.legend]
        labels = [f"\u2009{text}" if text.startswith("_") else text for text in texts]
        subfigure.legend(panel.legend, labels, loc="outside lower left", ncols=count, frameon=False, fontsize=8)
    return figure


def _columns(legend: Sequence[Line2D]) -> int:
    longest = max((len(str(line.get_label())) for line in legend), default=0)
    return max(1, min(4, 100 // (longest + 8)))


def _saved(figure: Figure, kind: str, *, transparent: bool) -> bytes:
    metadata = {"Creator": MARK, "Date": None} if kind == "svg" else {"Software": MARK}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=120, transparent=transparent, metadata=metadata)
    return buffer.getvalue()


# --- curves -------------------------------------------------------------------------------------------------------


def _split_off(metric: str) -> str:
    """``val_loss`` and ``train/loss`` are both about the ``loss``."""
    return _SPLIT.sub("", metric, count=1) if _SPLIT.match(metric) else metric


def _short(name: str, limit: int = 40) -> str:
    text = printable(name)
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-limit // 2 :]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePicture:
    """One metric of some runs, with that of the other splits.

    Attributes:
        title: what the metrics are about.
        judged: the peaks, the best first.
        materials: the runs.
        looks: the colour and marker of those runs that have some of their own, by name.
        by_epoch: whether epochs stand below, or steps.
    """

    title: str
    judged: Sequence[RunPeak]
    materials: Mapping[str, RunData]
    looks: Mapping[str, tuple[str, str]]
    by_epoch: bool

    @property
    def metrics(self) -> dict[str, str]:
        """How the line of each metric is drawn: those with a peak are solid."""
        solid = dict.fromkeys(run_peak.peak.metric for run_peak in self.judged)
        names = dict.fromkeys(name for run in self.looks for name in self.materials[run].metrics)
        dashed = [name for name in names if name not in solid and _split_off(name) == self.title]
        return dict(zip([*solid, *dashed], [*("-" for _ in solid), *("--", ":", "-.")], strict=False))

    def draw(self, axes: Axes) -> None:
        """Grey runs below, coloured ones above, their peaks on top."""
        axes.set_title(_short(self.title if len(self.materials) > 1 else f"{next(iter(self.looks))}: {self.title}", 80))
        axes.set_xlabel("epoch" if self.by_epoch else "step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        drawn = [self._line(axes, run_peak, name) for run_peak in self.judged for name in self._names(run_peak)]
        _scale(axes, drawn)
        low, high = axes.get_xlim()
        if high >= _MANY_STEPS:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        elif high - low < 1:
            axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)  # one report
        for run_peak in self.judged:
            if run_peak.run in self.looks:
                self._marks(axes, run_peak)

    def _names(self, run_peak: RunPeak) -> list[str]:
        """The lines of a run: its metric, and the other splits' when it has a colour."""
        run_metrics = self.materials[run_peak.run].metrics
        dashed = [name for name, style in self.metrics.items() if style != "-" and name in run_metrics]
        return [run_peak.peak.metric, *dashed] if run_peak.run in self.looks else [run_peak.peak.metric]

    def _line(self, axes: Axes, run_peak: RunPeak, metric: str) -> Sequence[float]:
        """Draw a line; returns its values."""
        run = self.materials[run_peak.run]
        style: Any = {"linestyle": self.metrics[metric], "linewidth": 1.6 if metric == run_peak.peak.metric else 1.1}
        if run_peak.run in self.looks:
            style["color"] = colour = self.looks[run_peak.run][0]
            for branch in run.abandoned if metric == run_peak.peak.metric else ():
                dots: Any = {"color": colour, "markersize": 4, "linewidth": 1, "alpha": 0.6, "zorder": 6}
                axes.plot(*self._points(branch, metric), "x:", **dots)
        else:
            style |= {"color": INK, "alpha": max(0.02, min(0.25, 5 / len(self.materials))), "zorder": 1}
        places, values = self._points(run.history, metric)
        axes.plot(places, values, **style)
        return values

    def _points(self, reports: Iterable[Reported], metric: str) -> tuple[list[float], list[float]]:
        """Places and values."""
        values_at = []
        for report in reports:
            if metric in report.metrics:
                value = report.metrics[metric]
                position = report.epoch if self.by_epoch else report.step
                values_at.append((float(position or 0), value if abs(value) < _LARGEST else math.nan))
        points = thin(values_at)
        return [x for x, _ in points], [y for _, y in points]

    def _marks(self, axes: Axes, run_peak: RunPeak) -> None:
        peak, colour, shape = run_peak.peak, *self.looks[run_peak.run]
        for reports, face in (
            (_gone(self.materials[run_peak.run]), "none"),
            (_there(self.materials[run_peak.run]), colour),
        ):
            if len(self.materials) == 1 and len(reports) <= _MOST_DOTS:
                axes.plot(*self._points(reports, peak.metric), ".", color=colour, markerfacecolor=face, markersize=7)
        best, last = (peak.best_epoch, peak.last_epoch) if self.by_epoch else (peak.best_step, peak.last_step)
        for place, value, mark, area in ((last, peak.last, shape, 7), (best, peak.best, "*", 14)):
            if abs(value) < _LARGEST:
                axes.plot([place or 0], [value], mark, color=colour, markersize=area, markeredgecolor=INK, zorder=area)
        if self.materials[run_peak.run].stopped_early and abs(peak.last) < _LARGEST:
            axes.plot([last or 0], [peak.last], "|", color=INK, markersize=22, markeredgewidth=1.5, zorder=6)

    def legend(self) -> list[Line2D]:
        """Runs by colour and marker, metrics by the kind of line, then the marks."""
        ink: Any = {"color": INK, "linestyle": "none"}
        looks = self.looks.items()
        lines = [Line2D([], [], color=colour, marker=mark, label=_short(run)) for run, (colour, mark) in looks]
        grey_runs = len({run_peak.run for run_peak in self.judged}) - len(lines)
        if grey_runs:
            lines.append(
                Line2D([], [], color=INK, alpha=0.25, label=f"{grey_runs} other run{'s' if grey_runs > 1 else ''}")
            )
        for metric, style in self.metrics.items():
            lines.append(Line2D([], [], color=INK, linestyle=style, label=_short(metric)))  # type: ignore[arg-type]
        peak = Line2D([], [], **ink, marker="*", markersize=11, label="peak")
        return [*lines, peak, *self._more(ink)]

    def _more(self, ink: Any) -> Iterator[Line2D]:
        """The marks that are there."""
        runs = [self.materials[run] for run in self.looks]
        ends = {run.ended for run in runs if run.ended not in ("closed", None) and not run.stopped_early}
        how = f" (ended: {_short(', '.join(sorted(filter(None, ends))))})" if ends else ""
        yield Line2D([], [], **ink, marker="o", label=f"last{how}")
        if any(run.stopped_early for run in runs):
            yield Line2D([], [], **ink, marker="|", markersize=12, label="stopped early")
        if len(self.materials) == 1:
            if 0 < len(_gone(runs[0])) <= _MOST_DOTS:
                yield Line2D([], [], **ink, marker=".", markerfacecolor="none", markersize=8, label="saved, gone since")
            if 0 < len(_there(runs[0])) <= _MOST_DOTS:
                yield Line2D([], [], **ink, marker=".", markersize=8, label="kept")
        if any(run.abandoned for run in runs):
            dots: Any = {"color": INK, "marker": "x", "markersize": 4, "linestyle": ":", "alpha": 0.5}
            yield Line2D([], [], **dots, label="abandoned branch")


@dataclass(frozen=True, slots=True)
class _Looks:
    """The colour and marker of each run, the same in every picture of a page."""

    given: dict[str, tuple[str, str]]

    def of(self, runs: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Those of the runs of one picture: new ones have a colour that it lacks, as long as there is one."""
        names = list(dict.fromkeys(runs))
        for run in sorted(run for run in names if run not in self.given):
            looks_in_picture = {look for name in names if name in self.given for look in self.given[name]}
            used = set(self.given.values())
            self.given[run] = min(
                _PAIRS, key=lambda pair: (pair in used, pair[0] in looks_in_picture, pair[1] in looks_in_picture)
            )
        return {run: self.given[run] for run in sorted(names)}


def _curves(title: str, judged: Sequence[RunPeak], materials: Mapping[str, RunData], given: _Looks) -> Panel:
    ranking = sorted(judged, key=lambda run_peak: run_peak.peak.best, reverse=judged[0].peak.mode == "max")
    looks = given.of(list(dict.fromkeys(run_peak.run for run_peak in ranking))[: len(_COLOURS)])
    data = {run_peak.run: materials[run_peak.run] for run_peak in ranking}
    by_epoch = all(run.counts_epochs() for run in data.values())
    curves = CurvePicture(title=title, judged=ranking, materials=data, looks=looks, by_epoch=by_epoch)
    name = f"{ranking[0].run}-{title}" if len(data) == 1 else title
    values = ", ".join(
        f"{run_peak.run} {run_peak.peak.metric}: best {run_peak.peak.best:.5g}, last {run_peak.peak.last:.5g}"
        for run_peak in ranking[:6]
    )
    return Panel(name=name, alt=printable(f"Curves of {title}. {values}"), draw=curves.draw, legend=curves.legend())


def _gone(run: RunData) -> list[Reported]:
    return [report for report in run.history if report.report in run.saved and report.report not in run.kept]


def _there(run: RunData) -> list[Reported]:
    return [report for report in run.history if report.report in run.kept]


def _scale(axes: Axes, drawn: Sequence[Sequence[float]]) -> None:
    """Let the first tenth of long curves run out of the picture: what happens near the peaks is to be seen."""
    later_values = [values[len(values) // 10 if len(values) >= _LONG else 0 :] for values in drawn]
    finite = [value for values in later_values for value in values if math.isfinite(value)]
    if finite and max(finite) > min(finite):
        margin = (max(finite) - min(finite)) * 0.06
        axes.set_ylim(min(finite) - margin, max(finite) + margin)


# --- accuracy against sparsity ------------------------------------------------------------------------------------


def _front(tradeoff: Tradeoff, looks_of_page: _Looks) -> Panel:
    looks = looks_of_page.of(point.run for point in tradeoff.spots)
    front = sorted((point for point in tradeoff.spots if point.on_front), key=lambda point: point.sparsity)

    def draw(axes: Axes) -> None:
        axes.set_title(_short(f"{tradeoff.metric} against {tradeoff.sparsity}", 80))
        axes.set_xlabel(_short(tradeoff.sparsity))
        axes.set_ylabel(_short(tradeoff.metric))
        steps = [run_peak.sparsity for run_peak in front], [run_peak.value for run_peak in front]
        axes.plot(*steps, color=INK, linewidth=1, drawstyle="steps-pre")
        for run_peak in tradeoff.spots:
            if abs(run_peak.value) < _LARGEST and abs(run_peak.sparsity) < _LARGEST:
                colour, shape = looks[run_peak.run]
                face, edge = (colour, INK) if run_peak.on_front else ("none", colour)
                style: Any = {"color": colour, "markerfacecolor": face, "markeredgecolor": edge}
                size = 8 if run_peak.on_front else 5
                axes.plot([run_peak.sparsity], [run_peak.value], shape, **style, markersize=size, zorder=size)

    legend = [Line2D([], [], color=INK, linewidth=1, label="front (filled): no other beats it")]
    for run, (colour, shape) in itertools.islice(looks.items(), 2 * len(_COLOURS)):
        legend.append(Line2D([], [], color=colour, marker=shape, linestyle="none", label=_short(run)))
    alt = (
        f"{tradeoff.metric} against {tradeoff.sparsity} of {len(tradeoff.spots)} checkpoints, {len(front)} on the front"
    )
    return Panel(name=f"{tradeoff.metric}-against-{tradeoff.sparsity}", alt=printable(alt), draw=draw, legend=legend)
