"""The files and folders of other tools: finding and reading them.

Every reader here changes nothing, runs nothing, and says what became of everything in a file.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from blake3 import blake3

from peakpoint.errors import CorruptError, FormatError, NotFoundError
from peakpoint.exchange import pickles
from peakpoint.exchange.counters import FileCounters, read_counters
from peakpoint.exchange.dcp import DCP_METADATA, dcp_files, read_folder
from peakpoint.exchange.folders import (
    SAFETENSORS,
    is_folder,
    layout_of,
    read_deepspeed,
    read_layout,
)
from peakpoint.exchange.metric_logs import as_number, metric_name
from peakpoint.exchange.state_dicts import ForeignCheckpoint, ReadOptions, from_dict, renamed
from peakpoint.exchange.torch_shards import read_whole
from peakpoint.exchange.unread import is_piece, kind_of_peakpoint, kinds_of
from peakpoint.store import translated

PICKLED = frozenset({".bin", ".ckpt", ".pkl", ".pt", ".pth", ".tar"})
_KINDS = {SAFETENSORS: "safetensors", **dict.fromkeys(PICKLED, "torch")}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSource:
    """A checkpoint of another tool, not read yet.

    Attributes:
        path: a file or a folder.
        kind: ``"torch"``, ``"safetensors"``, ``"dcp"``, ``"folder"`` or ``"deepspeed"``.
        files: all files that belong to it.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]

    @property
    def size_bytes(self) -> int:
        """The bytes of its files."""
        return sum(file.stat().st_size for file in self.files)

    def stamp(self) -> tuple[tuple[int, int, int], ...]:
        """Return sizes and times of its files: they change when somebody writes to them.

        The last of the times is of the file system's own: a copy in place of a file may have the same other one.
        """
        states = [file.stat() for file in self.files]
        return tuple((state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states)

    def digest(self) -> str:
        """Return BLAKE3 of its bytes; for a folder, of the names and digests of its files."""
        digests = {}
        with translated("read", self.path):
            for file in self.files:
                name = file.name if file == self.path else file.relative_to(self.path).as_posix()
                name = os.fsencode(name).decode("utf-8", "backslashreplace")  # JSON has no broken bytes
                digests[name] = blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()
        if len(digests) == 1:
            return next(iter(digests.values()))
        return blake3(msgspec.json.encode(sorted(digests.items()))).hexdigest()


# --- finding ------------------------------------------------------------------------------------------------------


def find(path: Path) -> tuple[list[CheckpointSource], list[Path]]:
    """Return the checkpoints at or below ``path``, and the files that are none.

    Raises:
        NotFoundError: the path does not exist.
        FormatError: nothing below it has the form of a checkpoint.
    """
    if not path.exists():
        raise NotFoundError(f"cannot import {path}: it does not exist")
    check_regular(path)
    of_peakpoint = kind_of_peakpoint(path)
    if of_peakpoint is not None:
        raise FormatError(of_peakpoint)
    with translated("read", path):
        entries = list(_below(path)) if path.is_dir() else [_file(path)]
    sources = [entry for entry in entries if isinstance(entry, CheckpointSource)]
    unread = kinds_of([entry for entry in entries if isinstance(entry, Path)])
    if not sources and unread:
        raise FormatError(f"cannot import {path}: {'; '.join(unread)}")
    if not sources:
        raise FormatError(
            f"{path} holds no checkpoint: looked for {', '.join(sorted(PICKLED))}, {SAFETENSORS}, folders with "
            "model.safetensors or pytorch_model.bin, and folders of torch.distributed.checkpoint"
        )
    return sources, [entry for entry in entries if isinstance(entry, Path)]


def check_regular(path: Path) -> None:
    """Refuse a pipe or a device: it may be without an end, and what is inspected is read again.

    Raises:
        FormatError: it is one of these.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FormatError(f"{path} is neither a file nor a folder: write its contents to a file, and give that")


def _below(path: Path) -> Iterator[CheckpointSource | Path]:
    """Yield the checkpoints in a folder, and the paths of everything else; files before folders."""
    source = _folder(path)
    if source is not None:
        yield source
    used = set() if source is None else set(source.files)
    folders_of_used = {folder for file in used for folder in file.parents}
    for child in sorted(path.iterdir(), key=lambda child: (child.is_dir(), child)):
        if child in folders_of_used:
            yield from (file for file in sorted(child.rglob("*")) if file.is_file() and file not in used)
        elif child.is_dir():
            closed = child.name.startswith(".") or not is_folder(child) or kind_of_peakpoint(child) is not None
            yield from [child] if closed else _below(child)
        elif child not in used:
            yield child if source is not None or child.name.startswith(".") else _file(child)


def _file(path: Path) -> CheckpointSource | Path:
    """Return a file as a checkpoint, or its path when its name is not that of one, or it is a pipe or a broken link."""
    kind = _KINDS.get(path.suffix.lower()) if path.is_file() else None
    return path if kind is None or is_piece(path) else CheckpointSource(path=path, kind=kind, files=(path,))


def _folder(path: Path) -> CheckpointSource | None:
    """Return the checkpoint that a folder is as a whole; None of any other."""
    if (path / DCP_METADATA).is_file():
        return CheckpointSource(path=path, kind="dcp", files=tuple(dcp_files(path)))
    layout = layout_of(path)
    if layout is None:
        return None
    kind = "deepspeed" if path in {file.parent for file in layout.deepspeed} else "folder"
    return CheckpointSource(path=path, kind=kind, files=layout.files)


def read(source: CheckpointSource, options: ReadOptions) -> ForeignCheckpoint:
    """Read a checkpoint; tensors are mapped from the files where possible.

    Raises:
        FormatError: it is not a checkpoint, or names a class that is not built from files; the message names it.
        CorruptError: it is cut short or damaged.
    """
    with translated("read", source.path):
        checkpoint = _READERS[source.kind](source, options)
        if source.kind in {"safetensors", "folder"}:
            checkpoint = renamed(checkpoint, source.path, options)
    epoch, first = checkpoint.epoch, options.epochs_from
    if epoch is not None and first and checkpoint.from_zero:
        note = f"--epochs-from {first} is not for it: what {checkpoint.tool} counts from is known"
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
    if epoch is not None and not checkpoint.from_zero:
        if epoch < first:
            raise FormatError(f"{source.path} is of epoch {epoch}, but epochs count from {first}")
        checkpoint = replace(checkpoint, epoch=epoch - first)
    return _stripped(checkpoint, options.strip_prefix) if options.strip_prefix else checkpoint


def _stripped(checkpoint: ForeignCheckpoint, prefix: str) -> ForeignCheckpoint:
    parts, count, total = dict(checkpoint.parts), 0, 0
    for part in ("model", "ema"):
        if part in parts:
            count += sum(key.startswith(prefix) for key in parts[part])
            total += len(parts[part])
            short = {key.removeprefix(prefix): value for key, value in parts[part].items()}
            if len(short) < len(parts[part]):
                raise FormatError(f"taking {prefix!r} from the names of {part} makes two of them the same")
            parts[part] = short
    notes = (*checkpoint.notes, f"{prefix!r} was taken from {count} of {total} names of tensors")
    linkable = None if count else checkpoint.linkable
    return replace(checkpoint, parts=parts, notes=notes, linkable=linkable, stripped=count)


def _torch(source: CheckpointSource, options: ReadOptions) -> ForeignCheckpoint:
    return from_dict(pickles.load(source.path, inert=options.inert), source.path, options)


def _safetensors(source: CheckpointSource, options: ReadOptions) -> ForeignCheckpoint:
    tensors, metadata, record = read_whole(source.path)
    if not tensors:
        raise FormatError(f"{source.path} holds no tensors")
    numbers = {key: as_number(value) for key, value in metadata.items()}
    counters = read_counters(numbers, str(source.path), epoch_key=options.epoch_key, step_key=options.step_key)
    extra = {"metadata": metadata} if metadata.keys() - {"format"} else {}
    return ForeignCheckpoint(
        tool="safetensors",
        epoch=counters.epoch,
        step=counters.step,
        from_zero=metadata.get("written_by") == "peakpoint",
        metrics=_metrics(metadata.get("metrics", "")),
        parts={"model": tensors},
        extra=extra,
        notes=("all tensors -> model", *(["metadata -> extra"] if extra else []), *counters.notes),
        linkable=(source.path, record),
    )


def _metrics(text: str) -> dict[str, float]:
    """Return the metrics that an export of Peakpoint writes as JSON; none from another text."""
    try:
        values = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return {}
    pairs = values.items() if isinstance(values, dict) else ()
    return {metric_name(key): number for key, value in pairs if (number := as_number(value)) is not None}


# --- torch.distributed.checkpoint ---------------------------------------------------------------------------------


def _dcp(source: CheckpointSource, options: ReadOptions) -> ForeignCheckpoint:
    content = read_folder(source.path, inert=options.inert)
    beside = source.path / "meta.pt"  # Lightning's: everything but the tensors
    if beside in source.files:
        content = {**pickles.load(beside, inert=options.inert), **content}
    checkpoint = from_dict(content, source.path, options)
    return replace(checkpoint, tool="torch.distributed.checkpoint")


def _layout(source: CheckpointSource, options: ReadOptions) -> ForeignCheckpoint:
    layout = layout_of(source.path)
    if layout is None or layout.files != source.files:
        raise CorruptError(f"{source.path} was changed during the import; import again when nothing writes to it")
    if source.kind == "deepspeed":
        return read_deepspeed(layout, options)
    checkpoint = read_layout(source.path, layout, options)
    keys = {"epoch_key": options.epoch_key, "step_key": options.step_key}
    counters = read_counters(checkpoint.extra, str(source.path), **keys) if any(keys.values()) else FileCounters()
    if options.epoch_key:
        checkpoint = replace(checkpoint, epoch=counters.epoch, complete=True, from_zero=False)
    return replace(checkpoint, step=counters.step) if options.step_key else checkpoint


_READERS = {
    "torch": _torch,
    "safetensors": _safetensors,
    "dcp": _dcp,
    "folder": _layout,
    "deepspeed": _layout,
}
