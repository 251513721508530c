"""Distances between the values of two checkpoints, tensor by tensor."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from peakpoint.format.manifest import Manifest
from peakpoint.format.shards import StoredTensor
from peakpoint.reports.diff import (
    CheckpointDifference,
    Distance,
    TensorDifference,
    diff_manifests,
    diff_plain_values,
    tensors_of,
)
from peakpoint.repository import reader
from peakpoint.repository.root import open_repository
from peakpoint.state.shards import read_tensor
from peakpoint.state.shared_storage import TORCH_DTYPES
from peakpoint.store import Chunk, Store

_BLOCK = 1 << 18  # elements compared at a time, in double precision: a few megabytes


def diff(
    a: str,
    b: str,
    *,
    root: str | os.PathLike[str] | Store,
    progress: Callable[[int], None] = lambda _: None,
) -> CheckpointDifference:
    """Compare two checkpoints of a repository, and measure how far the values of their tensors are apart.

    Tensors with the same digest are not read. Of the others, two are in memory at a time, and each is compared with its
    digest. ``peakpoint.reports.diff.diff_records`` says everything but the values, without torch.

    Args:
        a: the ref of the first, such as ``"resnet50@best:val_accuracy"``.
        b: the ref of the second, of the same run or another.
        progress: called with the bytes of each tensor once it is compared.

    Raises:
        NotFoundError: no such run or checkpoint.
        CorruptError: a tensor is damaged; the message names it.

    Example:
        >>> import tempfile, torch, peakpoint as pp
        >>> root, weight = tempfile.mkdtemp(), torch.tensor([3.0, 4.0])
        >>> with pp.Checkpointer(root, run="r", state={"weight": weight}, keep=[pp.Last(2)]) as ckpt:
        ...     for epoch in ckpt.epochs(2):
        ...         _ = weight.add_(torch.tensor([0.0, 0.5]))
        ...         _ = ckpt.report()
        >>> tensor = pp.diff("r:epoch=0", "r:epoch=1", root=root).tensors[0]
        >>> isinstance(pp.diff("r:epoch=0", "r:epoch=0", root=root), CheckpointDifference)
        True
        >>> tensor.what, tensor.distance.l2, tensor.distance.largest, tensor.distance.changed
        ('values', 0.5, 0.5, 1)
    """
    repository = open_repository(root)
    first, second = repository.find_manifest(a), repository.find_manifest(b)
    return with_distances(repository.store, first, second, diff_manifests(repository, first, second), progress)


def with_distances(
    store: Store, first: Manifest, second: Manifest, difference: CheckpointDifference, progress: Callable[[int], None]
) -> CheckpointDifference:
    """Add the distances of all tensors, and plain values; see ``diff``."""
    of_first, of_second = dict(tensors_of(first)), dict(tensors_of(second))
    tensors: list[TensorDifference] = []
    same_tensors: list[TensorDifference] = []
    with reader.hold_all(store, (first, second)):
        for tensor in difference.tensors:
            between = None
            if tensor.what in {"dtype", "values"}:
                key = (tensor.part, tensor.name)
                between = distance(*_read(store, first, of_first[key]), *_read(store, second, of_second[key]))
                progress(tensor.bytes)
            same_bits = between is not None and between.changed == 0  # they were saved in other shards
            (same_tensors if same_bits else tensors).append(replace(tensor, distance=between))
        plain, same_generators = diff_plain_values(store, first, second)
    same_bytes = sum(tensor.bytes for tensor in same_tensors)
    return replace(
        difference,
        tensors=tuple(sorted(tensors, key=_order)),
        same_tensors=difference.same_tensors + len(same_tensors),
        same_bytes=difference.same_bytes + same_bytes,
        changed_bytes=difference.changed_bytes - same_bytes,
        plain=plain,
        generators_same=same_generators,
    )


def _order(tensor: TensorDifference) -> tuple[bool, float]:
    """Sort tensors that cannot be compared first, then by relative change."""
    return (tensor.distance is not None, -tensor.distance.relative if tensor.distance else 0.0)


def _read(store: Store, manifest: Manifest, stored: StoredTensor) -> tuple[Chunk, str]:
    octets = read_tensor(store, manifest, stored).reshape(-1).view(torch.uint8)
    return memoryview(octets.numpy()), stored.dtype  # type: ignore[arg-type] # is a buffer


class _Values:
    """Elements in double precision, a block at a time."""

    def __init__(self, data: Chunk, dtype: str) -> None:
        self._data, self._dtype = memoryview(data).cast("B"), TORCH_DTYPES[dtype]
        self.count = len(self._data) // self._dtype.itemsize

    def block(self, begin: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values from ``begin`` on, and their bytes, a row for each element."""
        width = self._dtype.itemsize
        raw = bytearray(self._data[begin * width : (begin + _BLOCK) * width])
        flat = torch.frombuffer(raw, dtype=self._dtype)
        values = torch.view_as_real(flat) if flat.is_complex() else flat.unsqueeze(1)
        return values.to(torch.float64), torch.frombuffer(raw, dtype=torch.uint8).view(-1, width)


