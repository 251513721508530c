"""Pickles of other tools, read without running anything that they name.

Three layers. First the pickle is only scanned: a global that is not on the list below ends the reading before anything
is built. Then torch's ``weights_only`` unpickler builds it, which calls nothing but what is allowed. Last,
constructors of NumPy and the standard library that a file could mislead are replaced by ours: ``numpy.dtype``'s
``__setstate__`` takes flags from the file that make NumPy read pointers from bytes, so dtypes are rebuilt from their
text; a ``defaultdict`` calls its argument, so it becomes a dict.

Source: PyTorch, ``torch/_weights_only_unpickler.py``; CVE-2025-32434 for why torch before 2.6 is refused.
"""

import argparse
import datetime as dt
import io
import pathlib
import pickle
import pickletools
import re
import sys
import tarfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from peakpoint.errors import ConfigError, CorruptError, FormatError, MissingExtraError
from peakpoint.store import translated

_LARGEST_PICKLE = 1024**3  # bytes without tensors
_LEGACY_PICKLES = 5  # magic number, protocol, system, object, keys of storages
_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch before 1.6 go on after two bytes
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_DTYPE = re.compile(r"[<>|=]?[biufcSUV?]\d*")

_PLAIN = frozenset(
    (
        *("collections.OrderedDict", "collections.Counter", "_codecs.encode"),
        *(f"builtins.{name}" for name in ("bytearray", "set", "complex")),
        # torch's own, but for sparse, quantized, nested and foreign tensors, which no checkpoint of ours can hold
        *(f"torch.{name}" for name in ("Size", "device", "nn.parameter.Parameter")),
        *(f"{kind.__module__}.{kind.__name__}" for kind in torch._storage_classes),  # noqa: SLF001 - torch's list
        *(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)),
        *(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
        *("torch._utils._rebuild_parameter_with_state", "torch._utils._rebuild_device_tensor_from_cpu_tensor"),
        "torch.serialization._get_layout",
    )
)


class _Dtype:
    """A NumPy dtype, from its text and byte order and nothing else that the file says."""

    def __init__(self, text: Any, *_: Any) -> None:
        if not isinstance(text, str) or not _DTYPE.fullmatch(text):
            raise FormatError(f"it holds NumPy elements of type {text!r}, which Peakpoint does not read from a pickle")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """A NumPy array in the making: ``_reconstruct`` makes it, the state fills it."""

    def __init__(self, *_: Any) -> None:
        self.array: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _Dtype) or not isinstance(data, bytes):
            raise FormatError("it holds a NumPy array of objects, which needs pickle: save plain numbers instead")
        flat = np.frombuffer(bytearray(data), dtype=kind.dtype)
        self.array = flat.reshape(shape, order="F" if fortran else "C")


def _scalar(kind: Any, data: Any) -> Any:
    if not isinstance(kind, _Dtype) or not isinstance(data, bytes) or len(data) != kind.dtype.itemsize:
        raise FormatError("it holds a NumPy scalar that is not a number")
    return np.frombuffer(data, dtype=kind.dtype)[0]


class _Marker:
    """Stands for a class that a pickle only passes on, and never calls."""


def _default_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _deque(items: Any = (), *_: Any) -> list[Any]:
    return list(items)


class Inert:
    """The name and the values of an object whose class ``inert=`` names; see ``load``."""

    name: ClassVar[str] = ""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __new__(cls, *args: Any) -> Self:
        """Keep the arguments."""
        record = super().__new__(cls)
        record.arguments = args
        return record

    arguments: tuple[Any, ...]

    def __setstate__(self, state: Any) -> None:
        """Keep the state."""
        self.state = state


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
_OURS: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,  # a bag of attributes: building one sets its __dict__
    "builtins.frozenset": frozenset,
    "collections.defaultdict": _default_dict,
    "collections.deque": _deque,
    **{f"builtins.{name}": _Marker() for name in ("int", "float", "str", "bool", "list", "dict", "tuple")},
    **{f"datetime.{kind.__name__}": kind for kind in (dt.date, dt.datetime, dt.time, dt.timedelta, dt.timezone)},
    **PATHS,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Marker(),
    **{f"{module}.multiarray.scalar": _scalar for module in ("numpy.core", "numpy._core")},
    **{f"{module}.multiarray._reconstruct": _Array for module in ("numpy.core", "numpy._core")},
}

