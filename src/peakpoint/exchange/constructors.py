"""What may be built of a pickle.

Constructors of NumPy and the standard library that a file could mislead are replaced by ours: ``numpy.dtype``'s
``__setstate__`` takes flags from the file that make NumPy read pointers from bytes, so dtypes are rebuilt from their
text; a ``defaultdict`` calls its argument, so it becomes a dict.
"""

import argparse
import datetime as dt
import pathlib
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peakpoint.errors import FormatError
from peakpoint.exchange.pickle_builder import StandIn, Unbuilt

_DTYPE = re.compile(r"[<>|=]?[biufcSUV?]\d*")


class _Dtype(StandIn):
    """A NumPy dtype, from its text and byte order and nothing else that the file says; None of other kinds."""

    def __init__(self, text: Any, *_: Any) -> None:
        self.text = str(text)
        self.dtype = np.dtype(text) if isinstance(text, str) and _DTYPE.fullmatch(text) else None

    def __setstate__(self, state: Any) -> None:
        if state[2] is not None or state[3] is not None:
            self.dtype = None  # elements with fields, or of arrays
        elif self.dtype is not None and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(StandIn):
    """A NumPy array in the making: ``_reconstruct`` makes it, the state fills it; it stays None when it is not read."""

    def __init__(self, kind: Any, *_: Any) -> None:
        self.name = kind.name if isinstance(kind, Unbuilt) else str(kind)
        self.array: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _Dtype):
            raise FormatError("it holds a NumPy array without a type of elements")
        if kind.dtype is None and isinstance(data, bytes) and "O" in kind.text:
            raise FormatError(f"it holds NumPy elements of type {kind.text!r} as bytes, which would be pointers")
        if self.name != "numpy.ndarray" or kind.dtype is None or not isinstance(data, bytes):
            self.name += f" of {kind.text}"
            return
        flat = np.frombuffer(bytearray(data), dtype=kind.dtype)
        self.array = flat.reshape(shape, order="F" if fortran else "C")


def _scalar(kind: Any, data: Any) -> Any:
    if not isinstance(kind, _Dtype) or not isinstance(data, bytes):
        raise FormatError("it holds a NumPy scalar that is not a number")
    if kind.dtype is None:
        return Unbuilt(f"numpy.generic of {kind.text}", ())
    if len(data) != kind.dtype.itemsize:
        raise FormatError("it holds a NumPy scalar that is not a number")
    return np.frombuffer(data, dtype=kind.dtype)[0]


def _checked(kind: type[dt.date | dt.time]) -> Callable[..., dt.date | dt.time]:
    """Return a constructor that refuses bytes with a day 255 in them, as the class's own does not."""
    return lambda *arguments: kind(*arguments).replace()


def _default_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _deque(items: Any = (), *_: Any) -> list[Any]:
    return list(items)


@dataclass(frozen=True, slots=True)
class StorageKind:
    """Stands for a class of storages."""

    dtype: torch.dtype


def _storage_dtype(name: str) -> torch.dtype:
    kind: Any = torch.serialization.StorageType(name)  # type: ignore[no-untyped-call]
    return kind.dtype  # type: ignore[no-any-return]


def _on_cpu(data: torch.Tensor, dtype: torch.dtype, _device: Any, requires_grad: bool) -> torch.Tensor:  # noqa: FBT001
    return data.to(dtype=dtype).requires_grad_(requires_grad)


def _parameter(data: Any, requires_grad: bool, *_: Any) -> torch.nn.Parameter:  # noqa: FBT001
    """Return a parameter without the hooks and attributes that a file has for it: they could take a method's place."""
    if not isinstance(data, torch.Tensor):
        raise TypeError("a parameter of something that is no tensor")
    return torch.nn.Parameter(data, requires_grad)


def _byte_array(content: Any = b"", encoding: str = "latin-1") -> bytearray:
    return bytearray(content if isinstance(content, bytes) else _encoded(content, encoding))


def _encoded(text: Any, encoding: str) -> bytes:
    """Return bytes, which pickles of protocol 2 hold as text; the name of another encoding would import its module."""
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise pickle.UnpicklingError("bytes in an encoding that pickle does not use")
    return text.encode("latin-1")


