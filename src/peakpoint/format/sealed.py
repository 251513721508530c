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
from collections.abc import Iterator
from typing import Any

import msgspec
from blake3 import blake3

from peakpoint.errors import CorruptError, FormatError

_TAIL = re.compile(rb',"seal":"([0-9a-f]{16})"\}\n?$')


def digest(data: bytes | bytearray | memoryview) -> str:
    """The BLAKE3 digest of ``data``: 64 hexadecimal digits."""
    return blake3(data).hexdigest()


def seal(record: dict[str, Any]) -> bytes:
    r"""Encode a non-empty record as one sealed line that ends with ``\n``.

    Example:
        >>> unseal(seal({"a": 1}), where="example")
        {'a': 1}
    """
    body = msgspec.json.encode(record)[:-1]
    return body + b',"seal":"' + digest(body)[:16].encode() + b'"}\n'


def is_intact(line: bytes) -> bool:
    r"""Whether a line that ends with ``\n`` is as ``seal`` wrote it; far faster than ``unseal``, and says no more."""
    return line[-28:-19] == b',"seal":"' and line[-19:] == digest(line[:-28])[:16].encode() + b'"}\n'


def unseal(data: bytes, *, where: str) -> dict[str, Any]:
    """Decode what ``seal`` wrote.

    Args:
        data: the whole line or file.
        where: named in errors.

    Raises:
        CorruptError: the bytes are not those that were sealed.
        FormatError: there is no seal at all, so this is not one of our records.
    """
    tail = _TAIL.search(data)
    if tail is None:
        raise FormatError(f"{where} is not a sealed Peakpoint record (its last member is not a seal)")
    body = data[: tail.start()]
    if digest(body)[:16].encode() != tail.group(1):
        raise CorruptError(f"{where} is damaged: its seal does not match its bytes")
    try:
        record: dict[str, Any] = msgspec.json.decode(body + b"}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{where} is sealed but is not JSON: {error}") from error
    return record


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Let the cyclic garbage collector rest while many objects are made that will stay.

    It runs again and again while a large state is described, walks every object of the program each time and finds
    nothing: more than half of the time for tens of thousands of tensors. Memory is freed as ever where no cycles are.

    Example:
        >>> import gc
        >>> from peakpoint.format.sealed import no_collection
        >>> with no_collection():
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
