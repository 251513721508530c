"""What a store is. The contract, in full, is the conformance suite in tests/store/test_store.py.

Keys are relative POSIX paths such as ``runs/a/run.json``. A store needs no locks and no overwriting: everything that
the format writes is created once, appended to by one writer, or deleted.
"""

import errno
import os
import re
import socket
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Protocol, TypeVar

import msgspec

from peakpoint.errors import ConfigError, ConflictError, FormatError, NotFoundError, StoreError

Chunk = bytes | bytearray | memoryview

# The most bytes that are read at once, so that a file of absurd size in the place of a record is refused unread.
SMALL = 2**20  # what people write, and records that hardly grow: peakpoint.json, run.json, production.toml
RECORD = 2**28  # every other record: a manifest has about 200 bytes for each tensor
LARGE = 2**32  # what grows with a training or a data set: a segment of a journal, predictions
_NO_KEY = re.compile(r"(?:^|/)\.{0,2}(?:/|\Z)|[\x00\\]")  # asked thousands of times by the catalogue


def check_key(key: str) -> str:
    """Return ``key`` if it is a relative path that stays below the root.

    Raises:
        ConfigError: it is empty, absolute, climbs with ``..``, or holds a NUL or a backslash.
    """
    if _NO_KEY.search(key):
        raise ConfigError(f"{key!r} is not a key: keys are relative paths such as 'runs/a/run.json'")
    return key


def check_size(where: str, size: int, max_size: int) -> None:
    """Refuse to read more bytes at once than what is there can rightly have.

    Raises:
        FormatError: there are more than ``max_size``.
    """
    if size > max_size:
        raise FormatError(
            f"{where} has {size} bytes, but Peakpoint writes at most {max_size} there: it is not read; move it away"
        )


def check_record(where: str, data: bytes) -> None:
    """Refuse to write a record that nobody would read.

    Raises:
        StoreError: it is larger than ``RECORD``.
    """
    if len(data) > RECORD:
        raise StoreError(errno.EFBIG, f"{where} would have {len(data)} bytes, and a record has at most {RECORD}")


T = TypeVar("T")
_NUMBERS = 1000


def create_numbered(number: int, create: Callable[[int], T]) -> T:
    """Create what has a number: ``number``, or the next one that nobody has taken at the same time.

    Args:
        number: one above all that are there.
        create: creates the one of a number; ConflictError when it is taken.

    Returns:
        What ``create`` has returned.

    Raises:
        ConflictError: a thousand numbers were taken.
    """
    for candidate in range(number, number + _NUMBERS):
        try:
            return create(candidate)
        except ConflictError as error:
            refused = error
    raise refused


class Log(Protocol):
    """An append-only sequence of records under one key, owned by one writer."""

    def append(self, data: bytes) -> None:
        """Add ``data``; it survives the death of this process, and a power cut after the next ``sync``."""

    def sync(self) -> None:
        """Make everything appended so far durable."""

    def close(self) -> None:
        """``sync`` and let go of the key."""


class Hold(Protocol):
    """The exclusive right to something."""

    def check(self) -> None:
        """See that it still is what it was, before something is done that cannot be undone.

        Raises:
            ConflictError: it was lost: somebody has taken it away, or it was given back.
        """

    def release(self) -> None:
        """Give it back; nothing happens the second time."""


def holder_note(since: datetime) -> bytes:
    """The note of a hold by this process."""
    note = {"host": socket.gethostname(), "pid": str(os.getpid()), "since": since.isoformat(timespec="seconds")}
    return msgspec.json.encode(note)


def _holder(note: bytes) -> dict[str, str]:
    """What a note says; nothing when there is none yet."""
    try:
        return msgspec.json.decode(note, type=dict[str, str])
    except (msgspec.DecodeError, ValueError):
        return {}


def holder_text(note: bytes) -> str:
    """The note of a hold in words."""
    holder = _holder(note)
    if not {"pid", "host", "since"} <= holder.keys():
        return "another process, which has not said yet who it is"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"


