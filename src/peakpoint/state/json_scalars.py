"""Scalars in JSON: values that are neither tensors nor containers, exactly."""

import ast
import base64
import contextlib
import datetime as dt
import decimal
import math
import pathlib
import re
import struct
import zoneinfo
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from peakpoint.errors import ConfigError

TAG = "$"
TENSOR_TAGS = frozenset({"tensor", "sharded"})

_SIMPLE_DTYPE = re.compile(r"[<>|][biufcmMOSUV]\d*(\[[^\]]*\])?")

UNREADABLE = (  # what constructors raise for arguments that encode never writes
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)

PATHS: dict[str, type[pathlib.PurePath]] = {
    "PosixPath": type(pathlib.Path()) if isinstance(pathlib.Path(), pathlib.PosixPath) else pathlib.PurePosixPath,
    "WindowsPath": type(pathlib.Path()) if isinstance(pathlib.Path(), pathlib.WindowsPath) else pathlib.PureWindowsPath,
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
}


class StatePath(NamedTuple):
    """A place in the state. Errors need its text, and tensors their name: both are made on demand."""

    parent: "StatePath | str"
    key: Any
    attribute: bool

    def __str__(self) -> str:
        if self.attribute and str(self.key).isidentifier():
            return f"{self.parent}.{self.key}"
        key = f'"{self.key}"' if isinstance(self.key, str) and '"' not in self.key else repr(self.key)
        return f"{self.parent}[{key}]"


def dotted_keys(path: StatePath | str) -> str:
    """Return the keys that lead to a place, joined with dots; empty for a whole part."""
    keys = []
    while isinstance(path, StatePath):
        keys.append(str(path.key))
        path = path.parent
    return ".".join(reversed(keys))


def kind_of(value: object) -> str:
    """Return the full name of a value's type, as errors show it."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def make_path(fields: tuple["StatePath | str", Any, bool]) -> StatePath:
    """Make a place three times as fast as its constructor."""
    return tuple.__new__(StatePath, fields)


def refusal(path: StatePath | str, value: object, why: str = "") -> ConfigError:
    """Make the error of a value that cannot be saved exactly."""
    hint = why or (
        "it cannot be kept exactly; give an object with state_dict() and load_state_dict(), or tensors, arrays, "
        "numbers, text and containers of them"
    )
    return ConfigError(f"{path} is a {kind_of(value)}: {hint}")


def to_base64(data: bytes) -> str:
    """Encode bytes as text."""
    return base64.b64encode(data).decode()


def from_base64(text: str) -> bytes:
    """Decode what ``to_base64`` encoded."""
    return base64.b64decode(text, validate=True)


def is_unicode(text: str) -> bool:
    """Return whether JSON can hold a text: it has no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def dtype_text(dtype: np.dtype[Any], path: StatePath | str) -> str:
    """Encode a NumPy element type as text, which ``read_dtype`` reads."""
    with contextlib.suppress(ValueError, SyntaxError):  # fields that overlap, fields of types without a description
        text = dtype.str if dtype.names is None else to_base64(repr(dtype.descr).encode())
        decoded = read_dtype(text)
        if decoded == dtype and decoded.type is dtype.type:
            return text
    raise refusal(path, dtype, f"NumPy's element type {dtype!r} cannot be kept exactly")


def read_dtype(text: str) -> np.dtype[Any]:
    """Decode what ``dtype_text`` encoded."""
    if _SIMPLE_DTYPE.fullmatch(text):
        return np.dtype(text)
    description = ast.literal_eval(from_base64(text).decode())
    structured: np.dtype[Any] = np.lib.format.descr_to_dtype(description)
    return structured


# --- numbers and text: plain JSON where it holds the value exactly ---------------------------------------------------


def _float(value: float) -> Any:
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return {TAG: "float", "v": struct.pack(">d", value).hex()}
    return {TAG: "float", "v": "inf" if value > 0 else "-inf"}


def _read_float(text: str) -> float:
    if text in ("inf", "-inf"):
        return float(text)
    value: float = struct.unpack(">d", bytes.fromhex(text))[0]
    return value


def _int(value: int) -> Any:
    return value if -(2**63) <= value < 2**63 else {TAG: "int", "v": hex(value)}


def _str(value: str) -> Any:
    return value if is_unicode(value) else {TAG: "str", "v": to_base64(value.encode("utf-8", "surrogatepass"))}


# --- values whose node has more members than "v" -----------------------------------------------------------------


def _zone(zone: dt.tzinfo | None, path: StatePath | str) -> Any:
    if zone is None:
        return None
    if isinstance(zone, zoneinfo.ZoneInfo) and zone.key is not None:
        return zone.key
    if type(zone) is dt.timezone:
        offset = zone.utcoffset(None)
        name = zone.tzname(None)
        optional_name = [] if name == dt.timezone(offset).tzname(None) else [_str(name)]
        return [offset.days * 86400 + offset.seconds, offset.microseconds, *optional_name]
    raise refusal(path, zone)


