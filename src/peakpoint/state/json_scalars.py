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
    """A place in the state; its text, which only errors need, is made when it is asked for."""

    parent: "StatePath | str"
    key: Any
    attribute: bool

    def __str__(self) -> str:
        if self.attribute and str(self.key).isidentifier():
            return f"{self.parent}.{self.key}"
        key = f'"{self.key}"' if isinstance(self.key, str) and '"' not in self.key else repr(self.key)
        return f"{self.parent}[{key}]"


def kind_of(value: object) -> str:
    """The full name of a value's type, as errors name it."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def make_path(fields: tuple["StatePath | str", Any, bool]) -> StatePath:
    """A place; three times as fast as its constructor."""
    return tuple.__new__(StatePath, fields)


def refusal(path: StatePath | str, value: object, why: str = "") -> ConfigError:
    """The error of a value that cannot be kept."""
    hint = why or (
        "it cannot be kept exactly; give an object with state_dict() and load_state_dict(), or tensors, arrays, "
        "numbers, text and containers of them"
    )
    return ConfigError(f"{path} is a {kind_of(value)}: {hint}")


def to_base64(data: bytes) -> str:
    """Bytes as text."""
    return base64.b64encode(data).decode()


def is_unicode(text: str) -> bool:
    """Whether JSON can say it: no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates
        return False
    return True


def dtype_text(dtype: np.dtype[Any], path: StatePath | str) -> str:
    """A NumPy type as text, which ``read_dtype`` reads."""
    text = ""
    with contextlib.suppress(ValueError, SyntaxError):  # fields that overlap, fields of types without a description
        text = dtype.str if dtype.names is None else to_base64(repr(dtype.descr).encode())
        back = read_dtype(text)
        if back == dtype and back.type is dtype.type:
            return text
    raise refusal(path, dtype, f"NumPy's element type {dtype!r} cannot be kept exactly")


def _float(value: float) -> Any:
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return {TAG: "float", "v": struct.pack(">d", value).hex()}
    return {TAG: "float", "v": "inf" if value > 0 else "-inf"}


def _int(value: int) -> Any:
    return value if -(2**63) <= value < 2**63 else {TAG: "int", "v": hex(value)}


def _str(value: str) -> Any:
    return value if is_unicode(value) else {TAG: "str", "v": to_base64(value.encode("utf-8", "surrogatepass"))}


def _zone(zone: dt.tzinfo | None, path: StatePath | str) -> Any:
    if zone is None:
        return None
    if isinstance(zone, zoneinfo.ZoneInfo) and zone.key is not None:
        return zone.key
    if type(zone) is dt.timezone:
        offset = zone.utcoffset(None)
        name = zone.tzname(None)
        named = [] if name == dt.timezone(offset).tzname(None) else [_str(name)]
        return [offset.days * 86400 + offset.seconds, offset.microseconds, *named]
    raise refusal(path, zone)


def _datetime(value: dt.datetime, path: StatePath | str) -> Any:
    naive = value.replace(tzinfo=None, fold=0)
    return {TAG: "datetime", "v": naive.isoformat(), "zone": _zone(value.tzinfo, path), "fold": value.fold}


def _time(value: dt.time, path: StatePath | str) -> Any:
    naive = value.replace(tzinfo=None, fold=0)
    return {TAG: "time", "v": naive.isoformat(), "zone": _zone(value.tzinfo, path), "fold": value.fold}


def _tagged(tag: str, convert: Callable[[Any], Any]) -> Callable[[Any, StatePath | str], Any]:
    return lambda value, path: {TAG: tag, "v": convert(value)}  # noqa: ARG005


_SCALARS: dict[type, Callable[[Any, StatePath | str], Any]] = {
    type(None): lambda value, path: value,  # noqa: ARG005
    bool: lambda value, path: value,  # noqa: ARG005
    int: lambda value, path: _int(value),  # noqa: ARG005
    float: lambda value, path: _float(value),  # noqa: ARG005
    str: lambda value, path: _str(value),  # noqa: ARG005
    bytes: _tagged("bytes", to_base64),
    bytearray: _tagged("bytearray", to_base64),
    complex: _tagged("complex", lambda value: [_float(value.real), _float(value.imag)]),
    decimal.Decimal: _tagged("Decimal", str),
    range: _tagged("range", lambda value: [_int(value.start), _int(value.stop), _int(value.step)]),
    dt.datetime: _datetime,
    dt.time: _time,
    dt.date: _tagged("date", dt.date.isoformat),
    dt.timedelta: _tagged("timedelta", lambda value: [value.days, value.seconds, value.microseconds]),
    torch.dtype: _tagged("torch.dtype", lambda value: str(value).removeprefix("torch.")),
    torch.device: _tagged("torch.device", str),
    torch.Size: _tagged("torch.Size", list),
}


def scalar(value: Any, path: StatePath | str) -> Any:
    """A value in JSON; raises for what is no scalar."""
    encode = _SCALARS.get(type(value))
    if encode is not None:
        return encode(value, path)
    if type(value) is np.str_:  # of text and bytes, arrays would drop the zeros at the end
        text = value.encode("utf-32-le", "surrogatepass")
        return {TAG: "numpy", "dtype": f"<U{len(value)}", "v": to_base64(text)}
    if type(value) is np.bytes_:
        return {TAG: "numpy", "dtype": f"|S{len(value)}", "v": to_base64(value[:])}
    if isinstance(value, np.generic):
        if value.dtype.hasobject:
            raise refusal(path, value)
        return {TAG: "numpy", "dtype": dtype_text(value.dtype, path), "v": to_base64(value.tobytes())}
    if isinstance(value, np.dtype):
        return {TAG: "numpy.dtype", "v": dtype_text(value, path)}
    if isinstance(value, pathlib.PurePath) and PATHS.get(type(value).__name__) is type(value):
        return {TAG: "path", "class": type(value).__name__, "v": _str(str(value))}
    raise refusal(path, value)


def from_base64(text: str) -> bytes:
    """The inverse of ``to_base64``."""
    return base64.b64decode(text, validate=True)


def read_dtype(text: str) -> np.dtype[Any]:
    """The inverse of ``dtype_text``."""
    if _SIMPLE_DTYPE.fullmatch(text):
        return np.dtype(text)
    description = ast.literal_eval(from_base64(text).decode())
    structured: np.dtype[Any] = np.lib.format.descr_to_dtype(description)
    return structured


def read_float(text: str) -> float:
    """What is no finite number."""
    if text in ("inf", "-inf"):
        return float(text)
    value: float = struct.unpack(">d", bytes.fromhex(text))[0]
    return value
