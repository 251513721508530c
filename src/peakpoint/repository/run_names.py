"""Former names of a run, which its manifests and validations go on saying: these never change."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from peakpoint.errors import CorruptError, FormatError, NotFoundError, StoreError
from peakpoint.format import layout
from peakpoint.format.members import Name, Time
from peakpoint.format.sealed import decode_record, encode_record
from peakpoint.store import SMALL, Store


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNames:
    """The record of a run that has had other names.

    Attributes:
        names: the former ones, the earliest first.
        at: when it got its last name.
        by: who gave it.
    """

    names: tuple[Name, ...]
    at: Time
    by: str


def former_names(store: Store, run: str) -> tuple[str, ...]:
    """Return the former names of a run.

    Raises:
        CorruptError: the record is damaged.
        FormatError: a newer release wrote it.
    """
    key = layout.renamed_key(run)
    try:
        return decode_record(RunNames, store.get(key, max_size=SMALL), where=key).names
    except NotFoundError:
        return ()


def present_name(store: Store, name: str, runs: Iterable[str]) -> str | None:
    """Return which of some runs is known to have had a name; runs of which that cannot be read are passed over."""
    for run in runs:
        try:
            if run != name and name in former_names(store, run):
                return run
        except (CorruptError, FormatError, StoreError):
            continue  # audit names it
    return None


def is_name_of(store: Store, run: str, name: str) -> bool:
    """Whether a run has, or had, a name; errors as in ``former_names``."""
    return name == run or name in former_names(store, run)


def note_name(store: Store, run: str, at: datetime, by: str) -> None:
    """Let the present name of a run become a former one, durably; its records are its own under any name then."""
    names = tuple(dict.fromkeys([*former_names(store, run), run]))
    store.put(layout.renamed_key(run), [encode_record(RunNames(names=names, at=at, by=by))])
