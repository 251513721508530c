"""The state as a tree: everything comes back exactly, or is refused with its place."""

import argparse
import ast
import datetime as dt
import decimal
import enum
import functools
import json
import math
import pathlib
import random
import struct
import sys
import types
import warnings
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque
from fractions import Fraction
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peakpoint.errors import ConfigError, FormatError
from peakpoint.state.capture import StateEncoder
from peakpoint.state.typed_json import Decoder, Encoder
from trees import bits, same

PLACE = 'state["x"]'
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def round_trip(value):
    """Through the tree, JSON text and back; tensors go through bytes of their own."""
    encoder = Encoder()
    text = msgspec.json.encode(encoder.encode(value, PLACE))
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    stored = {name: tensor.detach().clone() for name, tensor in encoder.tensors.items()}
    return Decoder(stored).decode(msgspec.json.decode(text))


def test_same_is_strict():
    """The comparison that the tests below rest on tells apart what ``==`` does not."""
    assert not same(True, 1)
    assert not same(1, 1.0)
    assert not same(0.0, -0.0)
    assert not same({1: "a"}, {True: "a"})
    assert not same({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert not same([1], (1,))
    assert not same(deque([1], 2), deque([1], 3))
    assert not same(np.str_(""), np.str_("\x00"))
    assert not same(np.bytes_(b"a"), np.bytes_(b"a\x00"))
    assert not same(np.float32(1), np.float64(1))
    assert not same(np.zeros((2, 3)), np.asfortranarray(np.zeros((2, 3))))
    assert not same(torch.zeros(2), torch.zeros(2, requires_grad=True))
    assert not same(decimal.Decimal("1.0"), decimal.Decimal("1.00"))
    assert not same(dt.datetime(2020, 1, 1, tzinfo=dt.UTC), dt.datetime(2020, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")))
    assert not same(OrderedDict(), {})
    assert not same(defaultdict(list), defaultdict(int))


def check(value):
    back = round_trip(value)
    assert same(value, back), f"{value!r} came back as {back!r}"
    return back


# --- scalars ------------------------------------------------------------------------------------------------------

NAN_WITH_PAYLOAD = struct.unpack(">d", bytes.fromhex("7ff80000deadbeef"))[0]
NEGATIVE_NAN = struct.unpack(">d", bytes.fromhex("fff8000000000001"))[0]


@pytest.mark.parametrize("value", [None, True, False], ids=repr)
def test_singletons(value):
    assert round_trip(value) is value


@pytest.mark.parametrize(
    "value",
    [0, 1, -1, 2**53 + 1, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 2**64, 2**128, 7**9000, -(3**20000)],
    ids=lambda value: f"{value.bit_length()}bits",
)
def test_integers(value):
    check(value)
    assert sys.get_int_max_str_digits() == 4300  # the limit on decimal digits was not in the way


@pytest.mark.parametrize(
    "value",
    [
        *[0.0, -0.0, 1.0, 0.1, 1e22, 1e300, -1e-300, 5e-324, 1.7976931348623157e308, math.pi],
        *[math.inf, -math.inf, math.nan, NAN_WITH_PAYLOAD, NEGATIVE_NAN],
    ],
    ids=lambda value: bits(value).hex(),
)
def test_floats(value):
    check(value)


@given(st.binary(min_size=8, max_size=8))
@SETTINGS
def test_every_bit_pattern_of_a_float(data):
    check(struct.unpack(">d", data)[0])


@pytest.mark.parametrize(
    "value",
    [
        "",
        "a",
        "\x00",
        "$",
        "héllo ☃ 🎉",
        "\ud800",
        "a\udc80b",
        "\udfff\ud800",
        "\u2028",
        '"\\/',
        "\x7f\x1b",
        "x" * 70_000,
    ],
    ids=ascii,
)
def test_text(value):
    value = value[:80_000]
    check(value)
    check({value: value})
    check(OrderedDict([(value, 1)]))


@pytest.mark.parametrize("size", [0, 1, 255, 100_000])
def test_bytes(size):
    data = bytes(i % 256 for i in range(size))
    check(data)
    check(bytearray(data))


@pytest.mark.parametrize(
    "value",
    [
        complex(0.0, -0.0),
        complex(-0.0, NAN_WITH_PAYLOAD),
        complex(math.inf, 1e-300),
        *map(decimal.Decimal, ["0", "-0", "1.10", "1E+5", "NaN", "-sNaN123", "Infinity", "-Infinity", "1E-999999"]),
        decimal.Decimal(1) / 3,
        range(0),
        range(5, -5, -2),
        range(2**70, 2**71, 2**65),
        torch.float8_e5m2,
        torch.bfloat16,
        torch.complex128,
        torch.quint8,
        torch.device("cpu"),
        torch.device("cuda", 3),
        torch.device("meta"),
        torch.Size([]),
        torch.Size([2, 0, 3]),
        dt.timedelta.min,
        dt.timedelta.max,
        dt.timedelta(microseconds=-1),
        dt.date.min,
        dt.date.max,
    ],
    ids=repr,
)
def test_plain_values(value):
    check(value)
    check({"a": [value], "b": (value,)})


# every torch dtype has a name that leads back to it
@pytest.mark.parametrize(
    "dtype", sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str), ids=str
)
def test_every_torch_dtype_as_a_value(dtype):
    assert round_trip(dtype) is dtype


ZONES = [
    None,
    dt.UTC,
    dt.timezone(dt.timedelta(hours=-5)),
    dt.timezone(dt.timedelta(hours=5, minutes=30, seconds=7, microseconds=9)),
    dt.timezone(-dt.timedelta(microseconds=1)),
    dt.timezone(dt.timedelta(hours=1), "CET"),
    dt.timezone(dt.timedelta(0), "Zulu"),
    dt.timezone(dt.timedelta(hours=1), "\ud800"),
    zoneinfo.ZoneInfo("Europe/Berlin"),
    zoneinfo.ZoneInfo("UTC"),
]


@pytest.mark.parametrize("zone", ZONES, ids=ascii)
@pytest.mark.parametrize("fold", [0, 1])
def test_moments(zone, fold):
    for moment in (
        dt.datetime(2023, 10, 29, 2, 30, 15, 7, tzinfo=zone, fold=fold),
        dt.datetime(1, 1, 1, tzinfo=zone, fold=fold),
        dt.datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=zone, fold=fold),
        dt.time(0, 0, tzinfo=zone, fold=fold),
        dt.time(23, 59, 59, 999999, tzinfo=zone, fold=fold),
    ):
        check(moment)


def test_fold_tells_the_repeated_hour_apart():
    berlin = zoneinfo.ZoneInfo("Europe/Berlin")
    first, second = (round_trip(dt.datetime(2023, 10, 29, 2, 30, tzinfo=berlin, fold=fold)) for fold in (0, 1))
    assert second.utcoffset() - first.utcoffset() == dt.timedelta(hours=-1)


@pytest.mark.parametrize(
    "path",
    [
        pathlib.Path("/a/b c/d.txt"),
        pathlib.Path("relative/../x"),
        pathlib.Path(),
        pathlib.PurePosixPath("//net/x"),
        pathlib.PureWindowsPath(r"C:\Users\x"),
        pathlib.PureWindowsPath(r"\\server\share\x"),
        pathlib.Path("bad\udcffbyte"),
    ],
    ids=ascii,
)
def test_paths(path):
    check(path)
    check({path: [path]})


# --- enums and namespaces are converted on purpose ----------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"
    PAIR = (1, 2.5)
    ONE = 1
    TABLE = types.MappingProxyType({})  # a value that cannot be kept


class Level(enum.IntEnum):
    HIGH = 3


class Word(enum.StrEnum):
    YES = "yes"


class Bits(enum.Flag):
    A = 1
    B = 2


@pytest.mark.parametrize(
    ("member", "value"),
    [(Colour.RED, "red"), (Colour.PAIR, (1, 2.5)), (Level.HIGH, 3), (Word.YES, "yes"), (Bits.A | Bits.B, 3)],
    ids=str,
)
def test_enum_members_become_their_values(member, value):
    assert same(round_trip(member), value)
    assert same(round_trip([{"a": member}]), [{"a": value}])
    assert same(round_trip({member: 1}), {value: 1})
    assert same(round_trip({member}), {value})
    assert same(round_trip({(member, 2): 1}), {(value, 2): 1})


def test_namespaces_become_dicts():
    given_ = argparse.Namespace(lr=0.1, nested=argparse.Namespace(path=pathlib.Path("x")), sizes=(1, 2))
    assert same(round_trip(given_), {"lr": 0.1, "nested": {"path": pathlib.Path("x")}, "sizes": (1, 2)})


@pytest.mark.parametrize(
    "value",
    [{Colour.ONE: "a", 1: "b"}, {Colour.ONE, 1}, frozenset({(Colour.ONE, 2), (1, 2)}), {(Colour.ONE,): 0, (1,): 1}],
    ids=["dict", "set", "frozenset of tuples", "dict of tuples"],
)
def test_enum_keys_that_would_become_one_are_refused(value):
    """Once converted, one of the two would silently replace the other."""
    with pytest.raises(ConfigError, match="equal once enum members are their values"):
        round_trip(value)


# --- containers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        [],
        (),
        {},
        set(),
        frozenset(),
        [[], [[]], ()],
        (1,),
        {"a": {"b": {"c": [1, (2, {3})]}}},
        {1, "1", 1.5, None, b"1", (1, 2), frozenset({1, frozenset()})},
        frozenset({True, 2, "x"}),
        {True, 0.0},
        {"b": 1, "a": 2, "c": 3},
        {3: "c", 1: "a", 2: "b"},
        {True: "bool", 2: "int", None: "none", 0.5: "float", (1, ("x", None)): "tuple", b"k": 1, "s": 2, -0.0: 1},
        {1: {1.5: {False: {}}}},
        {1.0: "float", 2: "int", True + 2: "three"},
        {"$": 1},
        {"$": "tensor", "name": "weight"},
        {"$type": {"$": {"$$": "$"}}},
        {"a\ud800": 1, "b": 2},
        {frozenset({1, 2}): [frozenset()]},
        {math.nan: 1, NAN_WITH_PAYLOAD: 2},
        {np.int64(3): "numpy key", np.str_("s"): 1},
        {dt.date(2020, 1, 1): 1, dt.timedelta(1): 2, torch.float32: 3, decimal.Decimal("1.50"): 4, 2**70: 5},
        {"v": 1, "name": 2, "dtype": 3},
        OrderedDict([("b", 1), ("a", 2)]),
        OrderedDict([(2, "b"), (1, "a"), ("$", 0)]),
        defaultdict(list, {"a": [1], 2: []}),
        defaultdict(int, {("x", 1): 5}),
        defaultdict(None, {"a": 1}),
        defaultdict(dict),
        Counter("mississippi"),
        Counter({1: -3, "x": 0}),
        Counter(),
        deque([1, 2, 3], maxlen=3),
        deque(maxlen=0),
        deque([[1], (2,)]),
        [True, 1, 1.0, False, 0, 0.0],
    ],
)
def test_containers(value):
    check(value)
    check([value, {"again": value}])


