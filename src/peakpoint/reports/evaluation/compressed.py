"""Compressed against original: what a checkpoint is, weighs and takes, beside another."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from peakpoint.format.manifest import Manifest
from peakpoint.format.masks import masks_of
from peakpoint.format.names import no_part
from peakpoint.format.shards import StoredTensor, stored_tensors
from peakpoint.reports.evaluation.noise import Interval
from peakpoint.reports.evaluation.peaks import Examples, noise_of
from peakpoint.reports.evaluation.run_data import RunData, ref_of
from peakpoint.rules import Mode

_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "C64"})
_NORMAL_95 = 1.959964


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What one checkpoint weighs.

    Attributes:
        ref: which checkpoint.
        part: the part that was looked at.
        parameters: elements of the part's floating-point tensors; masks of ``torch.nn.utils.prune`` are none.
        nonzero: those that are not zero; None when nothing says.
        source: where ``nonzero`` comes from, in words.
        part_bytes: bytes of the part's tensors.
        sparse_bytes: an estimate of what the part would take with a bit for each element and the values that are not
            zero; never more than ``part_bytes``; None when ``nonzero`` is.
        files_bytes: bytes of all files of the checkpoint.
        packed_bytes: bytes in the archive; None when it is not archived.
        metrics: all that is known.
    """

    ref: str
    part: str
    parameters: int
    nonzero: int | None
    source: str
    part_bytes: int
    sparse_bytes: int | None
    files_bytes: int
    packed_bytes: int | None
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricChange:
    """One metric of two checkpoints.

    Attributes:
        metric: its name.
        mode: its direction; None when it was not said.
        original: the value there.
        compressed: the value there.
        interval: of compressed less original, 95 %; None when the noise is not known.
        source: where the noise comes from; "" when it is not known.
    """

    metric: str
    mode: Mode | None
    original: float
    compressed: float
    interval: Interval | None
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedComparison:
    """Two checkpoints side by side.

    Attributes:
        why: why these two.
        original: the one that is compared with.
        compressed: the other.
        differences: of every metric that both have.
    """

    why: str
    original: ModelSize
    compressed: ModelSize
    differences: tuple[MetricChange, ...]


RunCheckpoint = tuple[RunData, Manifest]


class CheckpointPair(NamedTuple):
    """Two checkpoints to be compared, and why these two."""

    why: str
    original: RunCheckpoint
    compressed: RunCheckpoint

    def has_part(self, part: str) -> bool:
        """Return whether both have a part."""
        return all(part in checkpoint.parts for _, checkpoint in (self.original, self.compressed))


def compare_compressed(
    pair: CheckpointPair, modes: Mapping[str, Mode], examples: Examples, *, part: str, sparsity: str
) -> CompressedComparison:
    """Put two checkpoints side by side.

    Args:
        modes: directions of metrics, as far as they are known.
        examples: what is known of the evaluation.
        part: the part to weigh.
        sparsity: the metric that holds the sparsity.

    Raises:
        NotFoundError: a checkpoint has no such part.
    """
    shared = [name for name in pair.original[1].metrics if name in pair.compressed[1].metrics]
    return CompressedComparison(
        why=pair.why,
        original=_model_size(*pair.original, part, sparsity),
        compressed=_model_size(*pair.compressed, part, sparsity),
        differences=tuple(_change(name, pair, modes.get(name), examples) for name in shared),
    )


def _change(metric: str, pair: CheckpointPair, mode: Mode | None, examples: Examples) -> MetricChange:
    sides = (pair.original, pair.compressed)
    values = [checkpoint.metrics[metric] for _, checkpoint in sides]
    change = MetricChange(metric=metric, mode=mode, original=values[0], compressed=values[1], interval=None, source="")
    if mode is None or not all(map(math.isfinite, values)):
        return change
    first, second = (noise_of(run, metric, mode, (checkpoint.report,), examples) for run, checkpoint in sides)
    if first is None or second is None:
        return change
    reach, difference = _NORMAL_95 * math.hypot(first.se, second.se), values[1] - values[0]
    interval = Interval(difference=difference, low=difference - reach, high=difference + reach, confidence=0.95)
    source = f"{first.source} (original) and {second.source} (compressed)"
    return replace(change, interval=interval, source=first.source if first.source == second.source else source)


def _model_size(run: RunData, manifest: Manifest, part: str, sparsity: str) -> ModelSize:
    """Weigh a part of a checkpoint.

    Raises:
        NotFoundError: there is no such part.
    """
    if part not in manifest.parts:
        raise no_part(part, manifest.parts, where=ref_of(manifest))
    tensors = list(stored_tensors(manifest, part).values())
    masks = masks_of({tensor.name: tensor.shape for tensor in tensors})
    values = [tensor for tensor in tensors if tensor.name not in masks.values()]
    floats = [tensor for tensor in values if tensor.dtype in _FLOATS]
    parameters = sum(math.prod(tensor.shape) for tensor in floats)
    nonzero, sparse_bytes, source = None, None, f"not known: no metric {sparsity}"
    recorded = manifest.metrics.get(sparsity, math.nan)
    if 0 <= recorded <= 1:
        nonzero = round(parameters * (1 - recorded))
        source = f"if the recorded {sparsity} is that of all parameters"
        # a bit for each element and the values that are not zero; as it is where that is no smaller
        dense_bytes = _bytes_of(floats)
        packed_bytes = math.ceil(parameters / 8) + round(dense_bytes * nonzero / parameters) if parameters else 0
        sparse_bytes = _bytes_of(values) - dense_bytes + min(dense_bytes, packed_bytes)
    return ModelSize(
        ref=ref_of(manifest),
        part=part,
        parameters=parameters,
        nonzero=nonzero,
        source=source,
        part_bytes=_bytes_of(tensors),
        sparse_bytes=sparse_bytes,
        files_bytes=manifest.size_bytes,
        packed_bytes=run.packed.get(manifest.id),
        metrics=manifest.metrics,
    )


def _bytes_of(tensors: Iterable[StoredTensor]) -> int:
    return sum(tensor.size_bytes for tensor in tensors)
