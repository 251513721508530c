"""What the fixtures of format 1 hold, built by hand: the script that made them saved it, and their test compares."""

import datetime as dt
import decimal
import hashlib
import pathlib
import struct
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import torch

SUMMER = dt.datetime(2026, 10, 25, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"), fold=1)
EAST = dt.timezone(dt.timedelta(hours=5, minutes=30, microseconds=7), "east")
RECORDS = np.dtype([("step", "<i4"), ("loss", "<f8")])


def values():
    """A value of every type that state.json knows, but for tensors."""
    table = OrderedDict(one=1, two=[2])
    table._metadata = OrderedDict({"": {"version": 2}})
    return {
        "plain": [None, True, False, 0, -3, 0.1, -0.0, "text ä", {"nested": {}}],
        "integers": [2**63, -(2**200)],
        "floats": [
            float("nan"),
            struct.unpack(">d", bytes.fromhex("7ff80000deadbeef"))[0],
            float("inf"),
            -float("inf"),
        ],
        "texts": ["", "\x00", "\ud800"],
        "octets": [b"\x00\xff", bytearray(b"mutable")],
        "numbers": [complex(-0.0, float("inf")), decimal.Decimal("1.50"), range(1, 2**70, 3)],
        "times": [SUMMER, SUMMER.replace(tzinfo=EAST), SUMMER.replace(tzinfo=None, microsecond=1), dt.time(1, 2, 3)],
        "days": [dt.date(2026, 1, 1), dt.timedelta(days=-1, microseconds=1)],
        "torch": [torch.bfloat16, torch.device("cpu"), torch.Size([2, 3])],
        "paths": [pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("C:\\a"), pathlib.PosixPath("data")],
        "containers": [(1, (2, [3])), {1, "a", (2, frozenset({3}))}, frozenset(), deque([1, [2]], maxlen=3)],
        "keys": {1: "a", (2, "b"): None, None: 0, "$": "not a tag", 2.5: True},
        "tables": [table, defaultdict(list, a=[1]), defaultdict(None, {1: 2}), Counter("abca")],
        "arrays": [
            np.arange(6, dtype=np.int16).reshape(2, 3),
            np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            np.array([(1, 0.5), (2, np.nan)], dtype=RECORDS),
            np.array(["ä", "bc"]),
            np.array(["2026-01-01"], dtype="datetime64[D]"),
            np.zeros((0, 2), dtype=np.complex64),
        ],
        "large": np.arange(300, dtype=np.float32),  # of more bytes than stay in the JSON
        "scalars": [
            np.float32(0.1),
            np.str_("a\x00"),
            np.bytes_(b"a\x00"),
            np.datetime64("2026-01-01"),
            np.void(b"\x01"),
        ],
        "dtypes": [np.dtype("<f4"), RECORDS],
    }


INTEGERS = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
)
FLOATS = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


def tensors():
    """A tensor of every element type, and of every way of standing in memory."""
    base = torch.arange(12.0)
    tied = torch.tensor([1.5, float("nan"), -0.0])
    return {
        "types": [torch.tensor([0, 1, 1]).to(dtype) for dtype in INTEGERS]
        + [torch.tensor([0.0, 0.5, -2.0]).to(dtype) for dtype in FLOATS],
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "tied": [tied, tied],
        "views": [base[:8], base[4:], base.view(3, 4)[:, 1]],
        "shared octets": [base.view(torch.int32)[2:5]],
        "asks for gradients": torch.tensor([2.0], requires_grad=True),
        "parameter": torch.nn.Parameter(torch.tensor([3.0])),
        "buffer": torch.nn.Buffer(torch.tensor([4.0]), persistent=False),
        "same name": {"a.b": torch.tensor([1]), "a": {"b": torch.tensor([2])}},
    }


def digits():
    """The state of the run ``digits``: a model, its optimizer and notes."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3))
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "notes": {"seen": []},
    }


def flat(value, where=()):
    """Every tensor in a part of a state: its place to its element type, its shape, and its bytes or their digest."""
    if isinstance(value, torch.Tensor):
        octets = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        text = octets.hex() if len(octets) <= 64 else f"SHA-256 {hashlib.sha256(octets).hexdigest()}"
        return {"/".join(map(str, where)): [str(value.dtype), list(value.shape), text]}
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {name: told for key, child in children for name, told in flat(child, (*where, key)).items()}