def test_true_one_and_one_point_zero_stay_apart_as_keys():
    assert [type(key) for key in round_trip({True: 0})] == [bool]
    assert [type(key) for key in round_trip({1: 0})] == [int]
    assert [type(key) for key in round_trip({1.0: 0})] == [float]


def test_a_defaultdict_still_makes_defaults():
    back = round_trip(defaultdict(list, {"a": [1]}))
    back["new"].append(2)
    assert back == {"a": [1], "new": [2]}


def test_a_deque_still_drops():
    back = round_trip(deque([1, 2, 3], maxlen=3))
    back.append(4)
    assert list(back) == [2, 3, 4]


def test_the_state_dict_of_a_module_keeps_its_metadata():
    class Versioned(torch.nn.Module):
        _version = 7

        def __init__(self):
            super().__init__()
            self.inner = torch.nn.BatchNorm1d(3)

    given_ = Versioned().state_dict()
    back = check(given_)
    assert back._metadata[""] == {"version": 7}
    assert back._metadata["inner"] == {"version": 2}
    assert list(back) == list(given_)


def test_the_same_text_for_the_same_set():
    """A tree depends on the values only, not on the order in which a set happens to give its members."""
    members = [f"name{i}" for i in range(200)]
    texts = set()
    for seed in range(5):
        random.Random(seed).shuffle(members)
        texts.add(msgspec.json.encode(Encoder().encode(set(members), PLACE)))
    assert len(texts) == 1


