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


def panels(found: "Evaluation", *, separate: bool = False) -> list[Panel]:
    """Every picture: one for each metric (train and validation together), and one for each trade-off.

    Args:
        found: what to show.
        separate: a picture for each run instead of all runs in one.
    """
    materials = {run.name: run for run in found.runs}
    looks = _Looks({})
    made = []
    for names in [{name} for name in materials] if separate else [set(materials)]:
        groups: dict[str, list[RunPeak]] = {}
        for one in found.peaks:
            if one.window == 1 and one.run in names:
                groups.setdefault(_split_off(one.peak.metric), []).append(one)
        made += [_curves(title, shown, materials, looks) for title, shown in groups.items()]
    return made + [_front(one, looks) for one in found.tradeoffs]


def curve(material: RunData, metric: str, mode: Mode, here: tuple[int, int | None, float] | None) -> Panel | None:
    """The curve of one metric of one run, with its peak.

    Args:
        material: the run.
        metric: which metric.
        mode: its direction.
        here: step, epoch and value of a checkpoint to be marked.

    Returns:
        None when the metric never had a finite value.
    """
    judged = [one for one in run_peaks(material, metric, mode, Examples()) if one.window == 1]
    if not judged:
        return None
    panel = _curves(_split_off(metric), judged, {material.name: material}, _Looks({}))
    if here is None or not abs(here[2]) < _LARGEST:
        return panel
    step, epoch, value = here
    look: Any = {"marker": "o", "linestyle": "none", "color": INK, "markerfacecolor": "none", "markersize": 15}

    def draw(axes: Axes) -> None:
        panel.draw(axes)
        place = (epoch or 0) if material.counts_epochs() else step
        axes.plot([place], [value], **look, markeredgewidth=1.8, zorder=15)
        low, high = axes.get_ylim()
        low, high = min(low, value), max(high, value)
        room = (high - low) * 0.06
        axes.set_ylim(min(low, value - room), max(high, value + room))

    return replace(panel, draw=draw, legend=[*panel.legend, Line2D([], [], **look, label="this checkpoint")])


def svg(panel: Panel) -> str:
    """One picture as SVG without a background."""
    with _style():
        return _saved(_figure([panel]), "svg", transparent=True).decode()


def save(chosen: Sequence[Panel], suffix: str) -> bytes:
    """Pictures below one another in one file, on white.

    Args:
        chosen: at least one.
        suffix: ``".png"`` or ``".svg"``.
    """
    with _style():
        return _saved(_figure(chosen), suffix.removeprefix("."), transparent=False)


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # letters that the font lacks: a browser finds them elsewhere, a PNG shows boxes
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        yield


def _figure(chosen: Sequence[Panel]) -> Figure:
    """Pictures below one another, each as high as its legend needs."""
    columns = [_columns(panel.legend) for panel in chosen]
    heights = [3.5 + 0.19 * math.ceil(len(one.legend) / count) for one, count in zip(chosen, columns, strict=True)]
    figure = Figure(figsize=(7.2, sum(heights)), layout="constrained", facecolor="white")
    places: list[Figure | SubFigure] = [figure]
    if len(chosen) > 1:
        places = list(figure.subfigures(len(chosen), 1, squeeze=False, height_ratios=heights)[:, 0])
    for place, panel, count in zip(places, chosen, columns, strict=True):
        panel.draw(place.subplots())
        # a label that begins with an underscore would be left out
        texts = [str(line.get_label()) for line in panel.legend]
        labels = [f"\u2009{text}" if text.startswith("_") else text for text in texts]
        place.legend(panel.legend, labels, loc="outside lower left", ncols=count, frameon=False, fontsize=8)
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


