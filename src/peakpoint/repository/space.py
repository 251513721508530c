"""Free space on a full disk: delete what nobody needs, and say what people can do when that is not enough."""

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime

from peakpoint.errors import StoreError
from peakpoint.format import layout
from peakpoint.format.amounts import size_text
from peakpoint.format.manifest import Manifest
from peakpoint.repository import trash
from peakpoint.repository.run_audit import clean_run
from peakpoint.store import Store

_END = datetime.max.replace(tzinfo=UTC)


def empty_trash(store: Store, run: str) -> int:
    """Delete everything in the trash of a run; the caller holds the run.

    Returns:
        How many checkpoints were deleted.

    Raises:
        StoreError: the store refused.
    """
    entries = trash.contents(store, run)
    if entries:
        clean_run(store, run, _END)
    return len(entries)


def ways_to_free_space(store: Store, run: str, kept: Sequence[Manifest]) -> str:
    """Say what can be done when the disk is full and every checkpoint is claimed.

    Args:
        store: on the full disk.
        run: the run that is being written.
        kept: its checkpoints.
    """
    root, ways = shlex.quote(store.location), []
    runs = [child.rstrip("/") for child in store.children(layout.RUNS)]
    trash_sizes = {name: _trash_size(store, name) for name in runs}
    if any(trash_sizes.values()):
        names = ", ".join(name for name, trash_size in trash_sizes.items() if trash_size)
        ways.append(
            f"empty the trash of {names} ({size_text(sum(trash_sizes.values()))}): peakpoint undo {root} --empty"
        )
    if len(kept) > 1:
        ways.append(
            f"remove some of the {len(kept)} checkpoints that the rules keep of this run "
            f"({size_text(_total_size(kept))}): peakpoint rm {root} {run}/NAME --undo-for 0"
        )
    return "; ".join([*ways, "free some space, or let the rules keep fewer checkpoints"])


def _trash_size(store: Store, run: str) -> int:
    try:
        return _total_size([entry.manifest for entry in trash.contents(store, run)])
    except StoreError:
        return 0  # of another user, or damaged


def _total_size(manifests: Sequence[Manifest]) -> int:
    return sum(manifest.size_bytes for manifest in manifests)
