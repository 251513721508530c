"""Export: a checkpoint, or parts of it, as one file that other tools open."""

import contextlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from peakpoint.errors import ConfigError, ConflictError, NotFoundError, PeakpointWarning
from peakpoint.exchange.exports.weights import AS_SAVED, WeightOptions, exported
from peakpoint.format.manifest import Manifest
from peakpoint.format.metrics import metrics_to_json
from peakpoint.repository.reader import hold_all
from peakpoint.repository.root import Repository
from peakpoint.state.json_scalars import kind_of
from peakpoint.state.saved import check_part_of, read_state
from peakpoint.state.tensor_files import StagingBuffer
from peakpoint.state.typed_json import check_tensor
from peakpoint.store import FileOps, sync_directory, translated

SUFFIXES = (".safetensors", ".pth", ".pt")


def export(
    repository: Repository, ref: str, to: Path, parts: Sequence[str] = (), weights: WeightOptions = AS_SAVED
) -> Manifest:
    """Write parts of a checkpoint to a file of their own; atomic and durable.

    ``.safetensors`` holds the tensors of one part, under the keys of its state dict: tied weights are written under
    each of their names; its metadata tells run, name, step, epoch and metrics. ``.pth`` and ``.pt`` are for
    ``torch.load``: the state dict itself for one part, a dict of parts for several.

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
        saved = read_state(repository.store, manifest, part_names)
        values = {
            part: exported(part, saved.value(part, own=True), saved.trees.origin(part), weights) for part in part_names
        }
        with published(to) as temporary:
            if to.suffix == ".safetensors":
                _write_safetensors(temporary, values, manifest)
            else:
                with temporary.open("wb") as file:  # a file of ours: its errors are OSErrors, not torch's own
                    torch.save(values[part_names[0]] if len(part_names) == 1 else values, file)
    return manifest


def default_part(manifest: Manifest) -> str:
    """Return ``model``, or the only part with tensors."""
    with_tensors = [part for part, files in manifest.parts.items() if files]
    if "model" in with_tensors or len(with_tensors) != 1:
        return "model"
    return with_tensors[0]


def _write_safetensors(path: Path, values: dict[str, Any], manifest: Manifest) -> None:
    if len(values) > 1:
        raise ConfigError(f"a .safetensors file holds one part, not {', '.join(values)}; export to .pth for several")
    (part, value), *_ = values.items()
    check_weights(part, value)
    image = memoryview(StagingBuffer().fill({path.name: value})[0].data)
    begin = 8 + int.from_bytes(image[:8], "little")
    header = json.loads(bytes(image[8:begin]))
    header["__metadata__"] |= _metadata(manifest)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors can be read in place
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(image[begin:])


def _metadata(manifest: Manifest) -> dict[str, str]:
    """Return the checkpoint's facts for a safetensors header, which holds text only."""
    return {
        "run": manifest.run,
        "name": manifest.name,
        "step": str(manifest.step),
        **({} if manifest.epoch is None else {"epoch": str(manifest.epoch)}),
        "metrics": json.dumps(metrics_to_json(manifest.metrics)),
    }


def check_weights(part: str, value: Any) -> None:
    """Refuse a part that is not a dict of tensors.

    Raises:
        ConfigError: the message says where, and what to do.
    """
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"part {part!r} is a {kind_of(value)} and not a dict of tensors; export it to .pth")
    for key, tensor in value.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"part {part!r} holds {key!r}, a {kind_of(tensor)}: export it to .pth instead")
        check_tensor(tensor, key)


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
