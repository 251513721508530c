"""What is packed comes back bit for bit, whatever it is; what was not packed by us is refused."""

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from peakpoint.errors import CorruptError
from peakpoint.repository.packs.codec import bases_of, pack, unpack

WIDTHS = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "": 1,
}  # fmt: skip


@st.composite
def neighbours(draw):
    """An element type, bytes of it, and up to two neighbours: random, close, equal, with zeros, with odd bits."""
    dtype = draw(st.sampled_from(list(WIDTHS)))
    count = draw(st.integers(0, 300))
    size = count * WIDTHS[dtype]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["random", "close", "same", "zeros", "odd"]))
    data = rng.bytes(size)
    bases = []
    for _ in range(draw(st.integers(0, 2))):
        base = np.frombuffer(data, np.uint8).copy()
        if kind == "random":
            base = np.frombuffer(rng.bytes(size), np.uint8).copy()
        elif kind != "same" and size:
            base[:: WIDTHS[dtype]] += rng.integers(0, 3, len(base[:: WIDTHS[dtype]])).astype(np.uint8)
        bases.append(base)
    if kind == "zeros":
        gone = rng.random(count) < draw(st.floats(0, 1))
        for array in [np.frombuffer(data, np.uint8).copy(), *bases]:
            array.reshape(count, WIDTHS[dtype])[gone] = 0
        cleared = np.frombuffer(data, np.uint8).copy()
        cleared.reshape(count, WIDTHS[dtype])[gone] = 0
        data = cleared.tobytes()
    if kind == "odd" and dtype == "F32" and count:
        values = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45], np.float32)
        data = rng.choice(values, count).astype(np.float32).tobytes()
    return dtype, data, [base.tobytes() for base in bases]


@given(neighbours())
@settings(max_examples=400, deadline=None)
def test_everything_comes_back_bit_for_bit(given_):
    dtype, data, bases = given_
    method, packed = pack(data, dtype, bases)
    assert bases_of(method) <= len(bases)
    assert unpack(packed, dtype, method, len(data), bases) == data
    assert unpack(packed, dtype, method, len(data), bases[: bases_of(method)]) == data


@given(neighbours(), st.data())
@settings(max_examples=200, deadline=None)
def test_damage_never_makes_more_bytes_than_were_asked_for_and_never_another_error(given_, chosen):
    dtype, data, bases = given_
    method, packed = pack(data, dtype, bases)
    if not packed:
        return
    broken = bytearray(packed)
    for _ in range(3):
        broken[chosen.draw(st.integers(0, len(broken) - 1))] ^= chosen.draw(st.integers(1, 255))
    del broken[chosen.draw(st.integers(0, len(broken))) :]
    try:
        found = unpack(bytes(broken), dtype, method, len(data), bases)
    except CorruptError:
        return
    assert len(found) == len(data)


def test_large_tensors_are_sampled_and_come_back():
    rng = np.random.default_rng(0)
    first = rng.normal(size=300_000).astype(np.float32)
    second = first + rng.normal(size=300_000).astype(np.float32) * np.float32(1e-4)
    third = second + (second - first)
    method, packed = pack(third.tobytes(), "F32", [second.tobytes(), first.tobytes()])
    assert method == "trend"
    assert len(packed) < 0.3 * third.nbytes
    assert unpack(packed, "F32", method, third.nbytes, [second.tobytes(), first.tobytes()]) == third.tobytes()


def test_what_each_kind_of_closeness_saves():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=100_000).astype(np.float32)
    moved = weights * np.float32(1 + 1e-5)
    pruned, before = weights.copy(), moved.copy()
    gone = rng.random(100_000) < 0.7
    pruned[gone] = before[gone] = 0
    alone = len(pack(weights.tobytes(), "F32")[1])
    method, near = pack(moved.tobytes(), "F32", [weights.tobytes()])
    assert (method, len(near) < 0.5 * alone) == ("delta", True)
    method, sparse = pack(pruned.tobytes(), "F32")
    assert (method, len(sparse) < 0.4 * alone) == ("plain-sparse", True)
    method, both = pack(pruned.tobytes(), "F32", [before.tobytes()])
    assert (method, len(both) < 0.5 * len(sparse)) == ("delta-sparse", True)
    assert pack(weights.tobytes(), "F32", [weights.tobytes()]) == ("same", b"")


def test_neighbours_that_are_missing_or_of_another_size_are_refused():
    data = np.arange(100, dtype=np.float32)
    method, packed = pack(data.tobytes(), "F32", [(data + 1).tobytes()])
    assert bases_of(method) == 1
    for bases in ([], [b""], [bytes(399)]):
        with pytest.raises(CorruptError, match="neighbours"):
            unpack(packed, "F32", method, data.nbytes, bases)


def test_a_bomb_is_refused_before_it_is_unpacked():
    bomb = zstandard.ZstdCompressor().compress(bytes(10**8))
    with pytest.raises(CorruptError, match="another size"):
        unpack(bomb, "", "raw", 1000)
    with pytest.raises(CorruptError, match="another size"):
        unpack(bomb, "F32", "plain", 1000)


def test_methods_of_a_newer_release_are_refused():
    with pytest.raises(CorruptError, match="'magic'"):
        unpack(b"", "F32", "magic", 0)
    with pytest.raises(CorruptError, match="whole number"):
        unpack(b"", "F32", "plain", 3)
