"""Models of which each process has written its pieces: folders of torch's ``HuggingFaceStorageWriter``.

A file is ``shard-PROCESS-model-FILE-of-COUNT.safetensors``, and its header tells where in its tensor each piece
begins. How large the tensors are, and how many processes have saved, stands nowhere, so that nothing in the other files
tells of a lack of the last ones. What torch itself has consolidated of the pieces does, but its scalars are 0.

Source: PyTorch, ``torch/distributed/checkpoint/{hf_storage,_hf_utils,filesystem,_consolidate_hf_safetensors}.py``.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from peakpoint.errors import CorruptError, FormatError
from peakpoint.format.manifest import FileRecord
from peakpoint.format.members import Count
from peakpoint.format.shards import tensors_of_files
from peakpoint.state.shards import joined
from peakpoint.state.tensor_files import is_possible, read_safetensors

SHARDED = "sharded"  # the folder of the pieces, where torch has put them together in the one above
_SHARD = re.compile(r"shard-(?P<process>\d{1,9})-model-(?P<file>\d{1,9})-of-(?P<count>\d{1,9})\.safetensors")
_PLACES = "DCP_SHARDING_INFO"  # in the metadata of a header
_WHOLE = re.compile(r"model-\d+-of-\d+\.safetensors")  # how torch names files of whole tensors
_STEP = re.compile(r"(?:step|checkpoint)[-_](\d{1,15})")
_ALL_FILES = "copy the files of all processes into one folder, without those of another save, and import it"
_MOST_NAMES = 4


class _PiecePlace(msgspec.Struct):
    """Where a piece begins in its tensor."""

    saved_offsets: tuple[Count, ...]


def is_shard(path: Path) -> bool:
    """Whether a file has the name of what one process has written."""
    return _SHARD.fullmatch(path.name) is not None


def note_of(files: Sequence[Path], part: str) -> str:
    """Say which shards become a part, and how far it is known that these are all; "" of other files."""
    processes = {match["process"] for file in files if (match := _SHARD.fullmatch(file.name))}
    if not processes:
        return ""
    consolidated = len(files) > sum(map(is_shard, files))
    doubt = "what torch has consolidated was compared by shape only: its scalars are 0"
    return (
        f"shards 1 to {len(processes)} -> {part}; {doubt if consolidated else 'no file tells whether more were saved'}"
    )


def step_in_name(folder: Path) -> int | None:
    """Return the step in the name of a folder, such as ``step-100``: these files do not tell it."""
    folder = folder.absolute()
    match = _STEP.fullmatch(folder.parent.name if folder.name == SHARDED else folder.name)
    return int(match[1]) if match else None


def read_whole(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], FileRecord]:
    """Read a safetensors file; see ``read_safetensors``.

    Raises:
        FormatError: it may hold pieces of tensors: torch marks all of its files, and names those of whole tensors.
    """
    tensors, metadata, record = read_safetensors(path)
    if _PLACES not in metadata:
        return tensors, metadata, record
    if not _WHOLE.fullmatch(path.name) or any(map(any, _offsets(path, record, metadata))):
        raise FormatError(
            f"{path} is of torch.distributed.checkpoint, and may hold what one process has saved of a model: give all "
            "files of the save the names that torch gave them, and import their folder"
        )
    return tensors, metadata, record


def read_shards(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Return the whole tensors of the files of all processes.

    Raises:
        FormatError: one is not a safetensors file.
        CorruptError: one is missing, cut short or damaged, or the pieces do not fit together.
    """
    _check_numbers(files)
    contents = [_pieces(file) for file in files]
    tensors: dict[str, torch.Tensor] = {}
    try:
        stored = tensors_of_files([record for _, record in contents])
    except CorruptError as error:
        raise CorruptError(f"{files[0].parent} is incomplete or damaged: {error}; {_ALL_FILES}") from error
    for pieces, record in contents:
        tensors |= joined(stored, record, pieces, tensors)
    return tensors