UNREADABLE = (  # what torch and constructors raise for bytes that torch.save never writes
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def load(source: Path | bytes, *, where: str = "", inert: Collection[str] = ()) -> Any:
    """Load what ``torch.save`` wrote, with tensors on the CPU, mapped from the file where possible.

    Runs no code of the file's and imports nothing that it names.

    Args:
        source: a file, or its bytes.
        where: names the source in errors.
        inert: full names of classes that become a dict of their name and values instead of ending the reading.

    Raises:
        FormatError: the file names a class or function that is not allowed, or ``torch.save`` did not write it.
        CorruptError: it is cut short or damaged.
    """
    require_torch()
    where = where or str(source)
    with translated("read", Path(where)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and pickletools, about their own ways
        is_zip = _check_kind(source, where)
        pickles = _zipped_pickle(source, where) if is_zip else _legacy_pickles(source, where)
        check_globals(scan(pickles, where), where, inert)
        return _build(source, where, inert, mapped=is_zip and isinstance(source, Path))


def _build(source: Path | bytes, where: str, inert: Collection[str], *, mapped: bool) -> Any:
    kinds = {name: type("Inert", (Inert,), {"name": name}) for name in inert}
    allowed: list[Any] = [(value, name) for name, value in {**_OURS, **kinds}.items()]
    file = source if isinstance(source, Path) else io.BytesIO(source)
    try:
        with torch.serialization.safe_globals(allowed):
            value = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        return _Thaw().thaw(value)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error
    except RecursionError as error:
        raise FormatError(f"{where} is nested too deep") from error
    except UNREADABLE:  # not chained: torch's text recommends to load the file without any restriction
        raise CorruptError(f"{where} is damaged, or not a file of torch.save: its pickle cannot be built") from None


def require_torch() -> None:
    """Refuse a torch whose restricted unpickler can be made to run code.

    Raises:
        MissingExtraError: torch is older than 2.6.
    """
    if tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2]) < (2, 6):
        raise MissingExtraError(
            f"torch {torch.__version__} can be made to run code by a checkpoint (CVE-2025-32434), so nothing is "
            "imported with it: pip install 'peakpoint[import]', or any torch from 2.6 on"
        )


def _check_kind(source: Path | bytes, where: str) -> bool:
    """Whether it is an archive of torch from 1.6 on; False for the format before that."""
    begin = source[:1024] if isinstance(source, bytes) else _first(source)
    if begin.startswith(b"PK\x03\x04"):
        return True
    if _MAGIC in begin[:32]:
        return False
    if begin[257:262] == b"ustar" or (isinstance(source, Path) and tarfile.is_tarfile(source)):
        raise FormatError(f"{where} is a tar archive of torch before 0.1.10: load it there and save it again")
    if not begin:
        raise CorruptError(f"{where} is empty")
    if begin[:1] == b"\x80":
        raise FormatError(
            f"{where} is a plain pickle, which Peakpoint does not read, and not a file of torch.save; if you trust it, "
            "load it in an environment without anything to lose and save it with torch.save"
        )
    raise FormatError(f"{where} is not a file of torch.save: it is neither a zip nor a pickle with torch's mark")


def _first(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1024)