PATHS: dict[str, Any] = {
    f"{module}.{name}": kind
    for module in ("pathlib", "pathlib._local")
    for name, kind in {
        "PosixPath": pathlib.PosixPath,
        "WindowsPath": pathlib.PureWindowsPath,
        "PurePosixPath": pathlib.PurePosixPath,
        "PureWindowsPath": pathlib.PureWindowsPath,
    }.items()
}
CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    **{f"collections.{kind.__name__}": kind for kind in (OrderedDict, Counter)},
    **{f"builtins.{kind.__name__}": kind for kind in (set, frozenset, complex)},
    "builtins.bytes": lambda: b"",  # the others are encoded text
    "builtins.bytearray": _byte_array,
    "_codecs.encode": _encoded,
    "collections.defaultdict": _default_dict,
    "collections.deque": _deque,
    # bags of attributes: building one sets its __dict__
    **dict.fromkeys(("argparse.Namespace", "types.SimpleNamespace"), argparse.Namespace),
    **{f"datetime.{kind.__name__}": _checked(kind) for kind in (dt.date, dt.datetime, dt.time)},
    **{f"datetime.{kind.__name__}": kind for kind in (dt.timedelta, dt.timezone)},
    **PATHS,
    "numpy.dtype": _Dtype,
    **{f"{module}.multiarray.scalar": _scalar for module in ("numpy.core", "numpy._core")},
    **{f"{module}.multiarray._reconstruct": _Array for module in ("numpy.core", "numpy._core")},
    # torch's own, but for sparse, quantized, nested and foreign tensors, which no checkpoint of ours can hold
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.nn.parameter.Parameter": torch.nn.Parameter,
    **{
        f"torch._utils.{name}": getattr(torch._utils, name)  # noqa: SLF001 - of which torch.save makes use
        for name in (f"_rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3"))
    },
    **{f"torch._utils._rebuild_{kind}": _parameter for kind in ("parameter", "parameter_with_state")},
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _on_cpu,
    "torch.serialization._get_layout": torch.serialization._get_layout,  # noqa: SLF001 - as above
}
VALUES = {
    "torch.storage.UntypedStorage": StorageKind(torch.uint8),
    **{
        f"torch.{kind.__name__}": StorageKind(_storage_dtype(kind.__name__))
        for kind in torch._storage_classes  # noqa: SLF001 - torch's list
        if kind.__module__ == "torch"
    },
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}


class Thaw:
    """Replaces the stand-ins of a pickle by arrays and records."""

    def __init__(self, inert: Collection[str]) -> None:
        self._inert = inert
        self._thawed: dict[int, Any] = {}
        self._alive: list[Any] = []  # an object that is freed would give its id to another

    def thaw(self, value: Any) -> Any:
        """Return a value with everything in it replaced."""
        if isinstance(value, _Array):
            return Unbuilt(value.name, ()) if value.array is None else value.array
        if isinstance(value, _Dtype):
            return value.dtype or Unbuilt(f"numpy.dtype of {value.text}", ())
        change = _CHANGES.get(type(value))
        if change is None:
            return value
        if id(value) not in self._thawed:
            self._alive.append(value)
            self._thawed[id(value)] = value
            self._thawed[id(value)] = change(self, value)
        return self._thawed[id(value)]

    def mapping(self, value: Any) -> Any:
        """Replace the values of a dict."""
        for key in list(value):
            value[key] = self.thaw(value[key])
        return value

    def sequence(self, value: list[Any]) -> list[Any]:
        """Replace the elements of a list."""
        value[:] = [self.thaw(child) for child in value]
        return value

    def record(self, value: Unbuilt) -> Any:
        """Return a dict of the name and the values of an object whose class is inert."""
        if value.name not in self._inert:
            return value
        contents = {"arguments": list(value.arguments or ()), "state": value.state, "items": value.values}
        record = {key: self.thaw(content) for key, content in contents.items() if content not in ([], None)}
        return {"class": value.name, **record}


def _thaw_namespace(thaw: Thaw, value: argparse.Namespace) -> argparse.Namespace:
    thaw.mapping(vars(value))
    return value


_CHANGES: dict[type, Callable[[Thaw, Any], Any]] = {
    dict: Thaw.mapping,
    OrderedDict: Thaw.mapping,
    Counter: Thaw.mapping,
    list: Thaw.sequence,
    tuple: lambda thaw, value: tuple(thaw.thaw(child) for child in value),
    argparse.Namespace: _thaw_namespace,
    Unbuilt: Thaw.record,
}