def marked_without_locks(note: bytes) -> bytes:
    """The note of a hold on a file system without locks: nothing else tells other machines of it."""
    return msgspec.json.encode({**_holder(note), "locks": "none"})


def is_elsewhere(note: bytes) -> bool:
    """Whether a note is that of a hold without locks that another machine has not given back."""
    holder = _holder(note)
    return holder.get("locks") == "none" and holder.get("host", socket.gethostname()) != socket.gethostname()


def is_dead_here(note: bytes) -> bool | None:
    """Whether a note is that of a process of this machine that has ended; None for another machine's."""
    holder = _holder(note)
    if holder.get("host") != socket.gethostname() or not str(holder.get("pid", "")).isdecimal():
        return None
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def held_by(note: bytes, remedy: str = "") -> ConflictError:
    """Return the error for what the writer of ``note`` holds.

    Args:
        note: the note.
        remedy: what else to do about it.
    """
    holder = _holder(note)
    is_ours = (holder.get("pid"), holder.get("host")) == (str(os.getpid()), socket.gethostname())
    way = (
        "this is the same process: call close() of its checkpointer, or restart the kernel"
        if is_ours
        else "wait until it ends, or stop it"
    )
    return ConflictError(f"already being written by {holder_text(note)}; {way}{remedy}")


class Filling(Protocol):
    """Bytes on their way into memory.

    Attributes:
        data: the memory, writable, the caller's own.
    """

    data: memoryview

    def wait(self, position: int) -> None:
        """Return when the bytes before ``position`` are there.

        Raises:
            StoreError: they cannot be read.
        """

    def close(self) -> None:
        """Stop reading, as far as that goes; ``data`` stays."""


class Filled:
    """A filling that is complete.

    Args:
        data: the bytes.
    """

    def __init__(self, data: memoryview) -> None:
        self.data = data

    def wait(self, position: int) -> None:
        """See ``Filling.wait``."""

    def close(self) -> None:
        """See ``Filling.close``."""


