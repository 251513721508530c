"""Sealed JSON: one line of JSON that notices when a bit of it has flipped.

A sealed object is a JSON object whose last member is ``"seal"``: the first 16 hexadecimal digits of the BLAKE3 digest
of every byte before the comma in front of that member. It stays ordinary JSON for every other tool.

::

    {"a":1,"seal":"…16 hex digits…"}
           ^ the digest covers the bytes up to here

The seal finds accidents (bit rot, torn writes), not attackers. Source: BLAKE3, O'Connor et al., 2020.
"""

import contextlib
import gc
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import msgspec
from blake3 import blake3

from peakpoint.errors import CorruptError, Error, FormatError
from peakpoint.format.members import check_time
from peakpoint.format.metrics import metrics_from_json, metrics_to_json

FORMAT = 1

_TAIL = re.compile(rb',"seal":"([0-9a-f]{16})"\}\n?$')


def digest(data: bytes | bytearray | memoryview) -> str:
    """Return the BLAKE3 digest of ``data``: 64 hexadecimal digits."""
    return blake3(data).hexdigest()


def seal(record: dict[str, Any] | msgspec.Struct) -> bytes:
    r"""Encode a non-empty record as one sealed line that ends with ``\n``.

    Example:
        >>> unseal(seal({"a": 1}), where="example")
        {'a': 1}
    """
    body = msgspec.json.encode(record)[:-1]
    return body + b',"seal":"' + digest(body)[:16].encode() + b'"}\n'


def is_intact(line: bytes) -> bool:
    r"""Whether a line that ends with ``\n`` is as ``seal`` wrote it; far faster than ``unseal``."""
    return line[-28:-19] == b',"seal":"' and line[-19:] == digest(line[:-28])[:16].encode() + b'"}\n'


def unseal(data: bytes, *, where: str, unsealed: type[Error] = FormatError) -> dict[str, Any]:
    """Decode what ``seal`` wrote.

    Args:
        data: the whole line or file.
        where: the line or file, named in errors.
        unsealed: the error when there is no seal, or no JSON under it; ``CorruptError`` where nobody else writes.

    Raises:
        CorruptError: the bytes are not those that were sealed.
        FormatError: they are no sealed JSON at all.
    """
    tail = _TAIL.search(data)
    if tail is None:
        raise unsealed(f"{where} is corrupt: it " + ("does not end with a seal" if data else "is empty"))
    body = data[: tail.start()]
    if digest(body)[:16].encode() != tail.group(1):
        raise CorruptError(f"{where} is corrupt: its seal does not match its bytes")
    try:
        members: dict[str, Any] = msgspec.json.decode(body + b"}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise unsealed(f"{where} is sealed but is not JSON: {error}") from error
    return members


# --- records ------------------------------------------------------------------------------------------------------


def encode_record(record: Any, *, omit: Collection[str] = (), version: int = FORMAT) -> bytes:
    """Encode a dataclass as a sealed record: ``format``, then its fields in their order.

    Args:
        record: a dataclass; a field ``metrics`` may hold NaN and infinities.
        omit: the names of fields that are not written.
        version: the record's ``format``.
    """
    members = {field.name: getattr(record, field.name) for field in fields(record) if field.name not in omit}
    if "metrics" in members:
        members["metrics"] = metrics_to_json(members["metrics"])
    return seal({"format": version, **members})


R = TypeVar("R")


def decode_record(
    kind: type[R], data: bytes, *, where: str, unsealed: type[Error] = FormatError, newest: int = FORMAT
) -> R:
    """Decode a sealed record of one kind; members that the kind does not have are passed over.

    Args:
        kind: the dataclass that ``encode_record`` was given, or ``dict`` for all members as they are.
        data: the bytes of the file.
        where: the file's key, named in errors.
        unsealed: see ``unseal``.
        newest: the highest ``format`` that is read.

    Raises:
        CorruptError: the bytes are not those that were written.
        FormatError: another release wrote the record, and this one cannot read it; or there is no seal.
    """
    with gc_paused():
        try:
            members = unseal(data, where=where, unsealed=unsealed)
        except (CorruptError, FormatError) as error:
            raise type(error)(f"{error}; restore the file from a backup") from error
        check_format(members, where=where, newest=newest)
        try:
            if "metrics" in members:
                members["metrics"] = metrics_from_json(members["metrics"])
            record = msgspec.convert(members, kind)
            for field in fields(kind) if is_dataclass(kind) else ():
                check_time(field.name, getattr(record, field.name))
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:  # of metrics, and of msgspec
            raise FormatError(
                f"{where} cannot be read by this release of Peakpoint: {error}; update Peakpoint if a newer release "
                "has written it, otherwise restore it from a backup"
            ) from error
    return record


def check_format(members: Mapping[str, Any], *, where: str, newest: int = FORMAT) -> None:
    """Refuse a record of a format that this release does not know.

    Raises:
        FormatError: the record's ``format`` is missing or newer.
    """
    version = members.get("format")
    if version not in range(FORMAT, newest + 1):
        raise FormatError(f"{where} has format {version!r}; this release of Peakpoint reads format {newest}: update it")


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector while many objects are made that will stay.

    It runs again and again while a large state is described, walks every object of the program each time and finds
    nothing: more than half of the time for tens of thousands of tensors. Memory is freed as ever where no cycles are.

    Example:
        >>> import gc
        >>> from peakpoint.format.sealed import gc_paused
        >>> with gc_paused():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