def check_shapes(
    files: Sequence[Path], tensors: Mapping[str, torch.Tensor], consolidated: Mapping[str, torch.Tensor]
) -> None:
    """Compare what is whole of these files with what torch has consolidated of them, where only the shapes are sure.

    Raises:
        CorruptError: a file is missing, or they are not of one save.
    """
    for name, tensor in consolidated.items():
        shape = tuple(tensors[name].shape) if name in tensors else "nothing"
        if shape != tuple(tensor.shape):
            raise CorruptError(
                f"{files[0].parent} lacks a file, or is of another save than what torch has consolidated: {name!r} is "
                f"{shape} in {_names(files)}, and {tuple(tensor.shape)} there; {_ALL_FILES}, or move the shards away "
                "to import what was consolidated, where scalars are 0"
            )


def _check_numbers(files: Sequence[Path]) -> None:
    """Refuse a folder whose files are not numbered without a gap."""
    matches = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    if len({match["count"] for match in matches}) > 1:
        raise CorruptError(f"{files[0].parent} has files of several saves ({_names(files)}): {_ALL_FILES}")
    processes = {int(match["process"]) for match in matches}
    numbers = {int(match["file"]) for match in matches}
    process = next(number for number in itertools.count(1) if number not in processes)
    number = next(number for number in itertools.count(1) if number not in numbers)
    count = matches[0]["count"]
    lacking = f"shard-{process:05}-model-*-of-{count}" if process < max(processes) else ""
    lacking = f"shard-*-model-{number:05}-of-{count}" if number <= int(count) else lacking
    if lacking:
        raise CorruptError(
            f"{files[0].parent} lacks {lacking}.safetensors: {_ALL_FILES}; if nothing was to be saved in it, number "
            "the others without a gap"
        )


def _pieces(file: Path) -> tuple[dict[str, torch.Tensor], FileRecord]:
    """Return what one process has of the tensors, and a record of where it belongs."""
    with file.open("rb") as stream:
        if stream.read(2) == b"PK":
            raise FormatError(
                f"{file} begins with values that are no tensors, which torch writes in front of the header, so that "
                "nothing can read the file: save tensors only"
            )
    try:
        tensors, metadata, record = read_safetensors(file)
    except (CorruptError, FormatError) as error:
        raise type(error)(f"{error}; {_ALL_FILES}") from error
    return tensors, replace(record, offsets=_offsets(file, record, metadata))


def _offsets(file: Path, record: FileRecord, metadata: Mapping[str, str]) -> tuple[tuple[int, ...], ...]:
    """Return where the pieces in a file begin, in the order of its tensors."""
    try:
        places = msgspec.json.decode(metadata.get(_PLACES, "").encode(), type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, RecursionError, UnicodeEncodeError) as error:
        raise CorruptError(
            f"{file} does not say in {_PLACES} where its tensors belong: {error}; {_ALL_FILES}"
        ) from error
    offsets = []
    for tensor in record.tensors:
        try:
            begins = msgspec.json.decode(places.get(tensor.name, b"{}"), type=_PiecePlace).saved_offsets
        except (msgspec.MsgspecError, RecursionError) as error:
            raise CorruptError(f"{file} does not say where {tensor.name!r} belongs: {error}; {_ALL_FILES}") from error
        ends = [*map(sum, zip(begins, tensor.shape, strict=False))]
        if len(begins) != len(tensor.shape) or not is_possible(ends):
            raise CorruptError(
                f"{file} has {tensor.name!r} of shape {tensor.shape} at {begins}, which cannot be; {_ALL_FILES}"
            )
        offsets.append(begins)
    return tuple(offsets)


def _names(files: Sequence[Path]) -> str:
    names = [file.name for file in files]
    return ", ".join([*names[:_MOST_NAMES], *(["..."] if len(names) > _MOST_NAMES else [])])
