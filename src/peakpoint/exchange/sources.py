"""The files and folders of other tools: finding and reading them.

Every reader here changes nothing, runs nothing, and says what became of everything in a file.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from peakpoint.errors import CorruptError, FormatError, NotFoundError
from peakpoint.exchange import pickles
from peakpoint.exchange.dcp import read_folder
from peakpoint.exchange.metric_logs import EPOCH, STEP, STEPS, LogRow, as_count, as_number, merged, metric_name, row_of
from peakpoint.exchange.state_dicts import (
    EXTRA,
    ForeignCheckpoint,
    ReadOptions,
    from_dict,
    is_weights,
    renamed,
    steps_of,
)
from peakpoint.format.layout import REPOSITORY
from peakpoint.format.manifest import FileRecord
from peakpoint.state.tensor_files import read_safetensors
from peakpoint.store import translated

PICKLED = frozenset({".bin", ".ckpt", ".pkl", ".pt", ".pth", ".tar"})
SAFETENSORS = ".safetensors"
_KINDS = {SAFETENSORS: "safetensors", **dict.fromkeys(PICKLED, "torch")}
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_HF_PARTS = {  # of transformers, and of accelerate's save_state
    **{f"{part}.pt": part for part in ("optimizer", "scheduler", "scaler")},
    **{f"{part}.bin": part for part in ("optimizer", "scheduler")},
}
_HF_JSON = ("config.json", "generation_config.json", "trainer_state.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSource:
    """A checkpoint of another tool, not read yet.

    Attributes:
        path: a file or a folder.
        kind: ``"torch"``, ``"safetensors"``, ``"huggingface"`` or ``"dcp"``.
        files: all files that belong to it.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]

    @property
    def size_bytes(self) -> int:
        """The bytes of its files."""
        return sum(file.stat().st_size for file in self.files)

    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Return sizes and times of its files: they change when somebody writes to them."""
        return tuple((state.st_size, state.st_mtime_ns) for state in (file.stat() for file in self.files))

    def digest(self) -> str:
        """Return BLAKE3 of its bytes; for a folder, of the names and digests of its files."""
        digests = {}
        with translated("read", self.path):
            for file in self.files:
                digests[file.name] = blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()
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
    with translated("read", path):
        entries = list(_below(path))
    sources = [entry for entry in entries if isinstance(entry, CheckpointSource)]
    if not sources:
        raise FormatError(
            f"{path} holds no checkpoint: looked for {', '.join(sorted(PICKLED))}, {SAFETENSORS}, folders with "
            f"{_WEIGHT_FILES[0]} or {_WEIGHT_FILES[2]}, and folders of torch.distributed.checkpoint"
        )
    return sources, [entry for entry in entries if isinstance(entry, Path)]


def _below(path: Path) -> Iterator[CheckpointSource | Path]:
    """Yield checkpoints, and the paths of everything else; files before folders."""
    if path.is_file():
        kind = _KINDS.get(path.suffix.lower())
        yield path if kind is None else CheckpointSource(path=path, kind=kind, files=(path,))
        return
    children = sorted(child for child in path.iterdir() if child.name == ".metadata" or child.name[0] != ".")
    files = [child for child in children if child.is_file()]
    names = {child.name for child in files}
    if REPOSITORY in names:
        yield path  # a repository of Peakpoint
        return
    if ".metadata" in names:
        yield CheckpointSource(path=path, kind="dcp", files=tuple(files))
        return
    beside = names & {*_HF_JSON, *_HF_PARTS} or any(name.endswith(".index.json") for name in names)
    if names & set(_WEIGHT_FILES) and beside:
        checkpoint_files = [file for file in files if _is_of_huggingface(file.name)]
        yield CheckpointSource(path=path, kind="huggingface", files=tuple(checkpoint_files))
        yield from (file for file in files if file not in checkpoint_files)
    else:
        for file in files:
            yield from _below(file)
    for child in children:
        if child.is_dir():  # a link would lead to the same files twice, or in circles
            yield from [child] if child.is_symlink() else _below(child)


def _is_of_huggingface(name: str) -> bool:
    weights = name.startswith(("model", "pytorch_model")) and name.endswith((SAFETENSORS, ".bin", ".index.json"))
    return weights or name in {*_HF_PARTS, *_HF_JSON}


def read(source: CheckpointSource, options: ReadOptions) -> ForeignCheckpoint:
    """Read a checkpoint; tensors are mapped from the files where possible.

    Raises:
        FormatError: it is not a checkpoint, or names a class that is not built from files; the message names it.
        CorruptError: it is cut short or damaged.
    """
    with translated("read", source.path):
        checkpoint = _READERS[source.kind](source, options)
        if source.kind in {"safetensors", "huggingface"}:
            checkpoint = renamed(checkpoint, source.path, options)
    epoch, first = checkpoint.epoch, options.epochs_from
    if epoch is not None and source.kind != "huggingface":
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


def _safetensors(source: CheckpointSource, options: ReadOptions) -> ForeignCheckpoint:  # noqa: ARG001 - as all readers
    tensors, metadata, record = read_safetensors(source.path)
    if not tensors:
        raise FormatError(f"{source.path} holds no tensors")
    numbers = {key: as_number(value) for key, value in metadata.items()}
    step = next((numbers[name] for name in STEPS if numbers.get(name) is not None), None)
    extra = {"metadata": metadata} if metadata.keys() - {"format"} else {}
    return ForeignCheckpoint(
        tool="safetensors",
        epoch=as_count(numbers.get(EPOCH)),
        step=as_count(step),
        metrics=_metrics(metadata.get("metrics", "")),
        parts={"model": tensors},
        extra=extra,
        notes=("all tensors -> model", *(["metadata -> extra"] if extra else [])),
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


# --- folders of Hugging Face --------------------------------------------------------------------------------------


def _huggingface(source: CheckpointSource, options: ReadOptions) -> ForeignCheckpoint:
    folder, names = source.path, {file.name for file in source.files}
    weights = next(name for name in _WEIGHT_FILES if name in names)
    model, linkable = _hf_model(folder / weights, options)
    parts: dict[str, Any] = {"model": model}
    notes = [f"{weights} -> model"]
    for name, part in _HF_PARTS.items():
        if name in names and part not in parts:
            parts[part] = pickles.load(folder / name, inert=options.inert)
            notes.append(f"{name} -> {part}")
    extra = {name.removesuffix(".json"): _json(folder / name) for name in _HF_JSON if name in names}
    notes += [f"{name}.json -> {EXTRA}" for name in extra]
    state = extra.get("trainer_state", {})
    log = [record for record in state.get("log_history") or () if isinstance(record, dict)]
    history = merged((row for record in log if (row := _hf_row(record)) is not None), by=STEP)
    step = as_count(as_number(state.get("global_step")))
    epoch = as_number(state.get("epoch"))
    return ForeignCheckpoint(
        tool="transformers" if state else "huggingface",
        epoch=_hf_epoch(epoch),
        step=steps_of(parts.get("optimizer")) if step is None else step,
        complete=epoch is None or epoch.is_integer(),
        metrics={name: value for row in history if row.step == step for name, value in row.metrics.items()},
        parts=parts,
        extra=extra,
        rows=tuple(history),
        notes=tuple(notes),
        linkable=linkable,
    )


def _hf_model(path: Path, options: ReadOptions) -> tuple[dict[str, Any], tuple[Path, FileRecord] | None]:
    """Return the tensors of one file or of the shards of an index, and the file when it is one that may be linked."""
    if path.name == _WEIGHT_FILES[0]:
        model, _, record = read_safetensors(path)
        return dict(model), (path, record)
    tensors: dict[str, Any] = {}
    for shard in _shards(path) if path.suffix == ".json" else [path.name]:
        of_shard = _weights_of(path.parent / shard, options)
        if tensors.keys() & of_shard.keys():
            raise FormatError(f"{path} lists two files with {min(tensors.keys() & of_shard.keys())!r}")
        tensors |= of_shard
    return tensors, None


def _hf_epoch(completed: float | None) -> int | None:
    """Return the index of the epoch that was running, or was just complete, from the epochs completed."""
    return None if completed is None or not math.isfinite(completed) else max(math.ceil(completed) - 1, 0)


def _hf_row(record: Mapping[str, Any]) -> LogRow | None:
    row = row_of({**record, EPOCH: None})
    return None if row is None else LogRow(_hf_epoch(as_number(record.get(EPOCH))), row.step, row.metrics)


def _json(path: Path) -> Any:
    try:
        content = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} does not hold a JSON object")
    return content


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(msgspec.convert(_json(index).get("weight_map"), dict[str, str]).values()))
    except msgspec.ValidationError as error:
        raise FormatError(f"{index} has no weight_map: {error}") from error
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CorruptError(f"{index} lists {name!r}, which is not in {index.parent}")
    return names


def _weights_of(path: Path, options: ReadOptions) -> dict[str, Any]:
    if path.suffix == SAFETENSORS:
        return dict(read_safetensors(path)[0])
    tensors = pickles.load(path, inert=options.inert)
    if not is_weights(tensors):
        raise FormatError(f"{path} is not a dict of tensors")
    return dict(tensors)


# --- torch.distributed.checkpoint ---------------------------------------------------------------------------------


def _dcp(source: CheckpointSource, options: ReadOptions) -> ForeignCheckpoint:
    checkpoint = from_dict(read_folder(source.path, inert=options.inert), source.path, options)
    return replace(checkpoint, tool="torch.distributed.checkpoint")


_READERS = {"torch": _torch, "safetensors": _safetensors, "huggingface": _huggingface, "dcp": _dcp}
