"""Where things are in a repository: the only place that builds keys.

::

    peakpoint.json                              the repository, created once
    runs/<run>/run.json                         the run, created once
    runs/<run>/writer.lock                      held by the process that writes the run
    runs/<run>/journal/<number>.jsonl           what was reported and done
    runs/<run>/checkpoints/<name>/              one checkpoint
    runs/<run>/archive/<id>.pack                the bytes of an archived checkpoint
"""

import re

from peakpoint.manifest import MANIFEST

REPOSITORY = "peakpoint.json"
RUNS = "runs"
STATE = "state.json"


DROPPED = "dropped-"  # and a number: the records of parts that are gone
ARCHIVED = "archived.json"  # the record that the files of a checkpoint are in its pack
TRASHED = "trashed.json"  # the record of a checkpoint that can be brought back
SIGNATURE = "signature-"  # and a number: the signatures of a checkpoint
PACK = ".pack"

_SIGNATURE = re.compile(rf"{SIGNATURE}([0-9]{{1,9}})\.json")


def is_record(child: str) -> bool:
    """Whether a name in a checkpoint's directory is that of a record beside the manifest."""
    return child.startswith(DROPPED) or child in {ARCHIVED, TRASHED} or is_signature(child)


def is_signature(child: str) -> bool:
    """Whether a name in a checkpoint's directory is that of a signature."""
    return _SIGNATURE.fullmatch(child) is not None


def signature_number(child: str) -> int:
    """The number of a signature; 0 for every other name."""
    found = _SIGNATURE.fullmatch(child)
    return int(found[1]) if found else 0


def run_prefix(run: str) -> str:
    """The directory of a run."""
    return f"{RUNS}/{run}"


def run_record(run: str) -> str:
    """The record that makes a run exist."""
    return f"{RUNS}/{run}/run.json"


def writer_lock(run: str) -> str:
    """What the writer of a run holds."""
    return f"{RUNS}/{run}/writer.lock"


def journal_prefix(run: str) -> str:
    """The directory of a run's journal."""
    return f"{RUNS}/{run}/journal"


def checkpoints_prefix(run: str) -> str:
    """The directory of a run's checkpoints."""
    return f"{RUNS}/{run}/checkpoints"


def checkpoint_prefix(run: str, name: str) -> str:
    """The directory of one checkpoint."""
    return f"{RUNS}/{run}/checkpoints/{name}"


def manifest_key(run: str, name: str) -> str:
    """The manifest of one checkpoint."""
    return f"{RUNS}/{run}/checkpoints/{name}/{MANIFEST}"


def file_key(run: str, name: str, file: str) -> str:
    """One file of one checkpoint."""
    return f"{RUNS}/{run}/checkpoints/{name}/{file}"


def archived_key(run: str, name: str) -> str:
    """The record that a checkpoint is archived."""
    return f"{RUNS}/{run}/checkpoints/{name}/{ARCHIVED}"


def trashed_key(run: str, name: str) -> str:
    """The record that a checkpoint is in the trash."""
    return f"{RUNS}/{run}/checkpoints/{name}/{TRASHED}"


def archive_prefix(run: str) -> str:
    """The directory of a run's packs."""
    return f"{RUNS}/{run}/archive"


def pack_key(run: str, checkpoint: str) -> str:
    """The pack of one checkpoint, by its id."""
    return f"{RUNS}/{run}/archive/{checkpoint}{PACK}"
