"""Folders in which a tool keeps one checkpoint in several files: Hugging Face's, accelerate's, FSDP's, DeepSpeed's.

``layout_of`` says by the names which file is what, so that each file of a folder is either read or named;
``read_layout`` reads them.

Source: transformers, ``trainer.py``; accelerate, ``checkpointing.py`` and ``utils/fsdp_utils.py``; peft,
``utils/save_and_load.py``; DeepSpeed, ``runtime/engine.py`` and ``utils/zero_to_fp32.py``.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from peakpoint.errors import CorruptError, FormatError
from peakpoint.exchange import pickles
from peakpoint.exchange.dcp import DCP_METADATA, dcp_files, read_folder
from peakpoint.exchange.generators import generators_in
from peakpoint.exchange.metric_logs import STEP, as_count, as_number, epoch_of_completed, merged, rows_of
from peakpoint.exchange.part_names import is_weights, part_name
from peakpoint.exchange.state_dicts import ForeignCheckpoint, ReadOptions, from_dict, steps_of, tool_name
from peakpoint.exchange.torch_shards import (
    SHARDED,
    check_shapes,
    is_shard,
    note_of,
    read_shards,
    read_whole,
    step_in_name,
)
from peakpoint.format.manifest import FileRecord
from peakpoint.format.names import EXTRA

SAFETENSORS = ".safetensors"
_INDEX = ".index.json"
_LARGEST_INDEX = 1 << 25  # bytes: some 250,000 tensors; it is read before anything is inspected
_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "pytorch_model_fsdp", "adapter_model")  # best first
_WEIGHTS = re.compile(
    rf"(?P<stem>{'|'.join(_STEMS)})(?P<number>_\d+)?"
    rf"(?P<shard>-\d+-of-(?P<count>\d+))?(?P<suffix>\.safetensors|\.bin)(?P<index>{re.escape(_INDEX)})?"
)
_STATES = re.compile(
    r"(?P<part>(?:optimizer|scheduler|scaler|custom_checkpoint|sampler|dl_state_dict)(?:_\d+)?)\.(?:pt|bin|pkl)"
)
_OF_LOADERS = re.compile(r"(?:sampler|dl_state_dict)(?:_\d+)?")  # kept, but no parts
_GENERATORS = re.compile(r"(?:rng_state|random_states)(?:_(?P<rank>\d+))?\.(?:pth|pkl)")
_DCP_FOLDERS = re.compile(r"(?P<kind>pytorch_model_fsdp|optimizer)_(?P<number>\d+)")
_DEEPSPEED_FOLDERS = re.compile(r"(?:global_step\d+|pytorch_model(?P<number>_\d+)?)")
_DEEPSPEED_FILES = re.compile(r"(?:.*[_-]model_states|.*_optim_states)\.pt")
_DEEPSPEED_MODEL = "mp_rank_00_model_states.pt"
_ADAPTER = "adapter_config.json"
_TRAINER_STATE = "trainer_state.json"
_SETTINGS = ("config.json", "generation_config.json", _ADAPTER, _TRAINER_STATE)


class _ShardIndex(msgspec.Struct):
    """Names of tensors to names of files; nothing else in an index becomes an object."""

    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderLayout:
    """Which files of a folder are what.

    Attributes:
        weights: name of a part to its file, its index and shards, or its folder of torch.distributed.checkpoint.
        states: name of an optimizer, a scheduler and the like to its file or folder.
        generators: the states of the random generators, of the first process first.
        settings: name among what is no part to its JSON file.
        deepspeed: the files of DeepSpeed.
    """

    weights: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    states: Mapping[str, Path] = field(default_factory=dict)
    generators: tuple[Path, ...] = ()
    settings: Mapping[str, Path] = field(default_factory=dict)
    deepspeed: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All of its files."""
        paths = [path for paths in self.weights.values() for path in paths]
        paths += [*self.states.values(), *self.generators, *self.settings.values(), *self.deepspeed]
        return tuple(file for path in paths for file in (dcp_files(path) if path.is_dir() else [path]))

    @property
    def trained(self) -> bool:
        """Whether it holds more of a training than weights."""
        return bool(self.states or self.generators or self.deepspeed)


