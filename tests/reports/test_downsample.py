"""Curves of fewer points: what must stay, stays."""

import math

from hypothesis import given
from hypothesis import strategies as st

from peakpoint.reports.evaluation.downsample import sparkline, thin

curves = st.lists(st.floats(), max_size=300)
anything = st.lists(st.one_of(st.floats(), st.sampled_from([0.0, 1.0, math.nan])), max_size=300)


def finite(points):
    return [y for _, y in points if math.isfinite(y)]


@given(anything, st.integers(5, 60))
def test_the_extremes_the_ends_and_the_order_stay(values, most):
    points = list(enumerate(values))
    thinned = thin(points, most)
    assert len(thinned) <= max(most, 5)
    assert [x for x, _ in thinned] == sorted({x for x, _ in thinned})
    clean = {x: y for x, y in points if math.isfinite(y)}
    assert all(clean[x] == y if x in clean else math.isnan(y) for x, y in thinned)
    assert [x for x, _ in thinned][:1] == [x for x, _ in points][:1]
    assert [x for x, _ in thinned][-1:] == [x for x, _ in points][-1:]
    if clean:
        assert max(finite(thinned)) == max(clean.values())
        assert min(finite(thinned)) == min(clean.values())
    assert any(math.isnan(y) for _, y in thinned) == any(not math.isfinite(y) for y in values)


@given(st.lists(st.floats(-1, 1), min_size=100, max_size=300), st.integers(20, 80))
def test_every_piece_keeps_its_extremes(values, most):
    """Against brute force: the largest of each piece is among what is left of the piece."""
    thinned = dict(thin(list(enumerate(values)), most))
    pieces = most // 5
    for piece in range(pieces if len(values) > most else 0):
        begin, end = len(values) * piece // pieces, len(values) * (piece + 1) // pieces
        left = [thinned[x] for x in range(begin, end) if x in thinned]
        assert max(left) == max(values[begin:end])
        assert min(left) == min(values[begin:end])


@given(curves, st.integers(1, 40))
def test_a_sparkline_has_its_width_and_shows_both_extremes(values, width):
    line = sparkline(values, width)
    numbers = [value for value in values if math.isfinite(value)]
    assert len(line) == (min(width, len(values)) if numbers else 0)
    assert set(line) <= set("▁▂▃▄▅▆▇█ ")
    if len(values) <= width and numbers and max(numbers) / 2 - min(numbers) / 2 > 0:
        assert {"▁", "█"} <= set(line)
