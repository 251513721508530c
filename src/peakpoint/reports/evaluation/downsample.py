"""Fewer points of a curve, with its peaks."""

import itertools
import math
from collections.abc import Iterator, Sequence

Points = Sequence[tuple[float, float]]


def thin(points: Points, limit: int = 2000) -> Points:
    """Return a curve with at most about ``limit`` points that looks the same when drawn ``limit / 4`` pixels wide.

    Of each piece of the curve the first, the last, the smallest and the largest finite value stay, so no extreme of the
    whole and of any piece is lost; a piece with a gap in it keeps one gap.

    Source: M4 aggregation, Jugel, Jerzak, Hackenbroich & Markl, VLDB 2014: with one piece for each column of pixels the
    drawn line is the same as that of all points.

    Args:
        points: places and values, in order; values may be NaN or infinite, which is a gap.
        limit: at least 5; curves of no more points stay as they are, but for infinities, which become NaN.

    Example:
        >>> thin([(x, float(x == 7)) for x in range(1000)], limit=10)[:3]
        [(0, 0.0), (7, 1.0), (499, 0.0)]
    """
    clean = [(x, y if math.isfinite(y) else math.nan) for x, y in points]
    if len(clean) <= limit:
        return clean
    pieces = _pieces(len(clean), max(1, limit // 5))
    return [clean[index] for begin, end in pieces for index in sorted(set(_notable(clean, begin, end)))]


def _pieces(count: int, pieces: int) -> Iterator[tuple[int, int]]:
    """Return where each of so many pieces of equal length begins and ends."""
    return itertools.pairwise(count * piece // pieces for piece in range(pieces + 1))


def _notable(points: Points, begin: int, end: int) -> Iterator[int]:
    yield from (begin, end - 1)
    finite = [index for index in range(begin, end) if not math.isnan(points[index][1])]
    if finite:
        yield min(finite, key=lambda index: points[index][1])
        yield max(finite, key=lambda index: points[index][1])
    yield from [index for index in range(begin, end) if math.isnan(points[index][1])][:1]


_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Draw a curve in one line of text: the extreme of each piece that is farther from the middle of the curve.

    Example:
        >>> sparkline([0, 1, 2, 3, 2, float("nan"), 0])
        '▁▃▆█▆ ▁'
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    middle = low / 2 + high / 2
    bars = []
    for begin, end in _pieces(len(values), min(width, len(values))):
        piece = [value for value in values[begin:end] if math.isfinite(value)]
        if not piece:
            bars.append(" ")
            continue
        extreme = max(piece, key=lambda value: abs(value - middle))
        reach = high / 2 - low / 2  # halves, so that nothing overflows
        share = (extreme / 2 - low / 2) / reach if reach > 0 else 0
        bars.append(_BARS[min(len(_BARS) - 1, round(share * (len(_BARS) - 1)))])
    return "".join(bars)