# --- finding ------------------------------------------------------------------------------------------------------


def layout_of(folder: Path) -> FolderLayout | None:
    """Return what is what in a folder that is one checkpoint; None of any other."""
    layout = _own_files(folder)
    if not layout.deepspeed:
        layout = _with_folders(layout, [child for child in sorted(folder.iterdir()) if is_folder(child)])
    sharded = any(len(files) > 1 or _count(files[0]) > 1 or is_shard(files[0]) for files in layout.weights.values())
    beside = layout.trained or layout.settings or sharded
    return layout if (layout.weights or layout.deepspeed) and beside else None


def is_folder(path: Path) -> bool:
    """Whether a path is a folder and no link, which would lead to the same files twice, or in circles."""
    return path.is_dir() and not path.is_symlink()


def _own_files(folder: Path) -> FolderLayout:
    files = [child for child in sorted(folder.iterdir()) if child.is_file()]
    deepspeed = tuple(file for file in files if _DEEPSPEED_FILES.fullmatch(file.name))
    generators = [(match["rank"], file) for file in files if (match := _GENERATORS.fullmatch(file.name))]
    ordered = sorted(generators, key=lambda ranked: int(ranked[0] or 0))
    states: dict[str, Path] = {}
    for file in files:
        if match := _STATES.fullmatch(file.name):
            states.setdefault(match["part"], file)
    return FolderLayout(
        weights=_weights(files),
        states=states,
        generators=tuple(file for _, file in ordered),
        settings={file.stem: file for file in files if file.name in _SETTINGS},
        deepspeed=deepspeed,
    )


