"""The errors of the system in words of ours."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from peakpoint.errors import NotFoundError, StoreError, TransientStoreError
from peakpoint.store.protocol import Filling

_TRANSIENT = frozenset({errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT})
_LOOKING = frozenset({"read", "look at", "list", "delete"})  # what is no file cannot be found
_HINTS = {
    errno.ENOSPC: "free some space, or let fewer checkpoints be kept",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EROFS: "the file system is mounted read-only",
    errno.EACCES: "check the owner and mode of the directory",
    errno.EPERM: "check the owner and mode of the directory",
    errno.EIO: "the disk reports an input/output error; check the kernel's log",
    errno.ENAMETOOLONG: "choose a shorter run name, name= template or root",
}


@contextlib.contextmanager
def translated(action: str, path: Path | str) -> Iterator[None]:
    """Turn an ``OSError`` of the block into one of ours that says what was done, where, and what to do next."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot {action} {path}: it does not exist") from error
    except StoreError:
        raise
    except OSError as error:
        if action in _LOOKING and isinstance(error, IsADirectoryError | NotADirectoryError):
            raise NotFoundError(f"cannot {action} {path}: {error.strerror}") from error
        hint = _HINTS.get(error.errno or 0)
        message = f"cannot {action} {path}: {error.strerror}" + (f" ({hint})" if hint else "")
        kind = TransientStoreError if error.errno in _TRANSIENT else StoreError
        raise kind(error.errno, message) from error


class TranslatedFilling:
    """A filling whose errors say what was being read."""

    def __init__(self, filling: Filling, path: Path) -> None:
        self._filling, self._path = filling, path
        self.data = filling.data
        self.close = filling.close

    def wait(self, position: int) -> None:
        """See ``Filling.wait``."""
        with translated("read", self._path):
            self._filling.wait(position)
