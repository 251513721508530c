"""Export: a checkpoint, or parts of it, as one file that other tools open."""

import contextlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from peakpoint.errors import ConfigError, ConflictError, NotFoundError, PeakpointWarning
from peakpoint.exchange.exports.weights import AS_SAVED, WeightOptions, exported, weight_stream
from peakpoint.format.manifest import Manifest
from peakpoint.format.metrics import metrics_to_json
from peakpoint.format.names import OWN_PARTS
from peakpoint.repository.reader import hold_all
from peakpoint.repository.root import Repository
from peakpoint.state.saved import check_part_of, read_state, read_trees
from peakpoint.state.tensor_files import lay_out
from peakpoint.store import FileOps, Store, sync_directory, translated

SUFFIXES = (".safetensors", ".pth", ".pt")


def export(
    repository: Repository, ref: str, to: Path, parts: Sequence[str] = (), weights: WeightOptions = AS_SAVED
) -> Manifest:
    """Write parts of a checkpoint to a file of their own; atomic and durable.

    ``.safetensors`` holds the tensors of one part, under the keys of its state dict: tied weights are written under
    each of their names; its metadata tells run, name, step, epoch and metrics. One tensor is in memory at a time.
    ``.pth`` and ``.pt`` are for ``torch.load``: the state dict itself for one part, a dict of parts for several.

    Args:
        to: the file; must not exist.
        parts: by default ``model``, or the only part with tensors.
        weights: how they are written.

    Returns:
        The manifest of the checkpoint.

    Raises:
        ConfigError: the suffix is not one of these, these parts cannot be in one such file, or the weights have no such
            prefix or no masks.
        ConflictError: the file exists.
        NotFoundError: no such checkpoint or part.
        CorruptError: the checkpoint is damaged.
    """
    if to.suffix not in SUFFIXES:
        endings = ", ".join(SUFFIXES[:-1])
        raise ConfigError(
            f"cannot export to {to}: its name must end with {endings} or {SUFFIXES[-1]}; for a folder, say --as hf"
        )
    check_free(to)
    manifest = repository.find_manifest(ref)
    part_names = list(parts) or [default_part(manifest)]
    for part in part_names:
        check_part_of(manifest, part)
    with hold_all(repository.store, [manifest]):
        if to.suffix == ".safetensors":
            _export_safetensors(repository.store, manifest, to, part_names, weights)
            return manifest
        saved = read_state(repository.store, manifest, part_names)
        values = {
            part: exported(part, saved.value(part, own=True), saved.trees.origin(part), weights) for part in part_names
        }
        # a file of ours: its errors are OSErrors, not torch's own
        with published(to) as temporary, temporary.open("wb") as file:
            torch.save(values[part_names[0]] if len(part_names) == 1 else values, file)
    return manifest


def default_part(manifest: Manifest) -> str:
    """Return ``model``, or the only part with tensors."""
    with_tensors = [part for part, files in manifest.parts.items() if files and part not in OWN_PARTS]
    if "model" in with_tensors or len(with_tensors) != 1:
        return "model"
    return with_tensors[0]


def _export_safetensors(
    store: Store, manifest: Manifest, to: Path, parts: Sequence[str], weights: WeightOptions
) -> None:
    if len(parts) > 1:
        raise ConfigError(f"a .safetensors file holds one part, not {', '.join(parts)}; export to .pth for several")
    stream = weight_stream(store, manifest, read_trees(store, manifest), parts[0], weights)
    layout = lay_out(to.name, stream.kinds)
    header = json.loads(layout.header[8:])
    header["__metadata__"] |= _metadata(manifest)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors can be read in place
    with published(to) as temporary, temporary.open("wb") as file:
        stream.write(file, len(text).to_bytes(8, "little") + text, layout.spans)


def _metadata(manifest: Manifest) -> dict[str, str]:
    """Return the checkpoint's facts for a safetensors header, which holds text only."""
    return {
        "run": manifest.run,
        "name": manifest.name,
        "step": str(manifest.step),
        **({} if manifest.epoch is None else {"epoch": str(manifest.epoch)}),
        "metrics": json.dumps(metrics_to_json(manifest.metrics)),
    }


def check_free(to: Path) -> None:
    """Refuse a path where nothing new can be written.

    Raises:
        ConflictError: the path exists.
        NotFoundError: its directory does not exist.
    """
    if to.exists():
        raise ConflictError(f"{to} exists; remove it first, or export to another name")
    if not to.absolute().parent.is_dir():
        raise NotFoundError(
            f"cannot export to {to}: the directory {to.absolute().parent} does not exist; make it first"
        )


@contextlib.contextmanager
def published(to: Path) -> Iterator[Path]:
    """Give a temporary path for a file or folder, which then gets its name, durably; an error leaves nothing."""
    temporary = to.with_name(f".tmp-{secrets.token_hex(4)}-{to.name}")
    ops = FileOps()
    with translated("write", to):
        try:
            yield temporary
            paths = [*temporary.rglob("*"), temporary]
            for path in filter(Path.is_file, paths):
                fd = os.open(path, os.O_RDONLY)
                try:
                    ops.fsync(fd)
                finally:
                    os.close(fd)
            durable = [sync_directory(ops, path) for path in filter(Path.is_dir, paths)]
            ops.rename(temporary, to)
            durable.append(sync_directory(ops, to.parent))
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            temporary.unlink(missing_ok=True)
    if not all(durable):
        warnings.warn(
            f"{to}: this file system does not make directories durable, so a power cut may take it back",
            PeakpointWarning,
            stacklevel=3,
        )