def test_containers_come_back_as_objects_of_their_own():
    shared = [1]
    back = round_trip({"a": shared, "b": shared})
    back["a"].append(2)
    assert back["b"] == [1]


def test_nesting_up_to_the_limit():
    value = 1
    for level in range(50):
        value = [value] if level % 2 else {str(level): (value,)} if level % 4 else OrderedDict(x=value)
    check(value)
    deepest = 1
    for _ in range(100):
        deepest = defaultdict(None, {1: deepest})
    check(deepest)


# --- NumPy --------------------------------------------------------------------------------------------------------

ARRAYS = {
    "empty": np.zeros((0,)),
    "empty 2d": np.zeros((3, 0, 2), dtype="i2"),
    "0-d": np.array(3.5),
    "0-d bool": np.array(True),
    "bool": np.array([[True, False], [False, True]]),
    "int8": np.arange(-128, 128, dtype=np.int8),
    "uint64": np.array([0, 2**64 - 1], dtype=np.uint64),
    "float16": np.array([1, np.inf, np.nan, -0.0], dtype=np.float16),
    "longdouble": np.array([1, 2, 3], dtype=np.longdouble),
    "complex64": np.array([1 + 2j, np.nan], dtype=np.complex64),
    "complex128": np.arange(200) * 1j,
    "clongdouble": np.zeros(3, dtype=np.clongdouble),
    "big endian": np.arange(10, dtype=">i4"),
    "big endian, large": np.arange(1000, dtype=">f8").reshape(10, 100),
    "c order": np.arange(12.0).reshape(3, 4),
    "f order": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "f order, large": np.asfortranarray(np.arange(6000, dtype="f4").reshape(10, 20, 30)),
    "large": np.arange(100_000, dtype=np.float32),
    "large bool": np.arange(5000) % 3 == 0,
    "at the limit": np.arange(128, dtype=np.int64),
    "above the limit": np.arange(129, dtype=np.int64),
    "text": np.array(["a", "bcd", "", "ü☃🎉"]),
    "text, large": np.array([f"row {i}" for i in range(1000)]),
    "octets": np.array([b"a", b"bcd"]),
    "void": np.array([b"ab", b"cd"], dtype="V2"),
    "void of nothing": np.zeros(3, dtype="V0"),
    "datetime64": np.array(["2020-01-01", "NaT"], dtype="datetime64[ns]"),
    "datetime64 steps": np.array([1, 2], dtype="datetime64[25m]"),
    "timedelta64": np.array([1, -1], dtype="m8[D]"),
    "datetime64, large": np.arange(1000).astype("M8[s]"),
    "structured": np.array([(1, 2.5, "x")], dtype=[("a", "<i4"), ("b", ">f8"), ("c", "U3")]),
    "structured, large": np.zeros(1000, dtype=[("a", "<i4"), ("b", "<f8")]),
    "structured, nested": np.zeros(2, dtype=[("p", [("x", "f4"), ("y", "f4")]), ("m", "i2", (2, 3))]),
    "structured, aligned": np.zeros(2, dtype=np.dtype([("a", "i1"), ("b", "i8")], align=True)),
    "structured, titled": np.zeros(2, dtype=[(("a title", "a"), "i4")]),
    "structured, empty": np.zeros(0, dtype=[("a", "<i4")]),
    "structured, odd names": np.zeros(1, dtype=[("it's", "i4"), ("ü", "i4"), ("$", "i4")]),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays(array):
    back = check(array)
    assert back.dtype.fields == array.dtype.fields
    check({"a": [array, {"b": (array,)}]})


def test_views_of_arrays_come_back_packed():
    base = np.arange(1000.0).reshape(10, 100)
    for view in (base[::2, ::3], base[:, ::-1], base.T[3], np.broadcast_to(base[0], (5, 100))):
        back = round_trip(view)
        assert back.dtype == view.dtype
        assert np.array_equal(back, view)
        assert back.flags.c_contiguous
        assert back.flags.writeable


def test_an_array_that_comes_back_has_memory_of_its_own():
    array = np.arange(1000)
    encoder = Encoder()
    tree = encoder.encode(array, PLACE)
    stored = {name: tensor.clone() for name, tensor in encoder.tensors.items()}
    first, second = Decoder(stored).decode(tree), Decoder(stored).decode(tree)
    first[:] = 0
    assert np.array_equal(second, array)


@pytest.mark.parametrize(
    "value",
    [
        np.bool_(True),
        np.int8(-1),
        np.uint64(2**64 - 1),
        np.float16(0.1),
        np.float32(np.nan),
        np.float64(-0.0),
        np.longdouble("0.1"),
        np.complex64(1j),
        np.complex128(complex(np.nan, -0.0)),
        np.str_(""),
        np.str_("ü☃"),
        np.str_("nul at the end\x00"),
        np.str_("\x00"),
        np.str_("\ud800"),
        np.bytes_(b""),
        np.bytes_(b"a\x00\x00"),
        np.void(b"abc"),
        np.void(b"\x00\x00"),
        np.datetime64("2020-01-01T00:00:00.123"),
        np.datetime64("NaT"),
        np.timedelta64(5, "h"),
        np.zeros(1, dtype=[("a", "i4"), ("b", ">f8")])[0],
    ],
    ids=lambda value: f"{type(value).__name__}-{value.size}",
)
def test_numpy_scalars(value):
    check(value)
    check([value, {"a": value}])


@pytest.mark.parametrize(
    "dtype",
    ["f4", ">i8", "S5", "U7", "V3", "?", "M8[us]", "m8", "O", [("a", "f4"), ("b", [("c", "U2")])], []],
    ids=str,
)
def test_numpy_dtypes(dtype):
    back = round_trip(np.dtype(dtype))
    assert back == np.dtype(dtype)
    assert back.byteorder == np.dtype(dtype).byteorder


def test_generator_states():
    for bits_ in (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64):
        check(bits_(5).state)
    check(random.Random(3).getstate())
    check(np.random.RandomState(3).get_state(legacy=False))


# --- tensors in trees; files of tensors are in test_tensor_files.py -----------------------------------------------


def test_tensors_in_every_container():
    tensor = torch.arange(6.0).reshape(2, 3)
    check({"a": tensor, 1: [tensor + 1], (2, "x"): (tensor + 2, {"$": torch.tensor(5)})})
    check(deque([torch.ones(2)]))
    check(defaultdict(list, {"m": [torch.ones(2, dtype=torch.bfloat16)]}))
    check(OrderedDict(w=torch.nn.Parameter(torch.ones(3))))
    check(torch.tensor(1.5))


def test_names_of_tensors_never_collide():
    value = {
        "a.b": torch.tensor(1),
        "a": {"b": torch.tensor(2), "b~2": torch.tensor(3)},
        "a.b~2": torch.tensor(4),
        "a.b~3": torch.tensor(5),
        1: torch.tensor(6),
        "1": torch.tensor(7),
        1.0 + 1: torch.tensor(8),
        "2.0": torch.tensor(9),
        "__metadata__": torch.tensor(10),
        "": torch.tensor(11),
        "nul\x00": torch.tensor(12),
        "nul_": torch.tensor(13),
        "\ud800": torch.tensor(14),
        "?": torch.tensor(15),
    }
    check(value)
    encoder = Encoder()
    encoder.encode(value, PLACE)
    assert len(encoder.tensors) == 15
    assert "__metadata__" not in encoder.tensors


# --- anything nested ----------------------------------------------------------------------------------------------

any_text = st.text(st.characters(), max_size=8) | st.text(alphabet="$\ud800\udc00a", max_size=3)
whole = st.integers() | st.integers(min_value=-(2**200), max_value=2**200)
zones = st.sampled_from(ZONES)
keys = st.recursive(
    st.none() | st.booleans() | whole | st.floats() | any_text | st.binary(max_size=4) | st.dates(),
    lambda children: st.tuples(children, children) | st.frozensets(children, max_size=3),
    max_leaves=4,
)
simple_dtypes = st.sampled_from(["?", "i1", "<u2", ">i4", "f2", "<f4", ">f8", "c8", "S3", "U2", "M8[s]", "V2"])


@st.composite
def arrays(draw):
    dtype = np.dtype(draw(simple_dtypes))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    size = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype.kind == "U":  # code points outside Unicode are not text
        return np.full(shape, data.hex()[:2], dtype=dtype)
    array = np.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if size else np.zeros(shape, dtype)
    return np.asfortranarray(array) if draw(st.booleans()) and array.ndim > 1 else array


tensors = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill, dtype=dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64, torch.uint8]),
    st.integers(0, 1),
)
leaves = (
    keys
    | st.complex_numbers()
    | st.decimals()
    | st.binary(max_size=20).map(bytearray)
    | st.datetimes(timezones=zones)
    | st.times(timezones=zones)
    | st.timedeltas()
    | arrays()
    | tensors
)
values = st.recursive(
    leaves,
    lambda children: (
        st.lists(children, max_size=4)
        | st.lists(children, max_size=3).map(tuple)
        | st.dictionaries(keys, children, max_size=4)
        | st.dictionaries(any_text, children, max_size=4)
        | st.dictionaries(keys, children, max_size=3).map(OrderedDict)
        | st.dictionaries(any_text, children, max_size=3).map(lambda given_: defaultdict(list, given_))
        | st.builds(deque, st.lists(children, max_size=3), st.none() | st.integers(3, 5))
        | st.sets(keys, max_size=4)
    ),
    max_leaves=12,
)


