"""Where things are in a repository: the only place that builds keys.

::

    peakpoint.json                              the repository, created once
    runs/<run>/run.json                         the run, created once
    runs/<run>/writer.lock                      held by the process that writes the run
    runs/<run>/journal/<number>.jsonl           what was reported and done
    runs/<run>/checkpoints/<name>/              one checkpoint
"""

from peakpoint.manifest import MANIFEST

REPOSITORY = "peakpoint.json"
RUNS = "runs"
STATE = "state.json"


DROPPED = "dropped-"  # and a number: the records of parts that are gone


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
