"""Pictures, drawn with Matplotlib: curves with their peaks, and accuracy against sparsity.

Colours are those of Okabe & Ito, "Color Universal Design", 2008, which people with any kind of colour vision tell
apart; runs also differ in their markers. The same values give the same bytes.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from peakpoint.evaluation.judging import Judged
from peakpoint.evaluation.material import Material
from peakpoint.evaluation.tables import printable
from peakpoint.evaluation.thinning import thin
from peakpoint.evaluation.tradeoff import Tradeoff
from peakpoint.journal import Reported

if TYPE_CHECKING:
    from peakpoint.evaluation import Evaluation

INK = "#1f1f1e"
"""The colour of everything that is no data; a page replaces it by its own."""

MARK = "peakpoint report"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SHAPES = ("o", "s", "^", "D", "v", "P")
_LARGEST = 1e100  # Matplotlib's own arithmetic overflows some way above
_MOST_DOTS = 100
_SPLIT = re.compile(r"(?:train|training|val|valid|validation|test|eval|dev)[_/.-](?=.)", re.IGNORECASE)
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,  # a metric may be called $x$
    "axes.unicode_minus": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",
    "svg.hashsalt": MARK,
    **dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "axes.titlecolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
        ),
        INK,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture.

    Attributes:
        name: of a file, without suffix.
        alt: what it shows, in words.
        draw: draws it and returns the legend.
    """

    name: str
    alt: str
    draw: Callable[[Axes], list[Line2D]]


def panels(found: "Evaluation", *, separate: bool = False) -> list[Panel]:
    """Every picture: one for each metric (train and validation together), and one for each trade-off.

    Args:
        found: what to show.
        separate: a picture for each run instead of all runs in one.
    """
    every = [one for one in found.peaks if one.window == 1]
    sets = [[run.name] for run in found.materials] if separate else [[run.name for run in found.materials]]
    made = []
    for names in sets:
        mine = [one for one in every if one.run in names]
        materials = {run.name: run for run in found.materials if run.name in names}
        for title in dict.fromkeys(_split_off(one.peak.metric) for one in mine):
            shown = [one for one in mine if _split_off(one.peak.metric) == title]
            made.append(_curves(title, shown, materials, alone=separate))
    return made + [_front(one) for one in found.tradeoffs]


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
    figure = Figure(figsize=(7.2, 3.9 * len(chosen)), layout="constrained", facecolor="white")
    places = [figure] if len(chosen) == 1 else list(figure.subfigures(len(chosen), 1, squeeze=False)[:, 0])
    for place, panel in zip(places, chosen, strict=True):
        _draw(place, panel)
    return figure


def _draw(place: Figure | SubFigure, panel: Panel) -> None:
    axes = place.subplots()
    handles = panel.draw(axes)
    # a label that begins with an underscore would be left out
    labels = [f"\u2009{text}" if (text := str(line.get_label())).startswith("_") else text for line in handles]
    columns = max(1, min(4, 84 // (max(map(len, labels), default=0) + 8)))
    place.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=8)


def _saved(figure: Figure, kind: str, *, transparent: bool) -> bytes:
    metadata = {"Creator": MARK, "Date": None} if kind == "svg" else {"Software": MARK}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, transparent=transparent, metadata=metadata)
    return buffer.getvalue()


# --- curves -------------------------------------------------------------------------------------------------------


def _split_off(metric: str) -> str:
    """``val_loss`` and ``train/loss`` are both about the ``loss``."""
    return _SPLIT.sub("", metric, count=1) if _SPLIT.match(metric) else metric


def _short(name: str, most: int = 40) -> str:
    shown = printable(name)
    return shown if len(shown) <= most else f"{shown[: most // 2 - 1]}…{shown[-most // 2 :]}"


