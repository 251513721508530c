"""Holding a key where nobody sees that a process has died: a lease, which its holder renews.

The object of a lease changes with every renewal. Somebody who wants it watches: when it has not changed for as long as
a lease lasts, by the watcher's own clock, its holder is dead, and it is taken over. So no clocks are compared. Every
change is made under the condition that the object is the one that was seen last: of two who take it over one wins, and
a holder that was suspended meanwhile finds out before it does anything that cannot be undone.
"""

import contextlib
import os
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Protocol

from peakpoint.errors import ConflictError, StoreError
from peakpoint.store.protocol import held_by, is_dead_here

SECONDS = 30.0
_RENEWALS = 4  # in the time of a lease


@dataclass(frozen=True, slots=True)
class LeaseState:
    """The object of a lease, as it was read.

    Attributes:
        tag: changes whenever the object does.
        token: of the holder; empty when nobody holds the lease.
        note: who the holder is.
    """

    tag: str
    token: str
    note: bytes


class LeaseObjects(Protocol):
    """What a lease needs of a store."""

    def read_lease(self, key: str) -> LeaseState | None:
        """Return the object of a lease; None when there is none."""

    def write_lease(self, key: str, data: bytes, tag: str | None) -> str | None:
        """Write the object if it still has a tag, or if there is none for None; returns its new tag.

        Returns:
            None when it was another one.
        """


def lease_state(data: bytes, tag: str) -> LeaseState:
    """Return what the object of a lease says."""
    token, _, note = data.partition(b"\n")
    return LeaseState(tag, token.partition(b" ")[0].decode(errors="replace"), note)


class Lease:
    """The exclusive right to a key; see ``Hold``.

    Args:
        objects: the store.
        key: the key.
        note: who holds it, for others.
        seconds: how long it lasts without a renewal; the same for everybody who uses the store.

    Raises:
        ConflictError: somebody holds it, and goes on renewing it.
    """

    def __init__(self, objects: LeaseObjects, key: str, note: bytes, seconds: float = SECONDS) -> None:
        self._objects, self._key, self._note, self._seconds = objects, key, note, seconds
        self._token, self._renewals, self._process = secrets.token_hex(8), 0, os.getpid()
        self._lock, self._end = threading.Lock(), threading.Event()
        self._tag: str | None = self._take()
        self._thread = threading.Thread(target=self._keep, name=f"peakpoint-lease-{key}", daemon=True)
        self._thread.start()

    def _content(self) -> bytes:
        self._renewals += 1
        return b"%s %d\n%s" % (self._token.encode(), self._renewals, self._note)

    def _take(self) -> str:
        watch: tuple[LeaseState, float] | None = None
        while True:
            state = self._objects.read_lease(self._key)
            now = time.monotonic()
            if state is not None and state.token == self._token:  # by a request of our own whose reply was lost
                return state.tag
            if state is not None and state.token:
                watch = watch or (state, now)
                dead = is_dead_here(state.note)
                if state.tag != watch[0].tag or dead is False:
                    raise held_by(state.note)
                if dead is None and now - watch[1] < self._seconds:
                    time.sleep(min(1.0, self._seconds / _RENEWALS))
                    continue
            tag = self._objects.write_lease(self._key, self._content(), None if state is None else state.tag)
            if tag is not None:
                return tag
            watch = None if state is None else watch

    def _keep(self) -> None:
        while not self._end.wait(self._seconds / _RENEWALS):
            with contextlib.suppress(StoreError):  # the next one may succeed; who does something looks before
                if not self._renew():
                    return

    def _renew(self) -> bool:
        """Renew the lease; returns whether it is still held."""
        with self._lock:
            if self._tag is None:
                return False
            tag = self._objects.write_lease(self._key, self._content(), self._tag)
            if tag is None:  # perhaps by a request of our own whose reply was lost
                state = self._objects.read_lease(self._key)
                tag = state.tag if state is not None and state.token == self._token else None
            self._tag = tag
            return tag is not None

    def check(self) -> None:
        """See ``Hold.check``: renews the lease, so that nobody takes it over in the time that it lasts."""
        if os.getpid() != self._process or not self._renew():
            raise ConflictError(f"{self._key} is not held any more: another process has taken it over")

    def release(self) -> None:
        """See ``Hold.release``."""
        if os.getpid() != self._process:
            return
        self._end.set()
        self._thread.join()
        with self._lock:
            tag, self._tag = self._tag, None
            if tag is not None:
                self._objects.write_lease(self._key, b"", tag)