def _zipped_pickle(source: Path | bytes, where: str) -> list[bytes]:
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    try:
        with zipfile.ZipFile(source if isinstance(source, Path) else io.BytesIO(source)) as archive:
            claimed = sum(info.file_size for info in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise CorruptError(f"{where} is cut short or damaged: {error}") from error
    if claimed > size:  # torch.save does not compress
        raise FormatError(f"{where} has {size} bytes and says that {claimed} are in it: torch.save wrote no such file")
    try:
        # the reader that torch.load uses, so that what is scanned is what is built
        archive_reader: Any = torch._C.PyTorchFileReader(  # noqa: SLF001 - see above
            str(source) if isinstance(source, Path) else io.BytesIO(source)
        )
        if archive_reader.has_record("constants.pkl"):
            raise FormatError(f"{where} is a TorchScript program: torch.save(torch.jit.load(...).state_dict(), ...)")
        if not archive_reader.has_record("data.pkl"):
            raise FormatError(f"{where} is a zip archive, but torch.save did not write it: it has no data.pkl")
        return [archive_reader.get_record("data.pkl")]
    except RuntimeError as error:
        raise CorruptError(f"{where} is cut short or damaged: torch cannot read its archive") from error


def _legacy_pickles(source: Path | bytes, where: str) -> list[bytes]:
    """The pickles in front of the tensors of a file of torch before 1.6."""
    stream = source.open("rb") if isinstance(source, Path) else io.BytesIO(source)
    pickles = []
    with stream:
        for _ in range(_LEGACY_PICKLES):
            begin = stream.tell()
            for _ in _operations(stream, where):
                pass
            end = stream.tell()
            if end - begin > _LARGEST_PICKLE:
                raise FormatError(f"{where} has a pickle of more than {_LARGEST_PICKLE} bytes without its tensors")
            stream.seek(begin)
            pickles.append(stream.read(end - begin))
    return pickles


def check_operations(data: bytes, where: str) -> None:
    """Refuse what is no pickle, or asks for more memory than its bytes are worth; nothing is built.

    Raises:
        CorruptError: it is cut short, or no pickler wrote it.
    """
    for _ in _operations(io.BytesIO(data), where):
        pass


def _operations(stream: Any, where: str) -> Iterator[tuple[Any, Any, Any]]:
    try:
        for number, (operation, argument, place) in enumerate(pickletools.genops(stream)):
            _check_memo(operation.name, argument, number)
            yield operation, argument, place
    except (ValueError, IndexError, AttributeError, UnicodeDecodeError, OverflowError) as error:
        raise CorruptError(f"{where} is damaged: its pickle cannot be read: {str(error)[:200]}") from error


def _check_memo(operation: str, argument: Any, number: int) -> None:
    """Refuse a place in the memo that no pickler reaches in so many operations: they number objects from 0."""
    if operation in _PUTS and argument > number:
        raise ValueError(f"it memoizes at {argument} after {number} operations")


def scan(pickles: Collection[bytes], where: str) -> list[str]:
    """Return every global that pickles name, in order; nothing is built.

    Raises:
        FormatError: they name one by an operation that ``torch.save`` does not use.
        CorruptError: they are not pickles.
    """
    globals_named: dict[str, None] = {}
    names, modules = torch._utils.NAME_MAPPING, torch._utils.IMPORT_MAPPING  # noqa: SLF001 - of Python 2, as torch.load
    for data in pickles:
        for operation, argument, place in _operations(io.BytesIO(data), where):
            if operation.name == "GLOBAL":
                module, name = _name_at(data, place + 1)  # as torch reads it: pickletools would undo escapes
                module, name = names.get((module, name), (module, name))
                globals_named[f"{modules.get(module, module)}.{name}"] = None
            elif operation.name == "PROTO" and argument != 2:
                raise FormatError(_other_protocol(where, f"protocol {argument}"))
            elif operation.name in {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"}:
                raise FormatError(_other_protocol(where, operation.name))
    return list(globals_named)


def _name_at(data: bytes, begin: int) -> tuple[str, str]:
    middle = data.index(b"\n", begin)
    end = data.index(b"\n", middle + 1)
    return data[begin:middle].decode("utf-8", "replace"), data[middle + 1 : end].decode("utf-8", "replace")


def _other_protocol(where: str, operation: str) -> str:
    return (
        f"{where} is a pickle with {operation}, and not of the protocol that torch.save uses; {_ELSEWHERE}, "
        "without pickle_protocol="
    )


def check_globals(names: Collection[str], where: str, inert: Collection[str] = ()) -> None:
    """Refuse globals that are not on the lists.

    Raises:
        FormatError: names each of them, and says what to do.
    """
    foreign = [name for name in names if not (name in _PLAIN or name in _OURS or name in inert)]
    if not foreign:
        return
    refused = f"{where} was not loaded: it names {', '.join(foreign)}, which Peakpoint does not build from a file. "
    if all(_could_be_plain(name) for name in foreign):
        options = " ".join(f"--inert {name}" for name in foreign)
        classes = "it is a plain class" if len(foreign) == 1 else "they are plain classes"
        raise FormatError(
            f"{refused}If {classes} of yours, {options} (inert= in Python) keeps a record of the values; otherwise "
            f"{_ELSEWHERE}"
        )
    raise FormatError(f"{refused}No checkpoint needs this, so the file may be hostile. {_ELSEWHERE.capitalize()}")


_ELSEWHERE = "if you trust it, load it in an environment without anything to lose, and save its state dicts from there"
_LIBRARIES = {*sys.stdlib_module_names, "functorch", "numpy", "torch", "torchgen"} - {"__main__"}


def _is_of_library(name: str) -> bool:
    return name.partition(".")[0] in _LIBRARIES or "." not in name


def _could_be_plain(name: str) -> bool:
    """Whether the name looks like that of a plain class of a training script."""
    return not _is_of_library(name) and name.rpartition(".")[2].lstrip("_")[:1].isupper()


def check_inert(names: Collection[str]) -> None:
    """Refuse names that are not classes of the user's code.

    Raises:
        ConfigError: one belongs to the standard library, NumPy or torch, or names no module.
    """
    for name in names:
        if _is_of_library(name):
            raise ConfigError(
                f"--inert {name}: only plain classes of your own code can be kept as records, such as "
                "mypackage.Config, and nothing of the standard library, of NumPy or of torch"
            )


class _Thaw:
    """Replaces the stand-ins of a pickle by arrays and records."""

    def __init__(self) -> None:
        self._thawed: dict[int, Any] = {}
        self._alive: list[Any] = []  # an object that is freed would give its id to another

    def thaw(self, value: Any) -> Any:
        if isinstance(value, _Array):
            return value.array
        if isinstance(value, _Dtype):
            return value.dtype
        change = _CHANGES.get(Inert if isinstance(value, Inert) else type(value))
        if change is None:
            return value
        if id(value) not in self._thawed:
            self._alive.append(value)
            self._thawed[id(value)] = value
            self._thawed[id(value)] = change(self, value)
        return self._thawed[id(value)]

    def mapping(self, value: Any) -> Any:
        for key in list(value):
            value[key] = self.thaw(value[key])
        return value

    def sequence(self, value: list[Any]) -> list[Any]:
        value[:] = [self.thaw(child) for child in value]
        return value

    def inert(self, value: Inert) -> dict[str, Any]:
        record = {"class": value.name, "arguments": self.thaw(list(value.arguments)), "state": self.thaw(value.state)}
        return {name: content for name, content in record.items() if content not in ([], None)}


def _thaw_namespace(thaw: _Thaw, value: argparse.Namespace) -> argparse.Namespace:
    thaw.mapping(vars(value))
    return value


_CHANGES: dict[type, Callable[[_Thaw, Any], Any]] = {
    dict: _Thaw.mapping,
    OrderedDict: _Thaw.mapping,
    Counter: _Thaw.mapping,
    list: _Thaw.sequence,
    tuple: lambda thaw, value: tuple(thaw.thaw(child) for child in value),
    argparse.Namespace: _thaw_namespace,
    Inert: _Thaw.inert,
}
