"""Every error and warning that Peakpoint raises, grouped by what a caller would do about it.

::

    Error                      1   anything of ours
     +- ConfigError            2   fix the call or the command line           (ValueError)
     +- MissingExtraError      2   install the optional package that it names (ImportError)
     +- NotFoundError         10   name something that exists                 (LookupError)
     +- ConflictError         11   wait for, or stop, the other writer
     +- CorruptError          12   bytes are not what was written: use another checkpoint
     |   +- SignatureError    15   ... or not what somebody has signed
     +- FormatError           13   written by a newer release: update Peakpoint
     +- MismatchError         14   state and checkpoint do not fit each other (ValueError)
     +- RefusedError          16   a checkpoint is not fit for what was asked: read why
     +- StoreError            20   the disk or the network refused            (OSError)
     |   +- TransientStoreError 21 ... and may say yes if asked again
     +- SaveFailedError       22   a background save failed; raised at the next call

The number is the exit code of the command line. A message says what, where, and what to do next.
Errors of other libraries are translated where they enter and chained (``raise ... from``).
"""

import contextlib
import errno
import re
from collections.abc import Iterator
from typing import ClassVar

# printable for Python, but seen by nobody: fillers, joiners, and the selectors that can carry a hidden text
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def printable(text: str) -> str:
    r"""Escape what controls a terminal, breaks or reorders a line, or cannot be seen.

    Example:
        >>> printable("val" + chr(0x9b) + "acc")
        'val\\x9bacc'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() and not _UNSEEN.match(c) else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """Return ``printable`` of a text of several lines; a tab becomes four spaces."""
    return "\n".join(map(printable, text.replace("\t", "    ").split("\n")))


class Error(Exception):
    """The root of the tree: catches everything that Peakpoint raises on purpose.

    Its text may quote names and messages of others: what would control a terminal is escaped in it.

    Attributes:
        rank: the rank that has raised it, where it was passed on to the others of a training; None elsewhere.
    """

    exit_code: ClassVar[int] = 1
    rank: int | None = None

    def __str__(self) -> str:
        where = "" if self.rank is None else f"rank {self.rank}: "
        return printable_lines(where + super().__str__())


class ConfigError(Error, ValueError):
    """An argument, option or state that cannot work, found before anything was written."""

    exit_code = 2


class MissingExtraError(Error, ImportError):
    """An optional package that this needs is not installed; the message says how to install it."""

    exit_code = 2


@contextlib.contextmanager
def needing(extra: str, feature: str) -> Iterator[None]:
    """Say how to install what an import of the block has not found.

    Args:
        extra: the extra of Peakpoint that installs it.
        feature: what needs it, with the verb, such as ``"archives need"``.

    Raises:
        MissingExtraError: a module is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{feature} {error.name}, which is not installed: pip install 'peakpoint[{extra}]'"
        ) from error


class NotFoundError(Error, LookupError):
    """A repository, run, checkpoint, part or metric that does not exist; names near matches."""

    exit_code = 10


class ConflictError(Error):
    """Somebody else holds what was asked for, or already created it."""

    exit_code = 11


class CorruptError(Error):
    """Bytes at rest differ from what was written: a digest, a size or a seal does not match."""

    exit_code = 12


class SignatureError(CorruptError):
    """Not signed, signed with another key, or not what was signed; names the file, or the keys."""

    exit_code = 15


class FormatError(Error):
    """Undamaged bytes in a form that this release does not read."""

    exit_code = 13


class MismatchError(Error, ValueError):
    """A checkpoint does not fit the live state; lists names, shapes and dtypes.

    Attributes:
        differences: one line for each difference, the whole list.
    """

    exit_code = 14

    def __init__(self, message: str, differences: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.differences = differences


class RefusedError(Error):
    """A checkpoint did not pass its validation, or must not be promoted.

    Attributes:
        reasons: one sentence for each.
    """

    exit_code = 16

    def __init__(self, message: str, reasons: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.reasons = reasons


class StoreError(Error, OSError):
    """A store refused an operation: no space, no permission, input/output error."""

    exit_code = 20

    @property
    def is_full(self) -> bool:
        """Whether there is no room left, on the disk or in a quota."""
        return self.errno in (errno.ENOSPC, errno.EDQUOT)


class TransientStoreError(StoreError):
    """A store refused for now; the same call may succeed later."""

    exit_code = 21


class SaveFailedError(Error):
    """A save did not become durable; checkpoints committed earlier are untouched.

    Raised by the next call of ``report``, ``save``, ``wait`` or ``close``. The captured state is still held in memory
    and is written again by the next report and at close.

    Attributes:
        outcome: the outcome of the report that raised this, None when another call did.
    """

    exit_code = 22
    outcome: object = None


class PeakpointWarning(UserWarning):
    """Something that a user should know now and that does not stop the training."""

    def __str__(self) -> str:
        return printable_lines(super().__str__())
