"""Checkpoints that other tools have written, as one kind of record: where they were taken, metrics, parts.

Every reader here changes nothing, runs nothing, and says what became of everything that it has found.
"""

import math
import mmap
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from blake3 import blake3

from peakpoint import unpickling
from peakpoint.errors import CorruptError, FormatError, NotFoundError
from peakpoint.logs import EPOCH, STEP, STEPS, Row, as_number, merged, metric_name, readable, row_of, whole
from peakpoint.manifest import FileRecord, TensorRecord
from peakpoint.store import translated
from peakpoint.tensors import tensors_of

EXTRA = "extra"
_NO_PART = re.compile(r"^[^A-Za-z0-9_]+|[^A-Za-z0-9_.-]+")
PICKLED = frozenset({".bin", ".ckpt", ".pkl", ".pt", ".pth", ".tar"})
SAFETENSORS = ".safetensors"
_LARGEST_HEADER = 100 * 1024**2
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_HF_PARTS = {"optimizer": "optimizer.pt", "scheduler": "scheduler.pt", "scaler": "scaler.pt"}
_HF_JSON = ("config.json", "generation_config.json", "trainer_state.json")
_KNOWN = {  # the names that scripts use, the first that is there and is one counts
    "model": ("model_state_dict", "state_dict", "model_state", "model", "net", "network", "weights"),
    "optimizer": ("optimizer_state_dict", "optimizer_state", "optimizer", "optim", "optim_state_dict"),
    "scheduler": ("scheduler_state_dict", "lr_scheduler_state_dict", "scheduler", "lr_scheduler"),
    "scaler": ("scaler_state_dict", "grad_scaler", "scaler"),
    "ema": ("ema_state_dict", "model_ema", "state_dict_ema", "ema"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How to read.

    Attributes:
        parts: names in the file to names of parts, besides those that are known; ``"extra"`` makes it none.
        strip_prefix: taken from the names of a model's tensors.
        inert: see ``unpickling.load``.
        epochs_from: the number that the file gives to the first epoch, 0 or 1.
    """

    parts: Mapping[str, str] = field(default_factory=dict)
    strip_prefix: str = ""
    inert: Collection[str] = ()
    epochs_from: int = 0


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """A checkpoint of another tool, read.

    Attributes:
        tool: what wrote it, as far as can be told.
        epoch: the epoch's index from 0, None when it does not say.
        step: optimizer steps completed, None when it does not say.
        complete: whether the epoch was complete.
        metrics: of the moment.
        parts: part name to state dict.
        extra: everything that is no part, as it was.
        rows: the history of metrics that came with it.
        notes: what became of what, a sentence each.
        optimizer: the optimizer's name as the file gives it, "" when it does not.
        linkable: a safetensors file that is the whole part ``model``, with the bytes before its tensors.
    """

    tool: str
    epoch: int | None = None
    step: int | None = None
    complete: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()
    optimizer: str = ""
    linkable: tuple[Path, FileRecord] | None = None


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
        found, others = _file(path) if path.is_file() else _folder(path)
    if not found:
        raise FormatError(
            f"{path} holds no checkpoint: looked for {', '.join(sorted(PICKLED))}, {SAFETENSORS}, folders with "
            f"{_WEIGHTS[0]} or {_WEIGHTS[2]}, and folders of torch.distributed.checkpoint"
        )
    return found, others


def _file(path: Path) -> tuple[list[Source], list[Path]]:
    if path.suffix.lower() in PICKLED:
        return [Source(path=path, kind="torch", files=(path,))], []
    if path.suffix.lower() == SAFETENSORS:
        return [Source(path=path, kind="safetensors", files=(path,))], []
    return [], [path]


def _folder(path: Path) -> tuple[list[Source], list[Path]]:
    children = sorted(child for child in path.iterdir() if child.name == ".metadata" or child.name[0] != ".")
    files = [child for child in children if child.is_file()]
    names = {child.name for child in files}
    found: list[Source] = []
    others: list[Path] = []
    if ".metadata" in names:
        return [Source(path=path, kind="dcp", files=tuple(files))], []
    if names & set(_WEIGHTS) and (names & set(_HF_JSON) or any(name.endswith(".index.json") for name in names)):
        mine = [file for file in files if _is_of_huggingface(file.name)]
        found.append(Source(path=path, kind="huggingface", files=tuple(mine)))
        others += [file for file in files if file not in mine]
    else:
        for file in files:
            more, no = _file(file)
            found, others = found + more, others + no
    for child in children:
        if child.is_dir() and not child.is_symlink():
            more, no = _folder(child)
            found, others = found + more, others + no
    return found, others


def _is_of_huggingface(name: str) -> bool:
    weights = name.startswith(("model", "pytorch_model")) and name.endswith((SAFETENSORS, ".bin", ".index.json"))
    return weights or name in {*_HF_PARTS.values(), *_HF_JSON}


def read(source: Source, how: Reading) -> Foreign:
    """Read a checkpoint; tensors are mapped from the files where possible.

    Raises:
        FormatError: it is no checkpoint, or names what is not built from files; the message names it.
        CorruptError: it is cut short or damaged.
    """
    with translated("read", source.path):
        found = _READERS[source.kind](source, how)
    if found.epoch is not None and source.kind != "huggingface":
        if found.epoch < how.epochs_from:
            raise FormatError(f"{source.path} is of epoch {found.epoch}, but epochs count from {how.epochs_from}")
        found = replace(found, epoch=found.epoch - how.epochs_from)
    return _stripped(found, how.strip_prefix) if how.strip_prefix else found


def _stripped(found: Foreign, prefix: str) -> Foreign:
    parts = dict(found.parts)
    for part in ("model", "ema"):
        if part in parts:
            renamed = {key.removeprefix(prefix): value for key, value in parts[part].items()}
            if len(renamed) < len(parts[part]):
                raise FormatError(f"taking {prefix!r} from the names of {part} makes two of them the same")
            parts[part] = renamed
    note = f"{prefix!r} was taken from the names of tensors"
    return replace(found, parts=parts, notes=(*found.notes, note), linkable=None)


# --- dicts --------------------------------------------------------------------------------------------------------


def _torch(source: Source, how: Reading) -> Foreign:
    return from_dict(unpickling.load(source.path, inert=how.inert), source.path, how)


def from_dict(given: Any, where: Path, how: Reading) -> Foreign:
    """A checkpoint from what a script has given to ``torch.save``.

    Raises:
        FormatError: it is no dict with tensors.
    """
    if not isinstance(given, dict) or not given:
        raise FormatError(f"{where} holds a {type(given).__name__}, and not a dict with state dicts")
    if _is_weights(given):
        return Foreign(tool="torch.save", parts={"model": given}, notes=("all of it -> model",))
    if not all(isinstance(key, str) for key in given):
        raise FormatError(f"{where} holds a dict whose keys are no text")
    lightning = "pytorch-lightning_version" in given
    parts, named = _parts(given, how)
    if lightning:
        parts, named = _lightning_parts(given, parts, named)
    if not parts:
        raise FormatError(f"{where} holds no state dict; it has {', '.join(given)}: name one with --part NAME=model")
    extra = {key: value for key, value in given.items() if key not in named}
    epoch, step, metrics, notes = _numbers(extra)
    notes = [f"{key} -> {part}" for key, part in named.items()] + notes
    complete = True
    if lightning:
        metrics |= _lightning_scores(extra, where.name)
        complete = _lightning_complete(extra)
    if step is None:
        step = _steps_of(parts.get("optimizer"))
        notes += [] if step is None else [f"step {step} from the optimizer's state"]
    return Foreign(
        tool=f"lightning {given['pytorch-lightning_version']}" if lightning else "torch.save",
        epoch=epoch,
        step=step,
        complete=complete,
        metrics=metrics,
        parts=parts,
        extra=extra,
        notes=tuple(notes),
        optimizer=_optimizer_name(extra),
    )


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(child, torch.Tensor) for child in value.values())


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, dict) and {"state", "param_groups"} <= value.keys()


def _fits(part: str, value: Any) -> bool:
    if part in {"model", "ema"}:
        return isinstance(value, dict) and any(isinstance(child, torch.Tensor) for child in value.values())
    return _is_optimizer(value) if part == "optimizer" else isinstance(value, dict)


def _parts(given: Mapping[str, Any], how: Reading) -> tuple[dict[str, Any], dict[str, str]]:
    """The parts, and the names in the file with the parts that they became."""
    for key in how.parts:
        if key not in given:
            raise FormatError(f"--part {key}={how.parts[key]}: the file has no {key!r}; it has {', '.join(given)}")
    named = {key: part for key, part in how.parts.items() if part != EXTRA}
    for part, names in _KNOWN.items():
        free = [name for name in names if name in given and name not in how.parts and _fits(part, given[name])]
        if free and part not in named.values():
            named[free[0]] = part
    for key, value in given.items():
        if key not in named and key not in how.parts and (_is_weights(value) or _is_optimizer(value)):
            named[key] = _part_name(key)
    return {part: _with_numbers(part, given[key]) for key, part in named.items()}, named


def _part_name(key: str) -> str:
    """A name of the file's as the name of a part."""
    name = _NO_PART.sub("_", key)[:60].rstrip(".") or "part"
    return f"my_{name}" if name in {EXTRA, "state", "manifest", "rng", "loop"} else name


def _with_numbers(part: str, value: Any) -> Any:
    """An optimizer's state whose parameters are numbers again: torch.distributed.checkpoint makes them text."""
    if part != "optimizer" or not value["state"] or not all(str(key).isdecimal() for key in value["state"]):
        return value
    return {**value, "state": {int(key): moments for key, moments in value["state"].items()}}


def _numbers(extra: Mapping[str, Any]) -> tuple[int | None, int | None, dict[str, float], list[str]]:
    """Epoch, step, metrics, and what was made of them."""
    values = {key: number for key, value in extra.items() if (number := _number(value)) is not None}
    epoch = whole(values.pop(EPOCH, None))
    found = next((name for name in STEPS if name in values), None)
    step = None if found is None else whole(values.pop(found))
    metrics = {metric_name(key): value for key, value in values.items()}
    for key in ("metrics", "scores", "results"):
        if isinstance(extra.get(key), dict):
            metrics |= dict(_flat(extra[key]))
    best = [name for name in metrics if name.startswith("best")]
    notes = [f"{name} is the best so far, and kept under this name" for name in best]
    others = [key for key in extra if key not in values and key not in {EPOCH, *STEPS}]
    notes += [f"{', '.join(others)} -> {EXTRA}"] if others else []
    return epoch, step, metrics, notes


def _flat(given: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in given.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        elif (number := _number(value)) is not None:
            yield metric_name(f"{prefix}{key}"), number


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.item() if len(value.reshape(-1)) == 1 else None
    return None if isinstance(value, str) else as_number(value)


def _steps_of(optimizer: Any) -> int | None:
    if not _is_optimizer(optimizer) or not isinstance(optimizer["state"], dict):
        return None
    moments = [one for one in optimizer["state"].values() if isinstance(one, dict)]
    counts = [count for one in moments if (count := whole(_number(one.get("step")))) is not None]
    return max(counts, default=None)


def _optimizer_name(extra: Mapping[str, Any]) -> str:
    for key in ("args", "hyper_parameters", "hparams", "config", "cfg", "opt"):
        options = extra.get(key)
        options = options if isinstance(options, dict) else getattr(options, "__dict__", {})
        for name in ("optimizer", "optim", "opt", "optimizer_name"):
            if isinstance(options.get(name), str):
                return readable(options[name])[:100]
    return ""


def _lightning_parts(
    given: Mapping[str, Any], parts: dict[str, Any], named: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    for key, part in (("optimizer_states", "optimizer"), ("lr_schedulers", "scheduler")):
        states = given.get(key)
        if isinstance(states, list) and states:
            names = [part] if len(states) == 1 else [f"{part}_{number}" for number in range(len(states))]
            parts |= dict(zip(names, states, strict=True))
            named[key] = ", ".join(names)
    return parts, named


def _lightning_scores(extra: Mapping[str, Any], name: str) -> dict[str, float]:
    """What ``ModelCheckpoint`` knows: the value of this file if it is among its best, and the best so far."""
    found: dict[str, float] = {}
    callbacks = extra.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        if isinstance(state, dict) and isinstance(state.get("monitor"), str):
            monitor = metric_name(state["monitor"])
            best = _number(state.get("best_model_score"))
            if best is not None:
                found[f"best_{monitor}"] = best
            for path, score in dict(state.get("best_k_models") or {}).items():
                if Path(str(path)).name == name and (value := _number(score)) is not None:
                    found[monitor] = value
    return found


def _lightning_complete(extra: Mapping[str, Any]) -> bool:
    try:
        return bool(extra["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"])
    except (KeyError, TypeError):
        return True


# --- safetensors --------------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], FileRecord]:
    """The tensors of a file, mapped privately, its metadata, and its record without digests.

    Raises:
        FormatError: it is no safetensors file, or one that this release does not read.
        CorruptError: it is cut short.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > min(_LARGEST_HEADER, size - 8):
            raise FormatError(f"{path} is no safetensors file: its header does not fit into its {size} bytes")
        try:
            header = msgspec.json.decode(file.read(length))
            metadata = msgspec.convert(header.pop("__metadata__", {}), dict[str, str])
            given = [(name, one["dtype"], one["shape"], *one["data_offsets"], "") for name, one in header.items()]
            rows = msgspec.convert(given, list[TensorRecord])
            rows.sort(key=lambda row: (row.begin, row.end))
        except (msgspec.MsgspecError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise FormatError(f"{path} is no safetensors file: its header cannot be read: {error}") from error
        at = 0
        for row in rows:
            if row.begin != at:
                raise FormatError(f"{path} has tensors that overlap or leave gaps at {row.name!r}")
            at = row.end
        if 8 + length + at != size:
            raise CorruptError(f"{path} has {size} bytes, and its header says {8 + length + at}: cut short or damaged")
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    record = FileRecord(name=path.name, size=size, digest="", header=8 + length, tensors=tuple(rows))
    return tensors_of(record, mapped), metadata, record


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
        parts={"model": tensors},
        extra=extra,
        notes=("all tensors -> model", *(["metadata -> extra"] if extra else [])),
        linkable=(source.path, record),
    )


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
    for part, name in _HF_PARTS.items():
        if name in names:
            parts[part] = unpickling.load(folder / name, inert=how.inert)
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
        tool="transformers",
        epoch=_hf_epoch(epoch),
        step=step,
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
    found = unpickling.load(path, inert=how.inert)
    if not _is_weights(found):
        raise FormatError(f"{path} is no dict of tensors")
    return dict(found)


# --- torch.distributed.checkpoint ---------------------------------------------------------------------------------


def _dcp(source: Source, how: Reading) -> Foreign:
    from peakpoint.distributed import read_folder  # noqa: PLC0415 - start-up time: torch.distributed takes a second

    found = from_dict(read_folder(source.path, inert=how.inert), source.path, how)
    return replace(found, tool="torch.distributed.checkpoint")


_READERS = {"torch": _torch, "safetensors": _safetensors, "huggingface": _huggingface, "dcp": _dcp}