def _read_zone(zone: Any) -> dt.tzinfo | None:
    if zone is None:
        return None
    if isinstance(zone, str):
        return zoneinfo.ZoneInfo(zone)
    offset = dt.timedelta(seconds=zone[0], microseconds=zone[1])
    return dt.timezone(offset, *map(decode_scalar, zone[2:]))


def _clock(value: dt.datetime | dt.time, path: StatePath | str) -> dict[str, Any]:
    naive = value.replace(tzinfo=None, fold=0)
    zone = _zone(value.tzinfo, path)
    return {TAG: type(value).__name__, "v": naive.isoformat(), "zone": zone, "fold": value.fold}


def _read_clock(node: dict[str, Any]) -> dt.datetime | dt.time:
    kind = dt.datetime if node[TAG] == "datetime" else dt.time
    return kind.fromisoformat(node["v"]).replace(tzinfo=_read_zone(node["zone"]), fold=node["fold"])


def _numpy(value: np.generic, path: StatePath | str) -> dict[str, Any]:
    if type(value) is np.str_:  # of text and bytes, arrays would drop the zeros at the end
        dtype, data = f"<U{len(value)}", value.encode("utf-32-le", "surrogatepass")
    elif type(value) is np.bytes_:
        dtype, data = f"|S{len(value)}", value[:]
    elif value.dtype.hasobject:
        raise refusal(path, value)
    else:
        dtype, data = dtype_text(value.dtype, path), value.tobytes()
    return {TAG: "numpy", "dtype": dtype, "v": to_base64(data)}


def _read_numpy(node: dict[str, Any]) -> Any:
    data, dtype = from_base64(node["v"]), read_dtype(node["dtype"])
    if dtype.kind == "S":
        return np.bytes_(data)
    if dtype.kind == "U":
        return np.str_(data.decode("utf-32-le", "surrogatepass"))
    if dtype.kind == "V" and dtype.names is None:
        return np.void(data)
    return np.frombuffer(bytearray(data), dtype=dtype)[0]


# --- the table ---------------------------------------------------------------------------------------------------


_DTYPES_BY_NAME = {str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if type(kind) is torch.dtype}
# numbers and text that JSON holds, or not
_PLAIN: dict[type, Callable[[Any], Any]] = {
    type(None): lambda value: value,
    bool: lambda value: value,
    int: _int,
    float: _float,
    str: _str,
}

# by type: its tag, what makes the member "v" of a value, and what makes a value of that member
_TAGGED: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    bytes: ("bytes", to_base64, from_base64),
    bytearray: ("bytearray", to_base64, lambda text: bytearray(from_base64(text))),
    complex: ("complex", lambda z: [_float(z.real), _float(z.imag)], lambda v: complex(*map(decode_scalar, v))),
    decimal.Decimal: ("Decimal", str, decimal.Decimal),
    range: ("range", lambda r: [_int(r.start), _int(r.stop), _int(r.step)], lambda v: range(*map(decode_scalar, v))),
    dt.date: ("date", dt.date.isoformat, dt.date.fromisoformat),
    dt.timedelta: ("timedelta", lambda t: [t.days, t.seconds, t.microseconds], lambda v: dt.timedelta(*v)),
    torch.dtype: ("torch.dtype", lambda kind: str(kind).removeprefix("torch."), _DTYPES_BY_NAME.__getitem__),
    torch.device: ("torch.device", str, torch.device),
    torch.Size: ("torch.Size", list, torch.Size),
}

_MEMBER_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": _read_float,
    "str": lambda text: from_base64(text).decode("utf-8", "surrogatepass"),
    "numpy.dtype": read_dtype,
    **{tag: decode for tag, _, decode in _TAGGED.values()},
}
_NODE_DECODERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "datetime": _read_clock,
    "time": _read_clock,
    "numpy": _read_numpy,
    "path": lambda node: PATHS[node["class"]](decode_scalar(node["v"])),
}
SCALAR_TAGS = _MEMBER_DECODERS.keys() | _NODE_DECODERS.keys()


def encode_scalar(value: Any, path: StatePath | str) -> Any:
    """Encode a scalar as JSON.

    Raises:
        ConfigError: it is not a scalar, or cannot be saved exactly; the message says where it is.
    """
    kind = type(value)
    if kind in _PLAIN:
        return _PLAIN[kind](value)
    if kind in _TAGGED:
        tag, encode, _ = _TAGGED[kind]
        return {TAG: tag, "v": encode(value)}
    if kind in (dt.datetime, dt.time):
        return _clock(value, path)
    if isinstance(value, np.generic):
        return _numpy(value, path)
    if isinstance(value, np.dtype):
        return {TAG: "numpy.dtype", "v": dtype_text(value, path)}
    if isinstance(value, pathlib.PurePath) and PATHS.get(kind.__name__) is kind:
        return {TAG: "path", "class": kind.__name__, "v": _str(str(value))}
    raise refusal(path, value)


def decode_scalar(tree: Any) -> Any:
    """Decode what ``encode_scalar`` encoded; raises one of ``UNREADABLE`` for anything else."""
    if not isinstance(tree, dict):
        return tree
    tag = tree[TAG]
    return _MEMBER_DECODERS[tag](tree["v"]) if tag in _MEMBER_DECODERS else _NODE_DECODERS[tag](tree)