def _weights(files: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """Return part names to the files that hold the weights; where several do, to the first kind of ``_STEMS``."""
    groups: defaultdict[tuple[str, str, str], list[tuple[re.Match[str], Path]]] = defaultdict(list)
    for file in files:
        if match := _WEIGHTS.fullmatch(file.name):
            groups[match["suffix"], match["stem"], match["number"] or ""].append((match, file))
    weights: dict[str, tuple[Path, ...]] = {}
    for (_, stem, number), group in sorted(
        groups.items(), key=lambda entry: (entry[0][0] == ".bin", _STEMS.index(entry[0][1]))
    ):
        part = ("adapter" if stem == "adapter_model" and f"model{number}" in weights else "model") + number
        weights.setdefault(part, _preferred(group))
    return _with_shards(weights, files)


def _with_shards(weights: Mapping[str, tuple[Path, ...]], files: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """Put the files in which each process has saved its pieces of the model before what was consolidated of them."""
    shards = tuple(file for file in files if is_shard(file))
    return {**weights, "model": (*shards, *weights.get("model", ()))} if shards else dict(weights)


def _preferred(group: Sequence[tuple[re.Match[str], Path]]) -> tuple[Path, ...]:
    """Return the one file, or the index with the shards that it lists, or shards without an index."""
    for match, file in group:
        if not (match["shard"] or match["index"]):
            return (file,)
    shards = [file for match, file in group if match["shard"]]
    for match, file in group:
        if match["index"]:
            listed = set(_weight_map(file).values())
            return (file, *(shard for shard in shards if shard.name in listed))
    return tuple(shards)


def _with_folders(layout: FolderLayout, folders: Sequence[Path]) -> FolderLayout:
    """Add what tools keep in folders beside the other files of a checkpoint."""
    weights, states = dict(layout.weights), dict(layout.states)
    settings = dict(layout.settings)
    for folder in folders:
        if folder.name == SHARDED:
            weights = _with_shards(weights, sorted(folder.iterdir()))
        match = _DCP_FOLDERS.fullmatch(folder.name)
        if match and (folder / DCP_METADATA).is_file():
            number = "" if match["number"] == "0" else f"_{match['number']}"
            if match["kind"] == "optimizer":
                states.setdefault(f"optimizer{number}", folder)
            else:
                weights.setdefault(f"model{number}", (folder,))
    deepspeed = [folder for folder in folders if _DEEPSPEED_FOLDERS.fullmatch(folder.name)]
    layout = replace(layout, weights=weights, states=states)
    if not layout.trained:
        return layout
    inner = {folder: _own_files(folder) for folder in folders}
    partitioned = [folder for folder in deepspeed if inner[folder].deepspeed]
    if len(partitioned) == 1:
        layout = replace(layout, deepspeed=inner[partitioned[0]].deepspeed)
    bare = {folder: files for folder, files in inner.items() if set(files.weights) == {"model"} and not files.trained}
    if weights or layout.deepspeed:  # then only further adapters belong to it
        bare = {folder: files for folder, files in bare.items() if Path(_ADAPTER).stem in files.settings}
    for folder, files in bare.items():
        part = "model" if len(bare) == 1 and not weights else part_name(folder.name)
        weights.setdefault(part, files.weights["model"])
        settings |= {f"{folder.name}/{name}": file for name, file in files.settings.items()}
    return replace(layout, weights=weights, settings=settings)


# --- reading ------------------------------------------------------------------------------------------------------


def read_layout(folder: Path, layout: FolderLayout, options: ReadOptions) -> ForeignCheckpoint:
    """Read the files of a folder."""
    parts: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    notes: list[str] = []
    linkable = None
    for part, files in layout.weights.items():
        parts[part], record = _weights_in(files, options)
        linkable = (files[0], record) if part == "model" and record is not None else linkable
        notes.append(note_of(files, part) or f"{files[0].relative_to(folder)} -> {part}")
    for name, path in layout.states.items():
        state = read_folder(path, inert=options.inert) if path.is_dir() else pickles.load(path, inert=options.inert)
        if path.is_dir() and set(state) == {"optimizer"}:
            state = state["optimizer"]
        is_part = isinstance(state, dict) and not _OF_LOADERS.fullmatch(name)
        (parts if is_part else extra)[name] = state
        notes.append(f"{path.name} -> {name if is_part else EXTRA}")
    generators, of_files, of_generators = _generators(layout.generators, options)
    extra |= {name: _json(file) for name, file in layout.settings.items()} | of_files
    notes += [f"{file.relative_to(folder)} -> {EXTRA}" for file in layout.settings.values()] + of_generators
    of_engine = _deepspeed(layout.deepspeed, options, elsewhere="model" in parts) if layout.deepspeed else None
    if of_engine is not None:
        parts, extra = {**of_engine.parts, **parts}, {**of_engine.extra, **extra}
        notes += of_engine.notes
    checkpoint = _placed(
        ForeignCheckpoint(
            tool="transformers" if extra.get("trainer_state") else "huggingface",
            step=None if of_engine is None else of_engine.step,
            parts=parts,
            extra=extra,
            generators=generators,
            notes=tuple(notes),
            linkable=linkable,
        )
    )
    of_processes = any(is_shard(file) for file in layout.weights.get("model", ()))
    return _of_processes(checkpoint, folder) if of_processes else checkpoint


def _of_processes(checkpoint: ForeignCheckpoint, folder: Path) -> ForeignCheckpoint:
    """Return a checkpoint of ``HuggingFaceStorageWriter`` with the step in the name of its folder if no file has it."""
    step, notes = checkpoint.step, checkpoint.notes
    if step is None:
        step = step_in_name(folder)
        notes = notes if step is None else (*notes, "step from the name of the folder")
    return replace(checkpoint, tool="torch.distributed.checkpoint", step=step, notes=notes)


def _placed(checkpoint: ForeignCheckpoint) -> ForeignCheckpoint:
    """Return a checkpoint with the moment and the history in its ``trainer_state.json``."""
    state = checkpoint.extra.get("trainer_state", {})
    log = state.get("log_history")
    log = [record for record in log if isinstance(record, dict)] if isinstance(log, list) else []
    history = merged(rows_of(log, completed=True), by=STEP)
    step = as_count(as_number(state.get("global_step")))
    step = checkpoint.step if step is None else step
    epoch = as_number(state.get("epoch"))
    return replace(
        checkpoint,
        epoch=epoch_of_completed(epoch),
        step=steps_of(checkpoint.parts.get("optimizer")) if step is None else step,
        complete=epoch is None or epoch.is_integer(),
        from_zero=True,
        metrics={name: value for row in history if row.step == step for name, value in row.metrics.items()},
        rows=tuple(history),
    )


def _generators(files: Sequence[Path], options: ReadOptions) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return the states of the first process's generators, what else is in the files, and notes."""
    generators: dict[str, Any] = {}
    leftovers: dict[str, Any] = {}
    notes = []
    for file in files:
        content = pickles.load(file, inert=options.inert)
        if file is files[0]:
            generators, remaining = generators_in({"rng": content})
            content = remaining.get("rng", content if not generators else None)
            notes += [f"{file.name} -> random generators"] if generators else []
        if content is not None:
            leftovers[file.stem] = content
            notes += [] if generators and file is files[0] else [f"{file.name} -> {EXTRA}"]
    return generators, leftovers, notes


def _weights_in(files: Sequence[Path], options: ReadOptions) -> tuple[dict[str, Any], FileRecord | None]:
    """Return the tensors of a part; of a model that torch has consolidated those of the pieces, where they are kept."""
    shards, consolidated = [file for file in files if is_shard(file)], [file for file in files if not is_shard(file)]
    if not shards:
        return _tensors(files, options)
    tensors = read_shards(shards)
    if consolidated:
        try:
            of_torch = _tensors(consolidated, options)[0]
        except (CorruptError, FormatError) as error:
            raise type(error)(f"{error}; move it away to import {shards[0].parent}") from error
        check_shapes(shards, tensors, of_torch)
    return tensors, None


def _tensors(files: Sequence[Path], options: ReadOptions) -> tuple[dict[str, Any], FileRecord | None]:
    """Return the tensors of one file, of shards, or of a folder, and the record of a file that may be linked."""
    first, *shards = files
    if first.is_dir():
        content = read_folder(first, inert=options.inert)
        return content.get("model", content), None
    if first.name.endswith(_INDEX):
        names = sorted(set(_weight_map(first, strict=True).values()))
        for name in names:
            if name not in {shard.name for shard in shards}:
                raise CorruptError(f"{first} lists {name!r}, which is not in {first.parent}")
    elif len(files) > 1 or _count(first) > 1:
        shards = list(files)
        if len(shards) != _count(first):
            raise CorruptError(
                f"{first.parent} has {len(shards)} of the {_count(first)} shards of which {first.name} is one"
            )
    elif first.suffix == SAFETENSORS:
        tensors, _, record = read_whole(first)
        return dict(tensors), record
    merged_tensors: dict[str, Any] = {}
    for shard in shards or [first]:
        of_shard = _tensors_of(shard, options)
        if merged_tensors.keys() & of_shard.keys():
            twice = min(merged_tensors.keys() & of_shard.keys())
            raise FormatError(f"{first} lists two files with {twice!r}")
        merged_tensors |= of_shard
    return merged_tensors, None


def _count(file: Path) -> int:
    match = _WEIGHTS.fullmatch(file.name)
    return int(match["count"] or 1) if match else 1


def _tensors_of(path: Path, options: ReadOptions) -> dict[str, Any]:
    if path.suffix == SAFETENSORS:
        return dict(read_whole(path)[0])
    tensors = pickles.load(path, inert=options.inert)
    if not is_weights(tensors):
        raise FormatError(f"{path} is not a dict of tensors")
    return dict(tensors)


def _weight_map(index: Path, *, strict: bool = False) -> dict[str, str]:
    """Return names of tensors to names of files; an index that cannot be read is empty unless ``strict``."""
    try:
        return _decoded_index(index)
    except (CorruptError, FormatError):
        if strict:
            raise
    return {}


def _decoded_index(index: Path) -> dict[str, str]:
    if index.stat().st_size > _LARGEST_INDEX:
        raise FormatError(f"{index} has more than {_LARGEST_INDEX} bytes")
    try:
        decoded: _ShardIndex = _decoded(index, _ShardIndex)
    except msgspec.ValidationError as error:
        raise FormatError(f"{index} has no weight_map: {error}") from error
    return decoded.weight_map


def _json(path: Path) -> Any:
    try:
        content = _decoded(path, Any)
    except msgspec.ValidationError as error:  # a number that no float holds
        raise FormatError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} does not hold a JSON object")
    return content


def _decoded(path: Path, kind: Any) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptError(f"{path} is not JSON: {error}") from error


# --- DeepSpeed ----------------------------------------------------------------------------------------------------

_OF_ENGINE = {  # entries that DeepSpeed adds to those of the training
    *("buffer_names", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments"),
    *("data_sampler", "random_ltd", "sparse_tensor_module_names", "skipped_steps", "global_steps", "global_samples"),
    *("dp_world_size", "mp_world_size", "ds_config", "ds_version"),
}


def read_deepspeed(layout: FolderLayout, options: ReadOptions) -> ForeignCheckpoint:
    """Read a folder that DeepSpeed has written."""
    checkpoint = _deepspeed(layout.deepspeed, options, elsewhere=False)
    assert checkpoint is not None
    return checkpoint


def _deepspeed(files: Sequence[Path], options: ReadOptions, *, elsewhere: bool) -> ForeignCheckpoint | None:
    """Read the state of the model; those of optimizers are in partitions, which only DeepSpeed's own script merges.

    Args:
        elsewhere: whether the weights are in another file, so that they may be missing here.
    """
    folder = files[0].parent
    models = [file for file in files if not file.name.endswith("_optim_states.pt")]
    partitions = len(files) - len(models)
    advice = f"python {folder.parent / 'zero_to_fp32.py'} {folder.parent} OUT writes the whole weights, as float32"
    notes = [f"LEFT OUT: {partitions} partitions of the optimizer ({folder.name}/*_optim_states.pt): {advice}"]
    if [file.name for file in models] != [_DEEPSPEED_MODEL]:
        if not elsewhere:
            raise FormatError(
                f"{folder} is of DeepSpeed, with the model in partitions, which Peakpoint does not merge: {advice}; "
                "then import OUT"
            )
        notes.append(f"LEFT OUT: {len(models)} partitions of the model ({folder.name}/*_model_states.pt)")
        return ForeignCheckpoint(tool="deepspeed", notes=tuple(notes))
    content = pickles.load(models[0], inert=options.inert)
    if not isinstance(content, dict) or not isinstance(content.get("module"), dict):
        raise FormatError(f"{models[0]} has no 'module', as DeepSpeed writes it")
    of_training = {name: value for name, value in content.items() if name not in _OF_ENGINE and value is not None}
    of_engine = {name: content[name] for name in content if name in _OF_ENGINE and content[name] is not None}
    checkpoint = from_dict(of_training, models[0], options)
    return replace(
        checkpoint,
        tool=tool_name("deepspeed", content.get("ds_version")),
        step=as_count(as_number(content.get("global_steps"))) if checkpoint.step is None else checkpoint.step,
        extra={**of_engine, **checkpoint.extra},
        notes=(*checkpoint.notes, *(notes if partitions else ())),
    )
