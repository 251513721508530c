"""Room on a full disk: what can go that nothing wants, and what people can do when there is nothing."""

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime

from peakpoint.format import layout
from peakpoint.format.amounts import size
from peakpoint.format.manifest import Manifest
from peakpoint.repository import trash
from peakpoint.repository.audit import clean_run
from peakpoint.store import Store

_END = datetime.max.replace(tzinfo=UTC)


def empty_trash(store: Store, run: str) -> int:
    """Let everything in the trash of a run go; the caller holds it.

    Returns:
        How many checkpoints went.

    Raises:
        StoreError: the store refused.
    """
    trashed = trash.contents(store, run)
    if trashed:
        clean_run(store, run, _END)
    return len(trashed)


def ways_out(store: Store, run: str, kept: Sequence[Manifest]) -> str:
    """What can be done when the disk is full of what is wanted.

    Args:
        store: where.
        run: the run that is being written.
        kept: its checkpoints.
    """
    root, ways = shlex.quote(store.location), []
    trashed = {
        other: sum(entry.manifest.size_bytes for entry in trash.contents(store, other))
        for other in (child.rstrip("/") for child in store.children(layout.RUNS))
    }
    if any(trashed.values()):
        names = ", ".join(other for other, held in trashed.items() if held)
        ways.append(f"empty the trash of {names} ({size(sum(trashed.values()))}): peakpoint trash {root} --empty")
    if len(kept) > 1:
        held = size(sum(manifest.size_bytes for manifest in kept))
        ways.append(
            f"remove some of the {len(kept)} checkpoints that the rules keep of this run ({held}): "
            f"peakpoint rm {root} {run}/NAME --undo-for 0"
        )
    return "; ".join([*ways, "free some space, or let fewer checkpoints be kept"])
