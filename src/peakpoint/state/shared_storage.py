"""Tensors that share memory: stored once, and tied together again when they come back.

Tied weights are the same region of memory under several names. Views of one storage may also overlap in part; then the
bytes below all of them are stored, and each is described as a view of those.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from peakpoint.errors import ConfigError

# Every element type that the safetensors format and torch share. Source: safetensors 0.8, torch.py, _TYPES.
DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

TensorEntry = tuple[str, torch.Tensor, dict[str, Any]]
"""The name that a tensor would have, its values, and its node in the tree."""


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first and one-past-last byte in the storage."""
    size = tensor.element_size()
    begin = int(tensor.storage_offset()) * size
    last = sum((int(n) - 1) * int(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + size * (1 + last)


def _disjoint(tensors: list[torch.Tensor]) -> bool:
    """Return whether no two overlap, as far as a quick look can tell: the usual case."""
    places = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors)
    separate = all(begin + size <= next_begin for (begin, size), (next_begin, _) in itertools.pairwise(places) if size)
    return separate and all(tensor.is_contiguous() for tensor in tensors)


def clusters(entries: list[TensorEntry]) -> Iterator[list[TensorEntry]]:
    """Group the tensors that overlap in memory; most groups have one member."""
    if _disjoint([entry[1] for entry in entries]):
        yield from ([entry] for entry in entries)
        return
    by_storage: dict[tuple[torch.device | None, int], list[TensorEntry]] = {}
    for number, entry in enumerate(entries):
        tensor = entry[1]
        key = (tensor.device, tensor.untyped_storage().data_ptr()) if tensor.numel() else (None, -number - 1)
        by_storage.setdefault(key, []).append(entry)
    for group in by_storage.values():
        if len(group) == 1:
            yield group
            continue
        cluster: list[TensorEntry] = []
        end = -1
        for entry in sorted(group, key=lambda entry: _extent(entry[1])):
            first, last = _extent(entry[1])
            if cluster and first >= end:
                yield cluster
                cluster, end = [], -1
            cluster.append(entry)
            end = max(end, last)
        yield cluster


def _geometry(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()


def store_cluster(cluster: list[TensorEntry], tensors: dict[str, torch.Tensor], new_name: Callable[[str], str]) -> None:
    """Add the tensor to store for a cluster to ``tensors``, and complete the nodes that refer to it.

    Args:
        cluster: tensors that overlap in memory.
        new_name: makes a name that no tensor of this file has.

    Raises:
        ConfigError: a lazy conjugate shares memory with other tensors.
    """
    name, tensor, _ = cluster[0]
    if len(cluster) == 1 or len({_geometry(entry[1]) for entry in cluster}) == 1:
        tensors[name] = tensor
        for _, _, node in cluster:
            node["name"] = name
            if not tensor.is_contiguous() and is_dense(tensor.shape, tensor.stride()):
                node["stride"] = list(tensor.stride())
        return
    begin = min(_extent(entry[1])[0] for entry in cluster)
    end = max(_extent(entry[1])[1] for entry in cluster)
    covering = [entry for entry in cluster if _covers(entry[1], cluster, begin, end)]
    if covering:
        base_name, base, _ = covering[0]
    else:  # no tensor covers the others: store the bytes below all of them
        begin -= begin % 16  # so that views of every element type stay aligned
        base_name = new_name(f"{name}.storage")
        # NumPy arrays of one memory are storages of different sizes
        storage = max((entry[1].untyped_storage() for entry in cluster), key=lambda storage: storage.nbytes())
        base = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, begin, (end - begin,), (1,))
    tensors[base_name] = base
    for own_name, view, node in cluster:
        node["name"] = base_name
        if own_name != base_name:
            node["view"] = {
                "dtype": DTYPES[view.dtype],
                "offset": view.storage_offset() * view.element_size() - begin,
                "shape": list(view.shape),
                "stride": list(view.stride()),
            }
            if view.is_conj() or view.is_neg():
                raise ConfigError(
                    f"tensor {own_name!r} is a lazy conjugate of another tensor in the state; .clone() it"
                )


def _covers(tensor: torch.Tensor, cluster: list[TensorEntry], begin: int, end: int) -> bool:
    plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return plain and _extent(tensor) == (begin, end) and all(entry[1].dtype == tensor.dtype for entry in cluster)


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether these strides put the elements of this shape side by side, in some order."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