def _short(name: str, most: int = 40) -> str:
    shown = printable(name)
    return shown if len(shown) <= most else f"{shown[: most // 2 - 1]}…{shown[-most // 2 :]}"


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
        solid = dict.fromkeys(one.peak.metric for one in self.judged)
        names = dict.fromkeys(name for run in self.looks for name in self.materials[run].metrics)
        others = [name for name in names if name not in solid and _split_off(name) == self.title]
        return dict(zip([*solid, *others], [*("-" for _ in solid), *("--", ":", "-.")], strict=False))

    def draw(self, axes: Axes) -> None:
        """Grey runs below, coloured ones above, their peaks on top."""
        axes.set_title(_short(self.title if len(self.materials) > 1 else f"{next(iter(self.looks))}: {self.title}", 80))
        axes.set_xlabel("epoch" if self.by_epoch else "step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        drawn = [self._line(axes, one, name) for one in self.judged for name in self._names(one)]
        _scale(axes, drawn)
        low, high = axes.get_xlim()
        if high >= _MANY_STEPS:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        elif high - low < 1:
            axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)  # one report
        for one in self.judged:
            if one.run in self.looks:
                self._marks(axes, one)

    def _names(self, one: RunPeak) -> list[str]:
        """The lines of a run: its metric, and the other splits' when it has a colour."""
        own = self.materials[one.run].metrics
        others = [name for name, style in self.metrics.items() if style != "-" and name in own]
        return [one.peak.metric, *others] if one.run in self.looks else [one.peak.metric]

    def _line(self, axes: Axes, one: RunPeak, metric: str) -> Sequence[float]:
        """Draw a line; returns its values."""
        material = self.materials[one.run]
        style: Any = {"linestyle": self.metrics[metric], "linewidth": 1.6 if metric == one.peak.metric else 1.1}
        if one.run in self.looks:
            style["color"] = colour = self.looks[one.run][0]
            for branch in material.abandoned if metric == one.peak.metric else ():
                dots: Any = {"color": colour, "markersize": 4, "linewidth": 1, "alpha": 0.6, "zorder": 6}
                axes.plot(*self._points(branch, metric), "x:", **dots)
        else:
            style |= {"color": INK, "alpha": max(0.02, min(0.25, 5 / len(self.materials))), "zorder": 1}
        places, values = self._points(material.history, metric)
        axes.plot(places, values, **style)
        return values

    def _points(self, reports: Iterable[Reported], metric: str) -> tuple[list[float], list[float]]:
        """Places and values."""
        found = []
        for report in reports:
            if metric in report.metrics:
                value = report.metrics[metric]
                place = report.epoch if self.by_epoch else report.step
                found.append((float(place or 0), value if abs(value) < _LARGEST else math.nan))
        points = thin(found)
        return [x for x, _ in points], [y for _, y in points]

    def _marks(self, axes: Axes, one: RunPeak) -> None:
        peak, colour, shape = one.peak, *self.looks[one.run]
        for reports, face in ((_gone(self.materials[one.run]), "none"), (_there(self.materials[one.run]), colour)):
            if len(self.materials) == 1 and len(reports) <= _MOST_DOTS:
                axes.plot(*self._points(reports, peak.metric), ".", color=colour, markerfacecolor=face, markersize=7)
        best, last = (peak.best_epoch, peak.last_epoch) if self.by_epoch else (peak.best_step, peak.last_step)
        for place, value, mark, area in ((last, peak.last, shape, 7), (best, peak.best, "*", 14)):
            if abs(value) < _LARGEST:
                axes.plot([place or 0], [value], mark, color=colour, markersize=area, markeredgecolor=INK, zorder=area)
        if self.materials[one.run].stopped_early and abs(peak.last) < _LARGEST:
            axes.plot([last or 0], [peak.last], "|", color=INK, markersize=22, markeredgewidth=1.5, zorder=6)

    def legend(self) -> list[Line2D]:
        """Runs by colour and marker, metrics by the kind of line, then the marks."""
        ink: Any = {"color": INK, "linestyle": "none"}
        looks = self.looks.items()
        shown = [Line2D([], [], color=colour, marker=mark, label=_short(run)) for run, (colour, mark) in looks]
        others = len({one.run for one in self.judged}) - len(shown)
        if others:
            shown.append(Line2D([], [], color=INK, alpha=0.25, label=f"{others} other run{'s' if others > 1 else ''}"))
        for metric, style in self.metrics.items():
            shown.append(Line2D([], [], color=INK, linestyle=style, label=_short(metric)))  # type: ignore[arg-type]
        peak = Line2D([], [], **ink, marker="*", markersize=11, label="peak")
        return [*shown, peak, *self._more(ink)]

    def _more(self, ink: Any) -> Iterator[Line2D]:
        """The marks that are there."""
        materials = [self.materials[run] for run in self.looks]
        ends = {one.ended for one in materials if one.ended not in ("closed", None) and not one.stopped_early}
        how = f" (ended: {_short(', '.join(sorted(filter(None, ends))))})" if ends else ""
        yield Line2D([], [], **ink, marker="o", label=f"last{how}")
        if any(one.stopped_early for one in materials):
            yield Line2D([], [], **ink, marker="|", markersize=12, label="stopped early")
        if len(self.materials) == 1:
            if 0 < len(_gone(materials[0])) <= _MOST_DOTS:
                yield Line2D([], [], **ink, marker=".", markerfacecolor="none", markersize=8, label="saved, gone since")
            if 0 < len(_there(materials[0])) <= _MOST_DOTS:
                yield Line2D([], [], **ink, marker=".", markersize=8, label="kept")
        if any(material.abandoned for material in materials):
            dots: Any = {"color": INK, "marker": "x", "markersize": 4, "linestyle": ":", "alpha": 0.5}
            yield Line2D([], [], **dots, label="abandoned branch")


