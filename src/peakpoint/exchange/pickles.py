"""Pickles of other tools, read without running anything that they name.

First the pickle is only scanned: the name of something that runs code ends the reading before anything is built. Then
``PickleBuilder`` builds it, which calls nothing but what ``constructors`` lists; of everything else it makes records.

Source: PyTorch, ``torch/serialization.py``; CVE-2025-32434 for why torch before 2.6 is refused.
"""

import io
import pickle
import pickletools
import re
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from peakpoint.errors import ConfigError, CorruptError, FormatError, MissingExtraError
from peakpoint.exchange.constructors import CONSTRUCTORS, VALUES, Thaw
from peakpoint.exchange.pickle_builder import PickleBuilder, global_name
from peakpoint.exchange.storages import ArchiveStorages, LegacyStorages
from peakpoint.exchange.unread import kind_by_beginning, kind_of_archive
from peakpoint.store import translated

_LARGEST_PICKLE = 1024**3  # bytes without tensors
_LEGACY_PICKLES = 5  # magic number, protocol, system, object, keys of storages
_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch before 1.6 go on after two bytes
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_RUNS_CODE = frozenset(  # and in no checkpoint
    (
        *("os", "posix", "nt", "sys", "subprocess", "shutil", "pty", "socket", "ctypes", "importlib", "runpy"),
        *("pdb", "bdb", "timeit", "webbrowser", "multiprocessing", "asyncio", "signal", "marshal", "pickle", "_pickle"),
        *("pip", "urllib", "tempfile", "pydoc", "zipimport", "_thread"),
        *(f"builtins.{name}" for name in ("eval", "exec", "execfile", "compile", "open", "__import__", "input")),
        *(f"builtins.{name}" for name in ("breakpoint", "globals", "setattr", "delattr")),
        *("io.open", "_io.open", "types.CodeType", "types.FunctionType", "torch.load", "torch.hub", "torch.jit"),
    )
)
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
        inert: full names of classes of which a dict with their name and values is kept.

    Returns:
        The value, with an ``Unbuilt`` for everything of another class that is not allowed.

    Raises:
        FormatError: the file names something that runs code, or ``torch.save`` did not write it.
        CorruptError: it is cut short or damaged.
    """
    require_torch()
    where = where or str(source)
    with translated("read", Path(where)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and pickletools, about their own ways
        is_zip = _check_kind(source, where)
        storages, pickles = _archive(source, where) if is_zip else (None, _legacy_pickles(source, where))
        check_globals(scan(pickles, where), where, inert)
        return _build(source, storages, pickles, where, inert)


def _build(
    source: Path | bytes, storages: ArchiveStorages | None, pickles: list[bytes], where: str, inert: Collection[str]
) -> Any:
    try:
        if storages is not None:
            value = PickleBuilder(CONSTRUCTORS, VALUES, storages.storage).load(pickles[0])
        else:
            value = _build_legacy(source, pickles)
        return Thaw(inert).thaw(value)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error
    except RecursionError as error:
        raise FormatError(f"{where} is nested too deep") from error
    except UNREADABLE:
        raise CorruptError(f"{where} is damaged, or not a file of torch.save: its pickle cannot be built") from None


def _build_legacy(source: Path | bytes, pickles: list[bytes]) -> Any:
    *_, content, keys = pickles
    storages = LegacyStorages()
    value = PickleBuilder(CONSTRUCTORS, VALUES, storages.storage).load(content)
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as stream:
        stream.seek(sum(map(len, pickles)))
        storages.fill(stream, PickleBuilder({}, {}, storages.storage).load(keys))
    return value


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
    kind = kind_by_beginning(where, begin)
    if kind is not None:
        raise FormatError(kind)
    raise FormatError(f"{where} is not a file of torch.save: it is neither a zip nor a pickle with torch's mark")


def _first(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1024)


def _archive(source: Path | bytes, where: str) -> tuple[ArchiveStorages, list[bytes]]:
    """Return the storages of an archive, and the pickle in it."""
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    try:
        with zipfile.ZipFile(source if isinstance(source, Path) else io.BytesIO(source)) as archive:
            records, kind = archive.infolist(), kind_of_archive(where, archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise CorruptError(f"{where} is cut short or damaged: {error}") from error
    if kind is not None:
        raise FormatError(kind)
    claimed = sum(record.file_size for record in records)
    if claimed > size:
        raise FormatError(f"{where} has {size} bytes and says that {claimed} are in it: torch.save wrote no such file")
    try:
        archive_reader: Any = torch._C.PyTorchFileReader(  # noqa: SLF001 - see above
            str(source) if isinstance(source, Path) else io.BytesIO(source)
        )
        if archive_reader.has_record("constants.pkl"):
            raise FormatError(
                f"{where} is a program of TorchScript, which is not read: if you trust it, "
                "torch.save({'model': torch.jit.load(FILE).state_dict()}, FILE.pth)"
            )
        if not archive_reader.has_record("data.pkl"):
            raise FormatError(f"{where} is a zip archive, but torch.save did not write it: it has no data.pkl")
        sizes = _record_sizes(records, where)
        storages = ArchiveStorages(archive_reader, sizes, source if isinstance(source, Path) else None)
        return storages, [archive_reader.get_record("data.pkl")]
    except (RuntimeError, UnicodeDecodeError) as error:  # of names in it
        raise CorruptError(f"{where} is cut short or damaged: torch cannot read its archive") from error


def _record_sizes(records: Sequence[zipfile.ZipInfo], where: str) -> dict[str, int]:
    """Return the size of each record of an archive by its name.

    Raises:
        FormatError: they are compressed, or two have one name; ``torch.save`` writes neither.
    """
    sizes = {record.filename.partition("/")[2]: record.file_size for record in records}
    if len(sizes) < len(records):
        raise FormatError(f"{where} holds two files of one name: torch.save wrote no such file")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise FormatError(f"{where} is a compressed archive: unpack it, and pack it again with zip -0 -r")
    return sizes


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
    for data in pickles:
        for operation, argument, place in _operations(io.BytesIO(data), where):
            if operation.name == "GLOBAL":
                globals_named[global_name(data, place)] = None
            elif operation.name == "PROTO" and argument != 2:
                raise FormatError(_other_protocol(where, f"protocol {argument}"))
            elif operation.name in {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"}:
                raise FormatError(_other_protocol(where, operation.name))
    return list(globals_named)


def _other_protocol(where: str, operation: str) -> str:
    return (
        f"{where} is a pickle with {operation}, and not of the protocol that torch.save uses; {_ELSEWHERE}, "
        "without pickle_protocol="
    )


def check_globals(names: Collection[str], where: str, inert: Collection[str] = ()) -> None:
    """Refuse globals that run code: nothing of them would be run, but who has written them means harm.

    Raises:
        FormatError: names each of them, and says what to do.
    """
    hostile = [
        name
        for name in names
        if name not in inert and any(name == prefix or name.startswith(f"{prefix}.") for prefix in _RUNS_CODE)
    ]
    if hostile:
        raise FormatError(
            f"{where} was not loaded: it names {', '.join(hostile)}, which Peakpoint does not build from a file. No "
            f"checkpoint needs this, so the file may be hostile. {_ELSEWHERE.capitalize()}"
        )


_ELSEWHERE = "if you trust it, load it in an environment without anything to lose, and save its state dicts from there"
_LIBRARIES = {*sys.stdlib_module_names, "functorch", "numpy", "torch", "torchgen"} - {"__main__"}


def _is_of_library(name: str) -> bool:
    return name.partition(".")[0] in _LIBRARIES or "." not in name


def could_be_inert(name: str) -> bool:
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
