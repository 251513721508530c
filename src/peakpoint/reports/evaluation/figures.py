"""Pictures, drawn with Matplotlib: curves with their peaks, and accuracy against sparsity.

Colours are those of Okabe & Ito, "Color Universal Design", 2008, which people with any kind of colour vision tell
apart; runs also differ in their markers. The same values give the same bytes.
"""

import io
import itertools
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from peakpoint.errors import printable
from peakpoint.format.events import Reported
from peakpoint.reports.evaluation.downsample import thin
from peakpoint.reports.evaluation.result import Evaluation
from peakpoint.reports.evaluation.run_data import RunData
from peakpoint.reports.evaluation.sparsity import Tradeoff
from peakpoint.reports.evaluation.tables import front_of
from peakpoint.rules import Mode
from peakpoint.rules.peaks import Peak, peaks

_STYLE = mpl.rc_params_from_file(
    str(files("peakpoint.reports.evaluation") / "figures.mplstyle"), use_default_template=False
)
INK = str(_STYLE["text.color"])
"""The colour of everything that is no data; a page replaces it by its own."""

MARK = "peakpoint report"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SHAPES = ("o", "s", "^", "D", "v", "P")
_PAIRS = [
    (colour, _SHAPES[(index + shift) % len(_SHAPES)])
    for shift in range(len(_SHAPES))
    for index, colour in enumerate(_COLOURS)
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


def panels(evaluation: Evaluation, *, separate: bool = False) -> list[Panel]:
    """Return every picture: one for each metric (train and validation together), and one for each trade-off.

    Args:
        separate: a picture for each run instead of all runs in one.
    """
    runs = {run.name: run for run in evaluation.runs}
    looks = RunLooks({})
    drawn_panels = []
    for names in [{name} for name in runs] if separate else [set(runs)]:
        pictures: defaultdict[str, list[Curve]] = defaultdict(list)
        for run_peak in evaluation.peaks:
            if run_peak.window == 1 and run_peak.run in names:
                pictures[_topic(run_peak.peak.metric)].append(Curve(runs[run_peak.run], run_peak.peak))
        drawn_panels += [_curves(title, curves, looks) for title, curves in pictures.items()]
    return drawn_panels + [_front(tradeoff, looks) for tradeoff in evaluation.tradeoffs]


def curve(run: RunData, metric: str, mode: Mode, marked: tuple[int, int | None, float] | None) -> Panel | None:
    """Draw the curve of one metric of one run, with its peak; None when the metric never had a finite value.

    Args:
        marked: step, epoch and value of a checkpoint to be marked.
    """
    run_peaks = peaks(run.history, [(metric, mode)])
    if not run_peaks:
        return None
    panel = _curves(_topic(metric), [Curve(run, run_peaks[0])], RunLooks({}))
    if marked is None or not abs(marked[2]) < _LARGEST:
        return panel
    step, epoch, value = marked
    style: Any = {"marker": "o", "linestyle": "none", "color": INK, "markerfacecolor": "none", "markersize": 15}

    def draw(axes: Axes) -> None:
        panel.draw(axes)
        place = (epoch or 0) if run.counts_epochs() else step
        axes.plot([place], [value], **style, markeredgewidth=1.8, zorder=15)
        low, high = axes.get_ylim()
        low, high = min(low, value), max(high, value)
        margin = (high - low) * 0.06
        axes.set_ylim(min(low, value - margin), max(high, value + margin))

    return replace(panel, draw=draw, legend=[*panel.legend, Line2D([], [], **style, label="this checkpoint")])


def svg(panel: Panel) -> str:
    """Return one picture as SVG without a background."""
    return _saved([panel], "svg", transparent=True).decode()


def save(panels_of_file: Sequence[Panel], suffix: str) -> bytes:
    """Return pictures below one another in one file, on white; the suffix is ``".png"`` or ``".svg"``."""
    return _saved(panels_of_file, suffix.removeprefix("."), transparent=False)


def _saved(panels_of_file: Sequence[Panel], kind: str, *, transparent: bool) -> bytes:
    metadata = {"Creator": MARK, "Date": None} if kind == "svg" else {"Software": MARK}
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # letters that the font lacks: a browser finds them elsewhere, a PNG shows boxes
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        figure = _figure(panels_of_file)
        figure.savefig(buffer, format=kind, dpi=120, transparent=transparent, metadata=metadata)
    return buffer.getvalue()


def _figure(panels_of_file: Sequence[Panel]) -> Figure:
    """Draw pictures below one another, each as high as its legend needs."""
    labels = [[str(line.get_label()) for line in panel.legend] for panel in panels_of_file]
    columns = [max(1, min(4, 100 // (max(map(len, texts), default=0) + 8))) for texts in labels]
    heights = [3.5 + 0.19 * math.ceil(len(texts) / count) for texts, count in zip(labels, columns, strict=True)]
    figure = Figure(figsize=(7.2, sum(heights)), layout="constrained", facecolor="white")
    subfigures: list[Figure | SubFigure] = [figure]
    if len(panels_of_file) > 1:
        subfigures = list(figure.subfigures(len(panels_of_file), 1, squeeze=False, height_ratios=heights)[:, 0])
    for subfigure, panel, texts, count in zip(subfigures, panels_of_file, labels, columns, strict=True):
        panel.draw(subfigure.subplots())
        # a label that begins with an underscore would be left out
        shown_texts = [f"\u2009{text}" if text.startswith("_") else text for text in texts]
        subfigure.legend(panel.legend, shown_texts, loc="outside lower left", ncols=count, frameon=False, fontsize=8)
    return figure


# --- curves -------------------------------------------------------------------------------------------------------


def _topic(metric: str) -> str:
    """Return what a metric is about: ``val_loss`` and ``train/loss`` are both about the ``loss``."""
    return _SPLIT.sub("", metric, count=1) if _SPLIT.match(metric) else metric


def _short(name: str, limit: int = 40) -> str:
    text = printable(name)
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-limit // 2 :]}"


class Curve(NamedTuple):
    """One metric of one run, with its peak."""

    run: RunData
    peak: Peak


@dataclass(frozen=True, slots=True)
class CurvePicture:
    """One metric of some runs, with that of the other splits.

    Attributes:
        title: what the metrics are about.
        curves: the best first.
        runs: by name.
        looks: the colour and marker of those runs that have some of their own, by name.
        by_epoch: whether epochs stand below, or steps.
    """

    title: str
    curves: Sequence[Curve]
    runs: Mapping[str, RunData]
    looks: Mapping[str, tuple[str, str]]
    by_epoch: bool

    @property
    def metrics(self) -> dict[str, str]:
        """How the line of each metric is drawn: those with a peak are solid."""
        solid = dict.fromkeys(curve.peak.metric for curve in self.curves)
        names = dict.fromkeys(name for run in self.looks for name in self.runs[run].metrics)
        dashed = [name for name in names if name not in solid and _topic(name) == self.title]
        return dict.fromkeys(solid, "-") | dict(zip(dashed, ("--", ":", "-."), strict=False))

    def draw(self, axes: Axes) -> None:
        """Draw grey runs below, coloured ones above, their peaks on top."""
        axes.set_title(_short(self.title if len(self.runs) > 1 else f"{next(iter(self.looks))}: {self.title}", 80))
        axes.set_xlabel("epoch" if self.by_epoch else "step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        _scale(axes, [values for curve in self.curves for values in self._lines(axes, curve)])
        low, high = axes.get_xlim()
        if high >= _MANY_STEPS:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        elif high - low < 1:
            axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)  # one report
        for curve in self.curves:
            if curve.run.name in self.looks:
                self._marks(axes, *curve)

    def _lines(self, axes: Axes, curve: Curve) -> Iterator[Sequence[float]]:
        """Draw a run: its metric, and the other splits' when it has a colour; yield the values of each line."""
        run, judged = curve.run, curve.peak.metric
        if run.name not in self.looks:
            alpha = max(0.02, min(0.25, 5 / len(self.runs)))
            yield self._line(axes, run.history, judged, color=INK, alpha=alpha, zorder=1, linewidth=1.6)
            return
        colour, _ = self.looks[run.name]
        for branch in run.abandoned:
            dots: Any = {"color": colour, "markersize": 4, "linewidth": 1, "alpha": 0.6, "zorder": 6}
            axes.plot(*self._points(branch, judged), "x:", **dots)
        yield self._line(axes, run.history, judged, color=colour, linewidth=1.6)
        for metric, style in self.metrics.items():
            if style != "-" and metric in run.metrics:
                yield self._line(axes, run.history, metric, color=colour, linewidth=1.1)

    def _line(self, axes: Axes, reports: Iterable[Reported], metric: str, **style: Any) -> Sequence[float]:
        places, values = self._points(reports, metric)
        axes.plot(places, values, linestyle=self.metrics[metric], **style)
        return values

    def _points(self, reports: Iterable[Reported], metric: str) -> tuple[list[float], list[float]]:
        """Return places and values."""
        values_at = [
            (float((report.epoch if self.by_epoch else report.step) or 0), report.metrics[metric])
            for report in reports
            if metric in report.metrics
        ]
        points = thin([(place, value if abs(value) < _LARGEST else math.nan) for place, value in values_at])
        return [x for x, _ in points], [y for _, y in points]

    def _marks(self, axes: Axes, run: RunData, peak: Peak) -> None:
        colour, shape = self.looks[run.name]
        for kept, face in ((False, "none"), (True, colour)) if len(self.runs) == 1 else ():
            reports = _saved_reports(run, kept=kept)
            if len(reports) <= _MOST_DOTS:
                axes.plot(*self._points(reports, peak.metric), ".", color=colour, markerfacecolor=face, markersize=7)
        best, last = (peak.best_epoch, peak.last_epoch) if self.by_epoch else (peak.best_step, peak.last_step)
        for place, value, mark, area in ((last, peak.last, shape, 7), (best, peak.best, "*", 14)):
            if abs(value) < _LARGEST:
                axes.plot([place or 0], [value], mark, color=colour, markersize=area, markeredgecolor=INK, zorder=area)
        if run.stopped_early and abs(peak.last) < _LARGEST:
            axes.plot([last or 0], [peak.last], "|", color=INK, markersize=22, markeredgewidth=1.5, zorder=6)

    def legend(self) -> Iterator[Line2D]:
        """Yield runs by colour and marker, metrics by the kind of line, then the marks."""
        ink: Any = {"color": INK, "linestyle": "none"}
        runs = [self.runs[name] for name in self.looks]
        for name, (colour, mark) in self.looks.items():
            yield Line2D([], [], color=colour, marker=mark, label=_short(name))
        if grey := len(self.runs) - len(runs):
            yield Line2D([], [], color=INK, alpha=0.25, label=f"{grey} other run{'s' if grey > 1 else ''}")
        for metric, style in self.metrics.items():
            yield Line2D([], [], color=INK, linestyle=style, label=_short(metric))  # type: ignore[arg-type]
        yield Line2D([], [], **ink, marker="*", markersize=11, label="peak")
        ends = {run.ended for run in runs if run.ended not in ("closed", None) and not run.stopped_early}
        how = f" (ended: {_short(', '.join(sorted(filter(None, ends))))})" if ends else ""
        yield Line2D([], [], **ink, marker="o", label=f"last{how}")
        if any(run.stopped_early for run in runs):
            yield Line2D([], [], **ink, marker="|", markersize=12, label="stopped early")
        for kept, face, label in ((False, "none", "saved, gone since"), (True, INK, "kept")):
            if len(self.runs) == 1 and 0 < len(_saved_reports(runs[0], kept=kept)) <= _MOST_DOTS:
                yield Line2D([], [], **ink, marker=".", markerfacecolor=face, markersize=8, label=label)
        if any(run.abandoned for run in runs):
            dots: Any = {"color": INK, "marker": "x", "markersize": 4, "linestyle": ":", "alpha": 0.5}
            yield Line2D([], [], **dots, label="abandoned branch")


@dataclass(frozen=True, slots=True)
class RunLooks:
    """The colour and marker of each run, the same in every picture of a page."""

    by_run: dict[str, tuple[str, str]]

    def of(self, runs: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Return those of the runs of one picture: new ones have a colour that it lacks, as long as there is one."""
        names = list(dict.fromkeys(runs))
        for run in sorted(run for run in names if run not in self.by_run):
            looks_in_picture = {look for name in names if name in self.by_run for look in self.by_run[name]}
            used = set(self.by_run.values())
            self.by_run[run] = min(
                _PAIRS, key=lambda pair: (pair in used, pair[0] in looks_in_picture, pair[1] in looks_in_picture)
            )
        return {run: self.by_run[run] for run in sorted(names)}


def _curves(title: str, curves: Sequence[Curve], looks_of_page: RunLooks) -> Panel:
    ranking = sorted(curves, key=lambda curve: curve.peak.best, reverse=curves[0].peak.mode == "max")
    runs = {curve.run.name: curve.run for curve in ranking}
    picture = CurvePicture(
        title=title,
        curves=ranking,
        runs=runs,
        looks=looks_of_page.of(list(runs)[: len(_COLOURS)]),
        by_epoch=all(run.counts_epochs() for run in runs.values()),
    )
    name = f"{ranking[0].run.name}-{title}" if len(runs) == 1 else title
    values = ", ".join(
        f"{run.name} {peak.metric}: best {peak.best:.5g}, last {peak.last:.5g}" for run, peak in ranking[:6]
    )
    alt = printable(f"Curves of {title}. {values}")
    return Panel(name=name, alt=alt, draw=picture.draw, legend=list(picture.legend()))


def _saved_reports(run: RunData, *, kept: bool) -> list[Reported]:
    """Return the reports that became checkpoints which still exist, or which are gone."""
    return [
        report
        for report in run.history
        if (report.report in run.kept if kept else report.report in run.saved and report.report not in run.kept)
    ]


def _scale(axes: Axes, drawn: Sequence[Sequence[float]]) -> None:
    """Let the first tenth of long curves run out of the picture: what happens near the peaks is to be seen."""
    later_values = [values[len(values) // 10 if len(values) >= _LONG else 0 :] for values in drawn]
    finite = [value for values in later_values for value in values if math.isfinite(value)]
    if finite and max(finite) > min(finite):
        margin = (max(finite) - min(finite)) * 0.06
        axes.set_ylim(min(finite) - margin, max(finite) + margin)


# --- accuracy against sparsity ------------------------------------------------------------------------------------


def _front(tradeoff: Tradeoff, looks_of_page: RunLooks) -> Panel:
    looks = looks_of_page.of(point.run for point in tradeoff.spots)
    front = front_of(tradeoff)

    def draw(axes: Axes) -> None:
        axes.set_title(_short(f"{tradeoff.metric} against {tradeoff.sparsity}", 80))
        axes.set_xlabel(_short(tradeoff.sparsity))
        axes.set_ylabel(_short(tradeoff.metric))
        steps = [point.sparsity for point in front], [point.value for point in front]
        axes.plot(*steps, color=INK, linewidth=1, drawstyle="steps-pre")
        for point in tradeoff.spots:
            if abs(point.value) < _LARGEST and abs(point.sparsity) < _LARGEST:
                colour, shape = looks[point.run]
                face, edge, size = (colour, INK, 8) if point.on_front else ("none", colour, 5)
                style: Any = {"color": colour, "markerfacecolor": face, "markeredgecolor": edge}
                axes.plot([point.sparsity], [point.value], shape, **style, markersize=size, zorder=size)

    legend = [Line2D([], [], color=INK, linewidth=1, label="front (filled): no other beats it")]
    for run, (colour, shape) in itertools.islice(looks.items(), 2 * len(_COLOURS)):
        legend.append(Line2D([], [], color=colour, marker=shape, linestyle="none", label=_short(run)))
    alt = (
        f"{tradeoff.metric} against {tradeoff.sparsity} of {len(tradeoff.spots)} checkpoints, {len(front)} on the front"
    )
    return Panel(name=f"{tradeoff.metric}-against-{tradeoff.sparsity}", alt=printable(alt), draw=draw, legend=legend)
