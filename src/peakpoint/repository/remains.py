"""What is left of a run that is being removed as a whole.

When its last checkpoint is gone, ``removed.json`` says that the run is to go. Then ``run.json`` is deleted: from here
on there is no such run, and everything that is left of it is litter until ``removed.json`` is deleted, the last of all.
"""

import re
from datetime import datetime

from peakpoint.format import layout
from peakpoint.format.sealed import FORMAT, seal
from peakpoint.store import Store

_RECORD = re.compile(r"[0-9]{6,18}\.jsonl?|[0-9a-f]{16}\.(predictions|pack)")


def are_remains(store: Store, run: str) -> bool:
    """Whether a directory is what is left of a run."""
    return store.size(layout.removed_key(run)) is not None and store.size(layout.run_record(run)) is None


def delete_records(store: Store, run: str, now: datetime) -> None:
    """Delete all records of a run without checkpoints; the caller holds it. What Peakpoint has not written stays."""
    store.put(layout.removed_key(run), [seal({"format": FORMAT, "at": now})])
    store.delete(layout.run_record(run))
    delete_remains(store, run)


def delete_remains(store: Store, run: str) -> None:
    """Delete what is left of a run; the caller holds it."""
    validations = layout.validations_of(run)
    validated = [f"{validations}/{child.rstrip('/')}" for child in store.children(validations)]
    for prefix in (*validated, validations, layout.archive_prefix(run), layout.journal_prefix(run)):
        for child in store.children(prefix):
            if _RECORD.fullmatch(child):
                store.delete(f"{prefix}/{child}")
        for key in store.litter(prefix):
            store.delete(key)
        store.prune(prefix)
    store.prune(layout.checkpoints_prefix(run))
    for key in (
        layout.archived_key(run),
        layout.renamed_key(run),
        *store.litter(layout.run_prefix(run)),
        layout.removed_key(run),
    ):
        store.delete(key)