def _curves(title: str, judged: Sequence[Judged], materials: dict[str, Material], *, alone: bool) -> Panel:
    ranking = sorted(judged, key=lambda one: one.peak.best, reverse=judged[0].peak.mode == "max")
    chosen = list(dict.fromkeys(one.run for one in ranking))[: len(_COLOURS)]
    colours = {name: number for number, name in enumerate(sorted(chosen))}
    by_epoch = all(materials[one.run].counts_epochs() for one in judged)
    name = f"{judged[0].run}-{title}" if alone else title
    shown = ", ".join(
        f"{one.run} {one.peak.metric}: best {one.peak.best:.5g}, last {one.peak.last:.5g}" for one in ranking[:6]
    )

    def draw(axes: Axes) -> list[Line2D]:
        axes.set_title(_short(name if alone else title, 80))
        axes.set_xlabel("epoch" if by_epoch else "step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles: list[Line2D] = []
        for one in sorted(judged, key=lambda one: one.run in colours):  # grey ones below
            handles += _one_run(axes, one, materials[one.run], title, colours.get(one.run), by_epoch=by_epoch)
        others = len({one.run for one in judged}) - len(chosen)
        if others:
            handles.append(Line2D([], [], color=INK, alpha=0.25, label=f"{others} other runs"))
        return handles + _marks([materials[name] for name in chosen])

    return Panel(name=name, alt=printable(f"Curves of {title}. {shown}"), draw=draw)


def _points(reports: Sequence[Reported], metric: str, *, by_epoch: bool) -> list[tuple[float, float]]:
    found = []
    for report in reports:
        if metric in report.metrics:
            value = report.metrics[metric]
            place = report.epoch if by_epoch else report.step
            found.append((float(place or 0), value if abs(value) < _LARGEST else math.nan))
    return thin(found)


def _one_run(
    axes: Axes, one: Judged, material: Material, title: str, number: int | None, *, by_epoch: bool
) -> list[Line2D]:
    metric = one.peak.metric
    colour, shape = (INK, "") if number is None else (_COLOURS[number], _SHAPES[number])
    style: dict[str, Any] = {"color": colour, "alpha": 0.25 if number is None else 1.0}
    handles: list[Line2D] = []

    def line(reports: Sequence[Reported], name: str, **how: Any) -> list[Line2D]:
        points = _points(reports, name, by_epoch=by_epoch)
        return axes.plot([x for x, _ in points], [y for _, y in points], **style | how)

    if number is not None:
        others = [name for name in material.metrics if name != metric and _split_off(name) == title]
        for other, dashes in zip(others, ("--", ":", "-."), strict=False):
            line(material.history, other, linestyle=dashes, linewidth=1.1)
            handles.append(Line2D([], [], **style | {"linestyle": dashes}, label=_short(f"{one.run}: {other}")))
        for branch in material.abandoned:
            line(branch, metric, linestyle=":", linewidth=1, alpha=0.5)
    line(material.history, metric, linewidth=1.6)
    if number is None:
        return []
    _dots(axes, material, metric, colour, by_epoch=by_epoch)
    peak = one.peak
    best, last = (peak.best_epoch, peak.last_epoch) if by_epoch else (peak.best_step, peak.last_step)
    if abs(peak.last) < _LARGEST:
        axes.plot([last or 0], [peak.last], shape, color=colour, markersize=7, markeredgecolor=INK, zorder=4)
    if abs(peak.best) < _LARGEST:
        axes.plot([best or 0], [peak.best], "*", color=colour, markersize=14, markeredgecolor=INK, zorder=5)
    return [Line2D([], [], color=colour, marker=shape, label=_short(f"{one.run}: {metric}")), *handles]


def _dots(axes: Axes, material: Material, metric: str, colour: str, *, by_epoch: bool) -> None:
    """What was saved, and what is kept, on the curve; no saved ones where they would be a thick line."""
    kept = [report for report in material.history if report.report in material.kept]
    gone = [r for r in material.history if r.report in material.saved and r.report not in material.kept]
    for reports, face in ((gone, "none"), (kept, colour)):
        points = _points(reports, metric, by_epoch=by_epoch) if len(reports) <= _MOST_DOTS else []
        axes.plot([x for x, _ in points], [y for _, y in points], ".", color=colour, markerfacecolor=face, markersize=7)


def _marks(materials: Sequence[Material]) -> list[Line2D]:
    """The legend of the marks that are there."""
    grey: dict[str, Any] = {"color": INK, "linestyle": "none"}
    marks = [Line2D([], [], **grey, marker="*", markersize=11, label="peak")]
    if len(materials) == 1:
        ended = materials[0].ended
        how = "" if ended in ("closed", None) else f" (ended: {printable(ended)})"
        marks.append(Line2D([], [], **grey, marker="o", label=f"last{how}"))
    counts = [(len(material.saved - set(material.kept)), len(material.kept)) for material in materials]
    if any(0 < gone <= _MOST_DOTS for gone, _ in counts):
        marks.append(
            Line2D([], [], **grey, marker=".", markerfacecolor="none", markersize=8, label="saved, gone since")
        )
    if any(0 < kept <= _MOST_DOTS for _, kept in counts):
        marks.append(Line2D([], [], **grey, marker=".", markersize=8, label="kept"))
    if any(material.abandoned for material in materials):
        marks.append(Line2D([], [], color=INK, linestyle=":", alpha=0.5, label="abandoned branch"))
    return marks


# --- accuracy against sparsity ------------------------------------------------------------------------------------


def _front(found: Tradeoff) -> Panel:
    def draw(axes: Axes) -> list[Line2D]:
        axes.set_title(_short(f"{found.metric} against {found.sparsity}", 80))
        axes.set_xlabel(_short(found.sparsity))
        axes.set_ylabel(_short(found.metric))
        front = sorted((one for one in found.spots if one.on_front), key=lambda one: one.sparsity)
        handles = axes.plot(
            [one.sparsity for one in front],
            [one.value for one in front],
            color=INK,
            linewidth=1,
            drawstyle="steps-pre",
            label="front: no other is as good in both",
        )
        runs = list(dict.fromkeys(one.run for one in found.spots))
        for number, run in enumerate(runs):
            at = number % len(_COLOURS)
            for on_front in (False, True):
                mine = [one for one in found.spots if one.run == run and one.on_front == on_front]
                axes.plot(
                    [one.sparsity for one in mine],
                    [one.value for one in mine],
                    _SHAPES[at],
                    color=_COLOURS[at],
                    markersize=8 if on_front else 5,
                    markeredgecolor=INK if on_front else _COLOURS[at],
                    markerfacecolor=_COLOURS[at] if on_front else "none",
                    zorder=3 + on_front,
                )
            if number < 2 * len(_COLOURS):
                shown: dict[str, Any] = {"color": _COLOURS[at], "marker": _SHAPES[at], "linestyle": "none"}
                handles.append(Line2D([], [], **shown, label=_short(run)))
        return handles

    front = sum(one.on_front for one in found.spots)
    alt = f"{found.metric} against {found.sparsity} of {len(found.spots)} checkpoints, {front} on the front"
    return Panel(name=f"{found.metric}-against-{found.sparsity}", alt=printable(alt), draw=draw)