@given(values)
@settings(SETTINGS, max_examples=400)
def test_anything_nested_comes_back_exactly(value):
    check(value)


@given(st.dictionaries(keys, st.integers(), max_size=6))
@settings(SETTINGS, max_examples=200)
def test_keys_keep_type_value_and_order(value):
    check(value)


# --- refusals -----------------------------------------------------------------------------------------------------


class Foo:
    pass


class Sampler:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class MyInt(int):
    pass


class MyStr(str):
    __slots__ = ()


class MyDict(dict):
    pass


class MyList(list):
    pass


class MyTensor(torch.Tensor):
    pass


class MyParameter(torch.nn.Parameter):
    pass


class PosixPath(pathlib.PurePosixPath):
    """Named like the one that is kept."""


class Point(NamedTuple):
    x: int
    y: int


class RecordLike(np.ndarray):
    pass


def quietly(make):
    """What torch warns of when it is made (prototypes, kinds that are on their way out)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


REFUSED = {
    "object": Foo(),
    "lambda": lambda: 1,
    "function": check,
    "builtin": len,
    "partial": functools.partial(check, 1),
    "class": Foo,
    "class with state_dict": Sampler,
    "torch class": torch.nn.Linear,
    "numpy class": np.float32,
    "module": math,
    "generator": (i for i in range(3)),
    "iterator": iter([1]),
    "file": sys.stdout,
    "exception": ValueError("x"),
    "fraction": Fraction(1, 3),
    "memoryview": memoryview(b"x"),
    "dict view": {}.keys(),
    "mapping proxy": types.MappingProxyType({"a": 1}),
    "int subclass": MyInt(1),
    "str subclass": MyStr("x"),
    "dict subclass": MyDict(),
    "list subclass": MyList(),
    "named tuple": Point(1, 2),
    "path subclass": PosixPath("x"),
    "ellipsis": ...,
    "object array": np.array([1, "a", None], dtype=object),
    "structured object array": np.zeros(1, dtype=[("a", "O")]),
    "array subclass": np.zeros(2).view(RecordLike),
    "masked array": np.ma.masked_array([1], [True]),
    "record array": np.rec.array([(1,)], dtype=[("a", "i4")]),
    "record": np.rec.array([(1,)], dtype=[("a", "i4")])[0],
    "overlapping fields": np.zeros(1, np.dtype({"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [0, 0]})),
    "text of any length": np.array(["a"], dtype=np.dtypes.StringDType()),
    "subarray dtype": np.dtype((np.int32, (2,))),
    "defaultdict of a lambda": defaultdict(lambda: 0),
    "defaultdict of a partial": defaultdict(functools.partial(list)),
    "defaultdict of a class": defaultdict(Foo),
    "sparse": torch.eye(2).to_sparse(),
    "sparse with dense dimensions": torch.eye(3).to_sparse(1),
    "sparse csr": quietly(lambda: torch.eye(3).to_sparse_csr()),
    "quantized": quietly(lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)),
    "nested, strided": quietly(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    "meta": torch.empty(2, device="meta"),
    "nested, jagged": quietly(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)),
    "tensor subclass": torch.ones(2).as_subclass(MyTensor),
    "parameter subclass": MyParameter(torch.ones(2)),
    "uninitialized": torch.nn.LazyLinear(2).weight,
    "complex128": torch.ones(2, dtype=torch.complex128),
    "storage": torch.ones(2).untyped_storage(),
    "torch layout": torch.strided,
    "enum of what cannot be kept": Colour.TABLE,
    "zone of a file": dt.datetime(2020, 1, 1, tzinfo=type("Zone", (dt.tzinfo,), {})()),
}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED)
def test_refused_with_its_place(value):
    with pytest.raises(ConfigError) as caught:
        Encoder().encode(value, PLACE)
    assert str(caught.value).startswith(PLACE)
    with pytest.raises(ConfigError) as caught:
        StateEncoder().encode({"x": {"y": [1, 2, value]}})
    assert str(caught.value).startswith('state["x"]["y"][2]')
    with pytest.raises(ConfigError) as caught:
        StateEncoder().encode({"sampler": Sampler({"good": 1, "rng": value})})
    assert str(caught.value).startswith('state["sampler"].rng')


def test_the_message_names_the_type_and_what_to_do():
    with pytest.raises(ConfigError) as caught:
        StateEncoder().encode({"sampler": Sampler({"rng": Foo()})})
    name = f"{Foo.__module__}.Foo"
    assert str(caught.value).startswith(f'state["sampler"].rng is a {name}: it cannot be kept exactly; give an object')
    with pytest.raises(ConfigError, match=r"complex128 has no place in the safetensors format"):
        StateEncoder().encode({"x": torch.ones(1, dtype=torch.complex128)})
    with pytest.raises(ConfigError, match=r"\.to_dense\(\) first"):
        StateEncoder().encode({"x": torch.eye(2).to_sparse()})


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": {"b": Foo()}}, 'state["x"]["a"]["b"]'),
        ({"a": (1, [Foo()])}, 'state["x"]["a"][1][0]'),
        ({3: {(1, "k"): Foo()}}, "state[\"x\"][3][(1, 'k')]"),
        (OrderedDict(a=defaultdict(list, b=deque([Foo()]))), 'state["x"]["a"]["b"][0]'),
        (argparse.Namespace(opt=Foo()), 'state["x"].opt'),
        (Sampler({"not an identifier": Foo()}), 'state["x"]["not an identifier"]'),
        (Sampler({"a": {"b": Foo()}}), 'state["x"].a["b"]'),
        (Sampler([0, Foo()]), 'state["x"][1]'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_places(value, place):
    with pytest.raises(ConfigError) as caught:
        StateEncoder().encode({"x": value})
    assert str(caught.value).startswith(f"{place} is a ")


@pytest.mark.parametrize(
    "key", [Foo(), MyStr("k"), MyInt(3), Point(1, 2), len, Foo, torch.strided], ids=lambda key: type(key).__name__
)
def test_keys_that_cannot_be_kept(key):
    for value in ({key: 1}, {key}, frozenset({key}), {(1, key): 1}, OrderedDict([(key, 1)])):
        with pytest.raises(ConfigError, match=r'state\["x"\]'):
            Encoder().encode(value, PLACE)


def test_cycles():
    values_ = []
    values_.append(values_)
    with pytest.raises(ConfigError, match="contains itself"):
        Encoder().encode(values_, PLACE)
    table = {}
    table["a"] = {"b": [table, table]}
    with pytest.raises(ConfigError, match="contains itself") as caught:
        Encoder().encode(table, PLACE)
    assert str(caught.value).startswith('state["x"]["a"]["b"][0]["a"]')
    space = argparse.Namespace()
    space.me = space
    with pytest.raises(ConfigError, match="contains itself"):
        Encoder().encode(space, PLACE)


def test_too_deep():
    value = 1
    for _ in range(102):
        value = [value]
    with pytest.raises(ConfigError, match="100 levels"):
        Encoder().encode(value, PLACE)
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ConfigError, match="100 levels"):
        Encoder().encode(value, PLACE)


# --- reading what nobody wrote ------------------------------------------------------------------------------------

TAGS = [
    *["tensor", "ndarray", "dict", "OrderedDict", "defaultdict", "Counter", "tuple", "deque", "set", "frozenset"],
    *["int", "float", "str", "bytes", "bytearray", "complex", "Decimal", "range", "datetime", "time", "date"],
    *["timedelta", "torch.dtype", "torch.device", "torch.Size", "numpy", "numpy.dtype", "path"],
]
FIELDS = ["v", "name", "dtype", "shape", "zone", "fold", "maxlen", "factory", "class", "view", "stride", "bytes"]
hostile_leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.sampled_from([0, 1, -1, 10**9, 1e308, "inf", "<f8", "|O", "F32", "weight", "PosixPath", "list", "0x1", "AAAA"])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6)
)
hostile = st.recursive(
    hostile_leaves,
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.text(max_size=3), children, max_size=2)
        | st.builds(
            lambda tag, fields: {**fields, "$": tag},
            st.sampled_from([*TAGS, "pickle", "", "eval"]) | hostile_leaves,
            st.dictionaries(st.sampled_from(FIELDS), children, max_size=6),
        )
    ),
    max_leaves=8,
)


@given(hostile)
@settings(SETTINGS, max_examples=800)
def test_reading_garbage_gives_a_value_or_a_format_error(tree):
    """No other exception ever comes out of a tree, whatever it holds."""
    tree = msgspec.json.decode(msgspec.json.encode(tree))
    outcome = ""
    try:
        Decoder({"weight": torch.arange(4.0)}).decode(tree)
    except FormatError as error:
        outcome = str(error)
    assert not outcome or outcome.startswith("the state ")


BAD_TREES = [
    {"$": "pickle", "v": "gASVAAAA"},
    {"$": []},
    {"$": {}},
    {"$": None},
    {"$": 1},
    {"$": True},
    {"$": "tuple"},
    {"$": "tuple", "v": 5},
    {"$": "dict", "v": [[1]]},
    {"$": "dict", "v": [[[], 1]]},
    {"$": "OrderedDict", "v": []},
    {"$": "Counter", "v": 3},
    {"$": "defaultdict", "factory": "eval", "v": {}},
    {"$": "defaultdict", "factory": [], "v": {}},
    {"$": "deque", "v": [1], "maxlen": -1},
    {"$": "deque", "v": [1], "maxlen": "a"},
    {"$": "set", "v": [[1]]},
    {"$": "int", "v": "0xzz"},
    {"$": "float", "v": "ab"},
    {"$": "float", "v": 5},
    {"$": "str", "v": "A"},
    {"$": "bytes", "v": "A"},
    {"$": "bytes", "v": 10**12},
    {"$": "complex", "v": [1, 2, 3]},
    {"$": "Decimal", "v": "one"},
    {"$": "range", "v": [0, 1, 0]},
    {"$": "datetime", "v": "yesterday", "zone": None, "fold": 0},
    {"$": "datetime", "v": "2020-01-01", "zone": "../../etc/passwd", "fold": 0},
    {"$": "datetime", "v": "2020-01-01", "zone": "/etc/passwd", "fold": 0},
    {"$": "datetime", "v": "2020-01-01", "zone": "America", "fold": 0},
    {"$": "datetime", "v": "2020-01-01", "zone": [10**18, 0], "fold": 0},
    {"$": "datetime", "v": "2020-01-01", "zone": [0, 0, "a", "b"], "fold": 0},
    {"$": "datetime", "v": "2020-01-01", "zone": None, "fold": 2},
    {"$": "timedelta", "v": [10**18, 0, 0]},
    {"$": "timedelta", "v": [1e308]},
    {"$": "date", "v": "2020-13-01"},
    {"$": "torch.dtype", "v": "save"},
    {"$": "torch.device", "v": "moon:7"},
    {"$": "torch.Size", "v": ["a"]},
    {"$": "path", "class": "Popen", "v": "x"},
    {"$": "path", "class": "PosixPath", "v": 5},
    {"$": "ndarray", "dtype": "|O", "shape": [1], "v": "AAAAAAAAAAA="},
    {"$": "ndarray", "dtype": "<f8", "shape": [10**12], "v": "AAAAAAAAAAA="},
    {"$": "ndarray", "dtype": "<f8", "shape": [2], "v": "AAAAAAAAAAA="},
    {"$": "ndarray", "dtype": "KFso", "shape": [1], "v": ""},
    {"$": "ndarray", "dtype": "a5", "shape": [1], "v": ""},
    {"$": "ndarray", "dtype": None, "shape": [1], "v": "AAAAAAAAAAA="},
    {"$": "ndarray", "dtype": "<f8", "shape": [1], "bytes": "weight"},
    {"$": "ndarray", "dtype": "<f8", "shape": [1], "bytes": {"$": "tensor", "name": "missing"}},
    {"$": "numpy", "dtype": "<f8", "v": ""},
    {"$": "numpy", "dtype": "|O", "v": "AAAAAAAAAAA="},
    {"$": "tensor", "name": "missing"},
    {"$": "tensor", "name": ["weight"]},
    {"$": "tensor", "name": "weight", "stride": [10**15]},
    {"$": "tensor", "name": "weight", "stride": [-1]},
    {"$": "tensor", "name": "weight", "stride": [1, 1]},
    {"$": "tensor", "name": "weight", "stride": ["a"]},
    {"$": "tensor", "name": "weight", "view": {"dtype": "F32", "shape": [5], "stride": [1], "offset": 0}},
    {"$": "tensor", "name": "weight", "view": {"dtype": "F64", "shape": [3], "stride": [1], "offset": 0}},
    {"$": "tensor", "name": "weight", "view": {"dtype": "F32", "shape": [1], "stride": [1], "offset": -4}},
    {"$": "tensor", "name": "weight", "view": {"dtype": "F32", "shape": [2], "stride": [2**62], "offset": 0}},
    {"$": "tensor", "name": "weight", "view": {"dtype": "Q99", "shape": [1], "stride": [1], "offset": 0}},
    {"$": "tensor", "name": "weight", "view": []},
    {"$": "tensor", "name": "count", "requires_grad": True},
]


@pytest.mark.parametrize("tree", BAD_TREES, ids=lambda tree: json.dumps(tree)[:70])
def test_reading_what_nobody_wrote_is_a_format_error(tree):
    stored = {"weight": torch.arange(4.0), "count": torch.tensor(1)}
    for wrapped in (tree, [tree], {"a": {"$": "tuple", "v": [tree]}}):
        with pytest.raises(FormatError):
            Decoder(stored).decode(wrapped)


def test_reading_what_is_nested_too_deep():
    for wrap in (lambda tree: [tree], lambda tree: {"a": tree}, lambda tree: {"$": "tuple", "v": [tree]}):
        tree = 1
        for _ in range(5000):
            tree = wrap(tree)
        with pytest.raises(FormatError, match=r"nested too deep|cannot be read"):
            Decoder({}).decode(tree)


def test_an_element_type_from_a_file_is_a_literal_not_code():
    """The description of a structured dtype is read by ``ast.literal_eval``, which calls nothing."""
    import base64

    text = "__import__('os').getcwd()"
    with pytest.raises(ValueError):
        ast.literal_eval(text)
    tree = {"$": "numpy.dtype", "v": base64.b64encode(text.encode()).decode()}
    with pytest.raises(FormatError):
        Decoder({}).decode(tree)
