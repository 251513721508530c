"""What is not read: files and folders of other kinds, by name or first bytes, and the way there."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from peakpoint.format.layout import REPOSITORY, STATE
from peakpoint.format.manifest import MANIFEST

_ARRAYS = "torch.save({'model': {name: torch.from_numpy(array), ...}}, FILE.pth)"
_KERAS = ("a file of Keras", f"load it with Keras and save its arrays: {_ARRAYS}")
_HDF5 = ("an HDF5 file, as Keras writes them", _KERAS[1])
_NPZ = ("arrays of NumPy", f"numpy.load(FILE) has them: {_ARRAYS}")
_PROGRAM = ("a program of torch.export", "torch.save({'model': torch.export.load(FILE).state_dict}, FILE.pth)")
_GGUF = (
    "a GGUF file of llama.cpp",
    "transformers reads it by from_pretrained(FOLDER, gguf_file=NAME) and writes a folder by save_pretrained()",
)
_GRAPH = ("a graph for inference ({})", "import the checkpoint from which it was exported")
_TENSORFLOW = ("a TensorFlow checkpoint", f"tf.train.load_checkpoint(PREFIX) has its arrays: {_ARRAYS}")
_ORBAX = ("a checkpoint of Orbax (JAX)", f"load it with orbax.checkpoint and save its arrays: {_ARRAYS}")
_FLAX = ("a file of Flax (JAX)", f"load it with Flax and save its arrays: {_ARRAYS}")
_RANK = (
    "what one rank has saved of a sharded model or optimizer",
    "save with FULL_STATE_DICT or SHARDED_STATE_DICT, which are read",
)
_SHARD = (
    "one of the shards of a model",
    "import the folder that holds all of them, under names such as model-00001-of-00002.safetensors",
)
_PROCESS = ("what one process has saved of a model", "import its folder, with the files of all processes")
_OWN = (
    "what one process has saved of a checkpoint in a run of Peakpoint",
    "peakpoint export takes the checkpoint out as a file",
)
_BY_NAME = {  # the first that matches counts
    r".*\.keras": _KERAS,
    r".*\.(h5|hdf5)": _HDF5,
    r".*\.npz": _NPZ,
    r".*\.pt2": _PROGRAM,
    r".*\.gguf|.*\.ggml": _GGUF,
    **{
        rf".*\.{suffix}": (_GRAPH[0].format(name), _GRAPH[1])
        for suffix, name in {
            "onnx": "ONNX",
            "tflite": "TensorFlow Lite",
            "mlmodel": "Core ML",
            "(engine|plan|trt)": "TensorRT",
        }.items()
    },
    r".*\.data-\d{5}-of-\d{5}|saved_model\.pb": _TENSORFLOW,
    r"_CHECKPOINT_METADATA|manifest\.ocdbt|.*\.orbax-checkpoint.*": _ORBAX,
    r".*\.msgpack": _FLAX,
    r".*\.(pdparams|pdopt)": ("a file of PaddlePaddle", f"paddle.load(FILE) has its arrays: {_ARRAYS}"),
    r".*\.nemo": ("an archive of NeMo", "unpack it with tar, and import its model_weights.ckpt"),
    r".*\.distcp": ("a piece of a folder of torch.distributed.checkpoint", "the folder lacks its .metadata"),
    r"(pytorch_model_fsdp|optimizer).*_rank\d+\.bin": _RANK,
    r"shard-\d+-model-\d+-of-\d+\.safetensors": _PROCESS,
    r".*\+rank\d+\.safetensors": _OWN,
    r".*-\d+-of-0*(?:[2-9]|[1-9]\d+)\.(?:safetensors|bin)": _SHARD,
}
_PIECES = (_RANK, _PROCESS, _OWN, _SHARD)
_BY_BEGINNING = {b"\x89HDF\r\n\x1a\n": _HDF5, b"GGUF": _GGUF}


def is_piece(path: Path) -> bool:
    """Whether a file has the name of a piece of a checkpoint, which is none by itself."""
    return _kind_by_name(path) in _PIECES


def kind_of(path: Path) -> str | None:
    """Say what a file or folder is that is not read, and what to do; None of one that has no known name."""
    of_peakpoint = kind_of_peakpoint(path)
    if of_peakpoint is not None:
        return of_peakpoint
    kind = _kind_by_name(path)
    return None if kind is None else _sentence(path.name, kind)


def _kind_by_name(path: Path) -> tuple[str, str] | None:
    kinds = (kind for pattern, kind in _BY_NAME.items() if re.fullmatch(pattern, path.name, re.IGNORECASE))
    return next(kinds, None)


def kinds_of(paths: Sequence[Path]) -> list[str]:
    """Return a sentence for each kind among paths, with the first of its files."""
    sentences: dict[str, str] = {}
    for path in paths:
        sentence = kind_of(path)
        if sentence is not None:
            sentences.setdefault(sentence.removeprefix(path.name), sentence)
    return list(sentences.values())


def kind_by_beginning(name: str, beginning: bytes) -> str | None:
    """Say what a file is, by its first bytes."""
    kinds = (kind for magic, kind in _BY_BEGINNING.items() if beginning.startswith(magic))
    return next((_sentence(name, kind) for kind in kinds), None)


def kind_of_archive(name: str, members: Collection[str]) -> str | None:
    """Say what a zip archive is, by the names in it."""
    if members and all(member.endswith(".npy") for member in members):
        return _sentence(name, _NPZ)
    if {"metadata.json", "config.json"} <= set(members):
        return _sentence(name, _KERAS)
    program = any(
        member.rpartition("/")[2] in {"archive_format", "serialized_exported_program.json"} for member in members
    )
    return _sentence(name, _PROGRAM) if program else None


def _sentence(name: str, kind: tuple[str, str]) -> str:
    description, advice = kind
    return f"{name} is {description}, which is not read: {advice}"


def kind_of_peakpoint(path: Path) -> str | None:
    """Say what a folder of Peakpoint's own is, and what to do; None of any other."""
    if (path / REPOSITORY).is_file():
        return (
            f"{path} is a repository of Peakpoint: its runs need no import. To have one in another repository, too, "
            "copy its folder from runs/ to the other's runs/; peakpoint export takes a checkpoint out as a file"
        )
    if (path / "run.json").is_file() and any((path / name).is_dir() for name in ("journal", "checkpoints")):
        return (
            f"{path} is a run of Peakpoint, which needs no import: copy the folder to ROOT/runs/{path.name} while "
            "nothing writes to it; peakpoint export takes a checkpoint out as a file"
        )
    if (path / MANIFEST).is_file() and (path / STATE).is_file():
        return (
            f"{path} is a checkpoint in a run of Peakpoint: copy the whole run to ROOT/runs, or take the checkpoint "
            "out with peakpoint export and import that file"
        )
    return None
