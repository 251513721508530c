"""Checkpoints of which only the manifest exists."""

from peakpoint.format import layout
from peakpoint.format.manifest import encode_manifest
from peakpoint.repository import reader
from peakpoint.repository.aliases import AliasChange, AliasTarget, append, newest
from strategies import START


def write(store, one):
    directory = store.path(layout.checkpoint_prefix(one.run, one.name))
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_bytes(encode_manifest(one))


def point(store, alias, one, *, at=START, why="because", **more):
    """Let an alias point at a checkpoint, or at nothing any more; the record."""
    target = None
    if one is not None:
        told = reader.manifest_digest(store, one)
        target = AliasTarget(run=one.run, checkpoint=one.id, name=one.name, manifest=told)
    kind = "retired" if target is None else "rolled back" if "restores" in more else "promoted"
    change = AliasChange(kind=kind, target=target, at=at, by="somebody", why=why, **more)
    return append(store, alias, change, after=newest(store, alias))