class Store(Protocol):
    """Bytes under keys.

    Every method is safe to call from several threads. A method that returns has done its work durably; one that
    raises has left either the old or the new state, never a mixture, and possibly litter that ``litter`` names.
    """

    @property
    def location(self) -> str:
        """Where this is, for people: a directory or a URL."""

    def put(self, key: str, chunks: Iterable[Chunk], size: int | None = None) -> None:
        """Write the chunks one after the other as the bytes of ``key``, replacing what was there.

        Atomic (readers see all or nothing) and durable on return. Each chunk is asked for when the one before has been
        written, so that an iterator can wait until its next bytes are final.

        Args:
            key: where.
            chunks: the bytes. Large chunks that begin on a page boundary in memory may be written past the page cache.
            size: bytes of all chunks, if known, so that a store can reserve the space first.

        Raises:
            StoreError: no space, no permission, input/output error.
        """

    def create(self, key: str, data: bytes) -> None:
        """Like ``put``, but only if ``key`` does not exist; of several who race one wins.

        Raises:
            ConflictError: the key exists.
            StoreError: as for ``put``; or the name is that of what is no file.
        """

    def link(self, source: str, key: str) -> bool:
        """Give the bytes of ``source`` the further name ``key``, durably, as if they had been ``put`` there.

        Deleting one of the names leaves the other.

        Returns:
            False when the store cannot, or ``source`` does not exist; then nothing has happened.

        Raises:
            StoreError: as for ``put``.
        """

    def get(self, key: str, begin: int = 0, end: int | None = None, *, max_size: int = RECORD) -> bytes:
        """The bytes of ``key``, or those in ``[begin, end)``.

        Args:
            key: where.
            begin: the first byte.
            end: the first byte that is not wanted any more; None for the end of what is there.
            max_size: how many bytes there may be from ``begin`` on, when no ``end`` is given.

        Raises:
            NotFoundError: no such key.
            FormatError: there are more than ``max_size``, or there is no file but something else in its place.
            StoreError: it cannot be read.
        """

    def view(self, key: str) -> memoryview:
        """All bytes of ``key`` as writable memory of the caller's own, filled lazily where the store can.

        Writing to it changes nothing at rest.

        Raises:
            NotFoundError: no such key.
            FormatError: there is no file but something else in its place.
            StoreError: it cannot be read.
        """

    def fill(self, key: str) -> Filling:
        """All bytes of ``key``, for a reader that wants them all and soon, by the fastest way there is.

        Raises:
            NotFoundError: no such key.
            FormatError: there is no file but something else in its place.
            StoreError: it cannot be read.
        """

    def size(self, key: str) -> int | None:
        """Bytes under ``key``, None when there is no such key."""

    def children(self, prefix: str) -> list[str]:
        """Names directly below ``prefix``, sorted; those that have names below them end with ``/``.

        ``""`` is the root. Names of unfinished writes are not among them. What is neither a file nor a directory, such
        as a link, is listed like a file, and refused when it is read.
        """

    def foreign(self, prefix: str) -> dict[str, str]:
        """What directly below ``prefix`` no store has made, such as links: name to what it is, in words."""

    def stamp(self, prefix: str) -> str | None:
        """A token for the names directly below ``prefix``: another one as soon as a name comes, goes or is replaced.

        Much cheaper than ``children``. None when the store cannot promise that; then look.
        """

    def litter(self, prefix: str) -> list[str]:
        """Keys of unfinished writes directly below ``prefix``, left by crashes (or by writers at work)."""

    def delete(self, key: str) -> None:
        """Remove ``key`` durably; nothing happens when it does not exist."""

    def prune(self, prefix: str) -> None:
        """Remove the directory ``prefix`` if it is empty; stores without directories do nothing."""

    def rename(self, prefix: str, new: str) -> bool:
        """Give everything below ``prefix`` the prefix ``new``, which is in the same directory; atomic and durable.

        What is held below ``prefix`` stays held by its holder, who cannot check it any more.

        Returns:
            False when the store cannot do that in one step; then nothing has happened.

        Raises:
            ConflictError: something is below ``new``.
            NotFoundError: there is nothing below ``prefix``.
        """

    def log(self, key: str) -> Log:
        """Create ``key`` as an empty log.

        Raises:
            ConflictError: the key exists.
        """

    def hold(self, key: str, note: bytes) -> Hold:
        """Hold ``key`` exclusively until released or until this process dies, however it dies.

        Args:
            key: what to hold; where a store needs an object for it, this is its key.
            note: who holds it and since when, a JSON object with ``host``, ``pid`` and ``since``, for others to read.

        Raises:
            ConflictError: somebody holds it, and the message says who.
            FormatError: there is no file but something else in its place.
        """

    def holder(self, key: str) -> str | None:
        """Who holds ``key``, in words; None when nobody does. Never gets into the way of ``hold``."""

    def reading(self, key: str) -> Hold | None:
        """Say that ``key`` is being read, until released or until this process dies; many may.

        It stops nobody. Needs no more than the right to read.

        Returns:
            None when there is no such key, or the store cannot say such a thing.
        """

    def is_read(self, key: str) -> bool:
        """Whether somebody says that ``key`` is being read; False when the store cannot tell."""

    def remarks(self) -> list[str]:
        """What people should know about how this store works here; each sentence is given out once."""

    def free(self) -> int | None:
        """Bytes that can still be written, None when the store does not say."""


def establish(store: Store, key: str, data: bytes) -> None:
    """Create a record, and look what became of it when the store reports an error.

    A record that is there although its creation failed is written again: an fsync that failed proves nothing when it is
    repeated. For bytes that nobody else writes, under a key that nobody deletes meanwhile.

    Raises:
        ConflictError: the key exists with other bytes.
        StoreError: the record is not there, or not provably durable.
    """
    try:
        store.create(key, data)
    except (ConflictError, StoreError):
        try:
            existing = store.get(key)
        except NotFoundError:
            existing = None
        if existing != data:
            raise
        store.put(key, [data])