@dataclass(frozen=True, slots=True)
class _Looks:
    """The colour and marker of each run, the same in every picture of a page."""

    given: dict[str, tuple[str, str]]

    def of(self, runs: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Those of the runs of one picture: new ones have a colour that it lacks, as long as there is one."""
        chosen = list(dict.fromkeys(runs))
        for run in sorted(run for run in chosen if run not in self.given):
            here = {what for one in chosen if one in self.given for what in self.given[one]}
            taken = set(self.given.values())
            self.given[run] = min(_PAIRS, key=lambda pair: (pair in taken, pair[0] in here, pair[1] in here))
        return {run: self.given[run] for run in sorted(chosen)}


def _curves(title: str, judged: Sequence[RunPeak], materials: Mapping[str, RunData], given: _Looks) -> Panel:
    ranking = sorted(judged, key=lambda one: one.peak.best, reverse=judged[0].peak.mode == "max")
    looks = given.of(list(dict.fromkeys(one.run for one in ranking))[: len(_COLOURS)])
    mine = {one.run: materials[one.run] for one in ranking}
    by_epoch = all(material.counts_epochs() for material in mine.values())
    curves = CurvePicture(title=title, judged=ranking, materials=mine, looks=looks, by_epoch=by_epoch)
    name = f"{ranking[0].run}-{title}" if len(mine) == 1 else title
    shown = ", ".join(
        f"{one.run} {one.peak.metric}: best {one.peak.best:.5g}, last {one.peak.last:.5g}" for one in ranking[:6]
    )
    return Panel(name=name, alt=printable(f"Curves of {title}. {shown}"), draw=curves.draw, legend=curves.legend())


def _gone(material: RunData) -> list[Reported]:
    return [one for one in material.history if one.report in material.saved and one.report not in material.kept]


def _there(material: RunData) -> list[Reported]:
    return [one for one in material.history if one.report in material.kept]


def _scale(axes: Axes, drawn: Sequence[Sequence[float]]) -> None:
    """Let the first tenth of long curves run out of the picture: what happens near the peaks is to be seen."""
    late = [values[len(values) // 10 if len(values) >= _LONG else 0 :] for values in drawn]
    finite = [value for values in late for value in values if math.isfinite(value)]
    if finite and max(finite) > min(finite):
        room = (max(finite) - min(finite)) * 0.06
        axes.set_ylim(min(finite) - room, max(finite) + room)


# --- accuracy against sparsity ------------------------------------------------------------------------------------


def _front(found: Tradeoff, given: _Looks) -> Panel:
    looks = given.of(one.run for one in found.spots)
    front = sorted((one for one in found.spots if one.on_front), key=lambda one: one.sparsity)

    def draw(axes: Axes) -> None:
        axes.set_title(_short(f"{found.metric} against {found.sparsity}", 80))
        axes.set_xlabel(_short(found.sparsity))
        axes.set_ylabel(_short(found.metric))
        steps = [one.sparsity for one in front], [one.value for one in front]
        axes.plot(*steps, color=INK, linewidth=1, drawstyle="steps-pre")
        for one in found.spots:
            if abs(one.value) < _LARGEST and abs(one.sparsity) < _LARGEST:
                colour, shape = looks[one.run]
                face, edge = (colour, INK) if one.on_front else ("none", colour)
                style: Any = {"color": colour, "markerfacecolor": face, "markeredgecolor": edge}
                size = 8 if one.on_front else 5
                axes.plot([one.sparsity], [one.value], shape, **style, markersize=size, zorder=size)

    legend = [Line2D([], [], color=INK, linewidth=1, label="front (filled): no other beats it")]
    for run, (colour, shape) in itertools.islice(looks.items(), 2 * len(_COLOURS)):
        legend.append(Line2D([], [], color=colour, marker=shape, linestyle="none", label=_short(run)))
    alt = f"{found.metric} against {found.sparsity} of {len(found.spots)} checkpoints, {len(front)} on the front"
    return Panel(name=f"{found.metric}-against-{found.sparsity}", alt=printable(alt), draw=draw, legend=legend)
