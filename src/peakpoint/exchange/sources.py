"""The files and folders of other tools: finding and reading them.

Every reader here changes nothing, runs nothing, and says what became of everything that it has found.
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
from peakpoint.exchange.metric_logs import EPOCH, STEP, STEPS, Row, as_number, merged, metric_name, row_of, whole
from peakpoint.exchange.state_dicts import EXTRA, Foreign, Reading, from_dict, is_weights, renamed, steps_of
from peakpoint.format.layout import REPOSITORY
from peakpoint.state.tensor_files import read_safetensors
from peakpoint.store import translated

PICKLED = frozenset({".bin", ".ckpt", ".pkl", ".pt", ".pth", ".tar"})
SAFETENSORS = ".safetensors"
_KINDS = {SAFETENSORS: "safetensors", **dict.fromkeys(PICKLED, "torch")}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_HF_PARTS = {  # of transformers, and of accelerate's save_state
    **{f"{part}.pt": part for part in ("optimizer", "scheduler", "scaler")},
    **{f"{part}.bin": part for part in ("optimizer", "scheduler")},
}
_HF_JSON = ("config.json", "generation_config.json", "trainer_state.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint of another tool, not read yet.

    Attributes:
        path: a file or a folder.
        kind: ``"torch"``, ``"safetensors"``, ``"huggingface"`` or ``"dcp"``.
        files: what belongs to it.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its files."""
        return sum(file.stat().st_size for file in self.files)

    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Sizes and times of its files, which tell whether somebody writes to them."""
        return tuple((state.st_size, state.st_mtime_ns) for state in (file.stat() for file in self.files))

    def digest(self) -> str:
        """BLAKE3 of its bytes; of a folder, of the names and digests of its files."""
        found = {}
        with translated("read", self.path):
            for file in self.files:
                hashed = blake3(max_threads=blake3.AUTO)
                found[file.name] = hashed.update_mmap(file).hexdigest()
        if len(found) == 1:
            return next(iter(found.values()))
        return blake3(msgspec.json.encode(sorted(found.items()))).hexdigest()


# --- what is there ------------------------------------------------------------------------------------------------


def find(path: Path) -> tuple[list[Source], list[Path]]:
    """The checkpoints at or below ``path``, and the files that are none.

    Raises:
        NotFoundError: there is nothing of that name.
        FormatError: nothing there has the form of a checkpoint.
    """
    if not path.exists():
        raise NotFoundError(f"cannot import {path}: it does not exist")
    with translated("read", path):
        there = list(_below(path))
    found = [one for one in there if isinstance(one, Source)]
    if not found:
        raise FormatError(
            f"{path} holds no checkpoint: looked for {', '.join(sorted(PICKLED))}, {SAFETENSORS}, folders with "
            f"{_WEIGHTS[0]} or {_WEIGHTS[2]}, and folders of torch.distributed.checkpoint"
        )
    return found, [one for one in there if isinstance(one, Path)]


def _below(path: Path) -> Iterator[Source | Path]:
    """Checkpoints, and the paths of everything else; files before folders."""
    if path.is_file():
        kind = _KINDS.get(path.suffix.lower())
        yield path if kind is None else Source(path=path, kind=kind, files=(path,))
        return
    children = sorted(child for child in path.iterdir() if child.name == ".metadata" or child.name[0] != ".")
    files = [child for child in children if child.is_file()]
    names = {child.name for child in files}
    if REPOSITORY in names:
        yield path  # one of ours
        return
    if ".metadata" in names:
        yield Source(path=path, kind="dcp", files=tuple(files))
        return
    beside = names & {*_HF_JSON, *_HF_PARTS} or any(name.endswith(".index.json") for name in names)
    if names & set(_WEIGHTS) and beside:
        mine = [file for file in files if _is_of_huggingface(file.name)]
        yield Source(path=path, kind="huggingface", files=tuple(mine))
        yield from (file for file in files if file not in mine)
    else:
        for file in files:
            yield from _below(file)
    for child in children:
        if child.is_dir():  # a link leads to what is found elsewhere, or in circles
            yield from [child] if child.is_symlink() else _below(child)


def _is_of_huggingface(name: str) -> bool:
    weights = name.startswith(("model", "pytorch_model")) and name.endswith((SAFETENSORS, ".bin", ".index.json"))
    return weights or name in {*_HF_PARTS, *_HF_JSON}


def read(source: Source, how: Reading) -> Foreign:
    """Read a checkpoint; tensors are mapped from the files where possible.

    Raises:
        FormatError: it is no checkpoint, or names what is not built from files; the message names it.
        CorruptError: it is cut short or damaged.
    """
    with translated("read", source.path):
        found = _READERS[source.kind](source, how)
        if source.kind in {"safetensors", "huggingface"}:
            found = renamed(found, source.path, how)
    if found.epoch is not None and source.kind != "huggingface":
        if found.epoch < how.epochs_from:
            raise FormatError(f"{source.path} is of epoch {found.epoch}, but epochs count from {how.epochs_from}")
        found = replace(found, epoch=found.epoch - how.epochs_from)
    return _stripped(found, how.strip_prefix) if how.strip_prefix else found


def _stripped(found: Foreign, prefix: str) -> Foreign:
    parts, count, total = dict(found.parts), 0, 0
    for part in ("model", "ema"):
        if part in parts:
            count += sum(key.startswith(prefix) for key in parts[part])
            total += len(parts[part])
            renamed = {key.removeprefix(prefix): value for key, value in parts[part].items()}
            if len(renamed) < len(parts[part]):
                raise FormatError(f"taking {prefix!r} from the names of {part} makes two of them the same")
            parts[part] = renamed
    note = f"{prefix!r} was taken from {count} of {total} names of tensors"
    return replace(
        found, parts=parts, notes=(*found.notes, note), linkable=None if count else found.linkable, stripped=count
    )


def _torch(source: Source, how: Reading) -> Foreign:
    return from_dict(pickles.load(source.path, inert=how.inert), source.path, how)


def _safetensors(source: Source, how: Reading) -> Foreign:  # noqa: ARG001 - all readers are called alike
    tensors, metadata, record = read_safetensors(source.path)
    if not tensors:
        raise FormatError(f"{source.path} holds no tensors")
    given = {key: as_number(value) for key, value in metadata.items()}
    step = next((given[name] for name in STEPS if given.get(name) is not None), None)
    extra = {"metadata": metadata} if metadata.keys() - {"format"} else {}
    return Foreign(
        tool="safetensors",
        epoch=whole(given.get(EPOCH)),
        step=whole(step),
        metrics=_metrics(metadata.get("metrics", "")),
        parts={"model": tensors},
        extra=extra,
        notes=("all tensors -> model", *(["metadata -> extra"] if extra else [])),
        linkable=(source.path, record),
    )


def _metrics(text: str) -> dict[str, float]:
    """The metrics that an export of Peakpoint tells as JSON; nothing from another text."""
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return {}
    given = found.items() if isinstance(found, dict) else ()
    return {metric_name(key): number for key, value in given if (number := as_number(value)) is not None}


# --- folders of Hugging Face --------------------------------------------------------------------------------------


def _huggingface(source: Source, how: Reading) -> Foreign:
    folder, linkable = source.path, None
    names = {file.name for file in source.files}
    notes = []
    weights = next(name for name in _WEIGHTS if name in names)
    if weights == _WEIGHTS[0]:
        model, _, record = read_safetensors(folder / weights)
        linkable = folder / weights, record
    else:
        model = {}
        for shard in _shards(folder / weights) if weights.endswith(".json") else [weights]:
            more = _weights_of(folder / shard, how)
            if model.keys() & more.keys():
                raise FormatError(f"{folder / weights} lists two files with {min(model.keys() & more.keys())!r}")
            model |= more
    notes.append(f"{weights} -> model")
    parts: dict[str, Any] = {"model": model}
    for name, part in _HF_PARTS.items():
        if name in names and part not in parts:
            parts[part] = pickles.load(folder / name, inert=how.inert)
            notes.append(f"{name} -> {part}")
    extra = {name.removesuffix(".json"): _json(folder / name) for name in _HF_JSON if name in names}
    notes += [f"{name}.json -> {EXTRA}" for name in extra]
    state = extra.get("trainer_state", {})
    log = [record for record in state.get("log_history") or () if isinstance(record, dict)]
    history = merged((row for record in log if (row := _hf_row(record)) is not None), by=STEP)
    step = whole(as_number(state.get("global_step")))
    epoch = as_number(state.get("epoch"))
    here = {name: value for row in history if row.step == step for name, value in row.metrics.items()}
    return Foreign(
        tool="transformers" if state else "huggingface",
        epoch=_hf_epoch(epoch),
        step=steps_of(parts.get("optimizer")) if step is None else step,
        complete=epoch is None or epoch.is_integer(),
        metrics=here,
        parts=parts,
        extra=extra,
        rows=tuple(history),
        notes=tuple(notes),
        linkable=linkable,
    )


def _hf_epoch(completed: float | None) -> int | None:
    """The index of the epoch that was running, or was just complete, from the epochs completed."""
    return None if completed is None or not math.isfinite(completed) else max(math.ceil(completed) - 1, 0)


def _hf_row(record: Mapping[str, Any]) -> Row | None:
    row = row_of({**record, EPOCH: None})
    return None if row is None else Row(_hf_epoch(as_number(record.get(EPOCH))), row.step, row.metrics)


def _json(path: Path) -> Any:
    try:
        found = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds no JSON object")
    return found


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(msgspec.convert(_json(index).get("weight_map"), dict[str, str]).values()))
    except msgspec.ValidationError as error:
        raise FormatError(f"{index} has no weight_map: {error}") from error
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CorruptError(f"{index} lists {name!r}, which is not in {index.parent}")
    return names


def _weights_of(path: Path, how: Reading) -> dict[str, Any]:
    if path.suffix == SAFETENSORS:
        return dict(read_safetensors(path)[0])
    found = pickles.load(path, inert=how.inert)
    if not is_weights(found):
        raise FormatError(f"{path} is no dict of tensors")
    return dict(found)


# --- torch.distributed.checkpoint ---------------------------------------------------------------------------------


def _dcp(source: Source, how: Reading) -> Foreign:
    found = from_dict(read_folder(source.path, inert=how.inert), source.path, how)
    return replace(found, tool="torch.distributed.checkpoint")


_READERS = {"torch": _torch, "safetensors": _safetensors, "huggingface": _huggingface, "dcp": _dcp}