def distance(a: Chunk, a_dtype: str, b: Chunk, b_dtype: str) -> Distance:
    """Measure how far the values of two tensors of the same shape are apart; see ``Distance``.

    Args:
        a: the bytes of the first, little-endian.
        a_dtype: its element type, as safetensors calls it.
        b: the bytes of the second.
        b_dtype: its element type.

    Example:
        >>> import struct
        >>> apart = distance(struct.pack("<2f", 1, 0), "F32", struct.pack("<2f", 0, 0), "F32")
        >>> apart.relative, apart.cosine, apart.zeros
        (1.0, None, (0.5, 1.0))
    """
    first, second = _Values(a, a_dtype), _Values(b, b_dtype)
    totals = _Totals()
    for begin in range(0, first.count, _BLOCK):
        totals.add(first.block(begin), second.block(begin), bits=a_dtype == b_dtype)
    return totals.distance(first.count, bits=a_dtype == b_dtype)


class _Totals:
    """Sums over the blocks. Norms are added with ``hypot``, so that squares of large numbers do not overflow."""

    def __init__(self) -> None:
        self.norms = [0.0, 0.0]
        self.l2 = self.largest = 0.0
        self.dots: list[tuple[float, float, float]] = []  # the cosine of a block, with the norms of both
        self.changed = 0
        self.zeros = [0, 0]
        self.not_finite = [0, 0]

    def add(self, a: tuple[Any, Any], b: tuple[Any, Any], *, bits: bool) -> None:
        """Take a block into account."""
        values = [a[0], b[0]]
        if bits:
            self.changed += int((a[1] != b[1]).any(dim=1).sum())
        if values[0].shape != values[1].shape:  # one is complex, the other is not
            values = [torch.nn.functional.pad(block, (0, 2 - block.shape[1])) for block in values]
        finite = [torch.isfinite(block).all(dim=1) for block in values]
        for number, block in enumerate(values):
            self.zeros[number] += int((block == 0).all(dim=1).sum())
            self.not_finite[number] += int((~finite[number]).sum())
        finite_rows = finite[0] & finite[1]
        first, second = (block[finite_rows].reshape(-1) for block in values)
        norms = _norm(first), _norm(second)
        self.norms = [math.hypot(total, new) for total, new in zip(self.norms, norms, strict=True)]
        change = second - first
        self.l2 = math.hypot(self.l2, _norm(change))
        self.largest = max(self.largest, float(change.abs().max()) if len(change) else 0.0)
        if all(norms):
            self.dots.append((_cosine(first, second), *norms))

    def distance(self, count: int, *, bits: bool) -> Distance:
        """Return the distance over all blocks."""
        norm, norm_2 = self.norms
        cosine = None
        if norm and norm_2 and math.isfinite(norm) and math.isfinite(norm_2):
            cosine = math.fsum(
                cos * (norm_of_block / norm) * (norm_2_of_block / norm_2)
                for cos, norm_of_block, norm_2_of_block in self.dots
            )
            cosine = max(-1.0, min(1.0, cosine))
        relative = self.l2 / norm if norm else (math.inf if self.l2 else 0.0)
        return Distance(
            norm=norm,
            l2=self.l2,
            relative=relative,
            largest=self.largest,
            cosine=cosine,
            changed=self.changed if bits else None,
            zeros=(self.zeros[0] / count if count else 0.0, self.zeros[1] / count if count else 0.0),
            not_finite=(self.not_finite[0], self.not_finite[1]),
        )


def _cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the cosine of vectors, scaled first: norms of the smallest numbers have no digits to divide by."""
    units = [values / values.abs().max() for values in (first, second)]
    return float(torch.dot(*units) / (torch.linalg.vector_norm(units[0]) * torch.linalg.vector_norm(units[1])))


def _norm(values: torch.Tensor) -> float:
    largest = float(values.abs().max()) if len(values) else 0.0
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(values / largest))
