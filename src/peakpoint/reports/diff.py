"""What differs between two checkpoints, from their manifests and journals: no weight file is opened, nothing is torch.

Tensors with the same digest are the same, so that all that has changed is known in milliseconds. How far the values of
the others are apart is for ``peakpoint.models.value_diff``.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import msgspec

from peakpoint.errors import FormatError
from peakpoint.format import layout
from peakpoint.format.events import Event, Opened, Saved
from peakpoint.format.manifest import Manifest
from peakpoint.format.settings import settings_of
from peakpoint.format.shards import StoredTensor, stored_tensors
from peakpoint.repository import reader
from peakpoint.repository.annotations import annotations_of, with_annotations
from peakpoint.repository.root import Repository
from peakpoint.rules import Mode, ranking_metrics
from peakpoint.rules import parse as parse_rule
from peakpoint.store import Store

TensorChange = Literal["only in a", "only in b", "shape", "dtype", "values"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffSide:
    """One of the two checkpoints.

    Attributes:
        ref: names it and no other.
        id: its identity.
        step: optimizer steps completed.
        epoch: from 0; None outside epochs.
        created_at: when it was taken.
        metrics: all that is known of it, also what was measured later.
        reasons: why it was saved.
        rules: in force when it was saved, in their text form.
        written_by: host, versions, the commit of the code.
        classes: part name to the class that was given for it; empty when the journal does not tell.
        settings: those under which it was saved, each as a text.
        size_bytes: of all its files.
    """

    ref: str
    id: str
    step: int
    epoch: int | None
    created_at: datetime
    metrics: Mapping[str, float]
    reasons: tuple[str, ...]
    rules: tuple[str, ...]
    written_by: Mapping[str, str]
    classes: Mapping[str, str]
    settings: Mapping[str, str]
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricDifference:
    """One metric of both.

    Attributes:
        name: the metric.
        a: its value in the first, None when it has none.
        b: its value in the second.
        mode: the direction, if the rules of either give one and do not contradict one another.
        better: which is better; None when that cannot be said, or both are equal.
    """

    name: str
    a: float | None
    b: float | None
    mode: Mode | None
    better: Literal["a", "b"] | None

    @property
    def change(self) -> float | None:
        """The second less the first."""
        return None if self.a is None or self.b is None else self.b - self.a


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far the values of two tensors are apart; computed in double precision.

    Pairs with a value that is not finite are counted in ``not_finite`` and left out of everything else. Of complex
    numbers both components count.

    Attributes:
        norm: the L2 norm of the first.
        l2: the L2 norm of the difference.
        relative: ``l2 / norm``; infinite when the first is zero and the second is not.
        largest: the largest absolute difference.
        cosine: of the angle between the two, from -1 to 1; None when one is zero.
        changed: how many elements have other bits; None when the element types differ.
        zeros: the fraction of exact zeros in the first and in the second.
        not_finite: how many elements of the first and of the second are NaN or infinite.
    """

    norm: float
    l2: float
    relative: float
    largest: float
    cosine: float | None
    changed: int | None
    zeros: tuple[float, float]
    not_finite: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """One tensor that is not the same in both.

    Attributes:
        part: the part.
        name: its name there.
        what: ``only in a``, ``only in b``, ``shape`` (of different shapes), ``dtype`` or ``values``.
        a: element type and shape in the first, None when it has none.
        b: in the second.
        bytes: of the larger of the two.
        distance: how far the values are apart; None when they were not read, or the shapes differ.
    """

    part: str
    name: str
    what: TensorChange
    a: tuple[str, tuple[int, ...]] | None
    b: tuple[str, tuple[int, ...]] | None
    bytes: int
    distance: Distance | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainDifference:
    """A plain value of the state that is not the same in both, such as a learning rate.

    Attributes:
        path: the part and the keys that lead to it, joined with dots.
        a: its value in the first, as text; None when it has none.
        b: in the second.
    """

    path: str
    a: str | None
    b: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDifference:
    """What differs between two checkpoints.

    Attributes:
        a: the first.
        b: the second.
        metrics: of both, by name.
        tensors: those that are not the same; by the largest relative change when values were read.
        same_tensors: how many are the same, bit for bit.
        same_bytes: bytes of these.
        changed_bytes: bytes of the others, of the larger where both have one.
        parts_only_in_a: names of parts.
        parts_only_in_b: names of parts.
        plain: values other than tensors; None when they were not read.
        generators_same: whether the random generators are in the same state; None when that was not read.
    """

    a: DiffSide
    b: DiffSide
    metrics: tuple[MetricDifference, ...]
    tensors: tuple[TensorDifference, ...]
    same_tensors: int
    same_bytes: int
    changed_bytes: int
    parts_only_in_a: tuple[str, ...]
    parts_only_in_b: tuple[str, ...]
    plain: tuple[PlainDifference, ...] | None = None
    generators_same: bool | None = None

    @property
    def identical(self) -> bool:
        """Whether the tensors are the same, and so is everything else that was read."""
        return not self.tensors and not self.plain


def diff_records(repository: Repository, a: str, b: str) -> CheckpointDifference:
    """Compare two checkpoints without opening a weight file.

    Args:
        a: the ref of the first.
        b: the ref of the second.

    Raises:
        NotFoundError: there is no such run or checkpoint.
        ConfigError: a ref that is none.

    Example:
        >>> import tempfile, peakpoint as pp
        >>> from peakpoint.reports.diff import diff_records
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"x": 1}, keep=[pp.Best("loss", "min"), pp.Last(2)]) as ckpt:
        ...     for epoch in ckpt.epochs(2):
        ...         _ = ckpt.report(loss=1.0 - epoch / 4)
        >>> difference = diff_records(pp.open(root), "r:epoch=0", "r:epoch=1")
        >>> difference.metrics[0].change, difference.metrics[0].better
        (-0.25, 'b')
    """
    return diff_manifests(repository, repository.find_manifest(a), repository.find_manifest(b))


def diff_manifests(repository: Repository, first: Manifest, second: Manifest) -> CheckpointDifference:
    """Do what ``diff_records`` does, for checkpoints that were read already."""
    a, b = _side(repository, first), _side(repository, second)
    a_tensors, b_tensors = (dict(tensors_of(side)) for side in (first, second))
    pairs = {key: (a_tensors.get(key), b_tensors.get(key)) for key in a_tensors | b_tensors}
    tensors = [difference for key, pair in pairs.items() if (difference := _tensor(key, *pair))]
    differing = {(tensor.part, tensor.name) for tensor in tensors}
    same_sizes = [tensor.size_bytes for key, tensor in a_tensors.items() if key not in differing]
    return CheckpointDifference(
        a=a,
        b=b,
        metrics=tuple(_metrics(a, b)),
        tensors=tuple(tensors),
        same_tensors=len(same_sizes),
        same_bytes=sum(same_sizes),
        changed_bytes=sum(tensor.bytes for tensor in tensors),
        parts_only_in_a=tuple(part for part in first.parts if part not in second.parts),
        parts_only_in_b=tuple(part for part in second.parts if part not in first.parts),
    )


_COUNTER = re.compile(r"(?:^|[._])(?:steps?|epochs?|iterations?|count|counter|num_batches_tracked)$")
_MOMENT = re.compile(r"(?:^|\.)state\.\d+\.")  # what an optimizer keeps of a parameter


def is_counter(name: str) -> bool:
    """Return whether a value or tensor counts steps or epochs, so that two checkpoints hardly ever agree in it.

    Example:
        >>> [is_counter(name) for name in ("scheduler.last_epoch", "state.0.step", "param_groups.0.lr")]
        [True, True, False]
    """
    return _COUNTER.search(name) is not None


def by_importance(tensors: Iterable[TensorDifference]) -> list[TensorDifference]:
    """Sort tensors: weights, then what optimizers keep of them, then counters; in each group as they were."""
    return sorted(tensors, key=lambda tensor: (is_counter(tensor.name), _MOMENT.search(tensor.name) is not None))


def tensors_of(manifest: Manifest) -> Iterator[tuple[tuple[str, str], StoredTensor]]:
    """Yield every stored tensor, with part and name before it.

    Raises:
        CorruptError: the shards of a tensor do not make a whole.
    """
    for part in manifest.parts:
        for name, tensor in stored_tensors(manifest, part).items():
            yield (part, name), tensor


def _tensor(key: tuple[str, str], a: StoredTensor | None, b: StoredTensor | None) -> TensorDifference | None:
    what: TensorChange
    if a is None or b is None:
        what = "only in b" if a is None else "only in a"
    elif a.shape != b.shape:
        what = "shape"
    elif a.dtype != b.dtype:
        what = "dtype"
    elif a.digest != b.digest:
        what = "values"
    else:
        return None
    return TensorDifference(
        part=key[0],
        name=key[1],
        what=what,
        a=None if a is None else (a.dtype, a.shape),
        b=None if b is None else (b.dtype, b.shape),
        bytes=max(tensor.size_bytes for tensor in (a, b) if tensor is not None),
    )


def _side(repository: Repository, manifest: Manifest) -> DiffSide:
    events = repository.run(manifest.run).events()
    all_opened = openings(events, manifest)
    opened = all_opened[-1:]
    return DiffSide(
        ref=f"{manifest.run}/{manifest.name}",
        id=manifest.id,
        step=manifest.step,
        epoch=manifest.epoch,
        created_at=manifest.created_at,
        metrics=with_annotations(manifest, annotations_of(events), {}).metrics,
        reasons=manifest.reasons,
        rules=opened[0].rules if opened else (),
        written_by=manifest.written_by,
        classes=opened[0].state if opened else {},
        settings=settings_of(all_opened).texts(),
        size_bytes=manifest.size_bytes,
    )


def openings(events: Iterable[Event], manifest: Manifest) -> list[Opened]:
    """Return how a run was opened before a checkpoint was saved; the last is by the process that saved it."""
    opened = []
    for event in events:
        if isinstance(event, Saved) and event.checkpoint == manifest.id:
            break
        if isinstance(event, Opened):
            if event.at > manifest.created_at:
                break  # the process that saved it was killed before it could record that
            opened.append(event)
    return opened


def _metrics(a: DiffSide, b: DiffSide) -> Iterator[MetricDifference]:
    pairs = set(ranking_metrics(parse_rule(text) for text in dict.fromkeys([*a.rules, *b.rules])))
    for name in dict.fromkeys([*a.metrics, *b.metrics]):
        modes = [mode for metric, mode in pairs if metric == name]
        mode = modes[0] if len(modes) == 1 else None
        first, second = a.metrics.get(name), b.metrics.get(name)
        better: Literal["a", "b"] | None = None
        if mode and first is not None and second is not None and first != second and math.isfinite(first + second):
            better = "a" if (first > second) == (mode == "max") else "b"
        yield MetricDifference(name=name, a=first, b=second, mode=mode, better=better)


# --- plain values -------------------------------------------------------------------------------------------------


def diff_plain_values(store: Store, first: Manifest, second: Manifest) -> tuple[tuple[PlainDifference, ...], bool]:
    """Compare the values of the state that are no tensors, and say whether the random generators are the same.

    Reads ``state.json`` of both, and compares it with its digest.

    Raises:
        CorruptError: it is missing or damaged.
        FormatError: it cannot be read.
    """
    shared = first.parts.keys() & second.parts.keys()  # a part that only one has is said once
    (a, a_generators), (b, b_generators) = (_plain_values(store, manifest, shared) for manifest in (first, second))
    differences = [
        PlainDifference(path=".".join(path), a=a.get(path), b=b.get(path))
        for path in a | b
        if a.get(path) != b.get(path)
    ]
    return tuple(differences), a_generators == b_generators


def _plain_values(store: Store, manifest: Manifest, parts: Collection[str]) -> tuple[dict[tuple[str, ...], str], Any]:
    """Return the plain values of some parts, and the state of the random generators."""
    file = next((file for file in manifest.files if file.name == layout.STATE), None)
    if file is None:
        raise FormatError(f"the manifest of {manifest.name} names no {layout.STATE}")
    try:
        record = msgspec.json.decode(reader.read(store, manifest, file))
        state, generators = dict(record["parts"]), record["rng"]
        return dict(
            _leaves({part: state[part] for part in manifest.parts if part in parts and part in state})
        ), generators
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"{layout.STATE} of {manifest.name} cannot be read: {error!r}") from error


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every value in a tree that is no tensor, as text; see docs/format.md, "state.json"."""
    tag = tree.get("$") if isinstance(tree, dict) else None
    inside = tree.get("v") if tag else tree
    if tag in {"tensor", "sharded"}:
        return
    if isinstance(inside, list) and tag == "dict":
        for key, child in inside:
            yield from _leaves(child, (*path, key if isinstance(key, str) else msgspec.json.encode(key).decode()))
    elif isinstance(inside, dict):
        for key, child in inside.items():
            yield from _leaves(child, (*path, key))
    elif isinstance(inside, list) and any(isinstance(child, dict | list) for child in inside):
        for number, child in enumerate(inside):
            yield from _leaves(child, (*path, str(number)))
    else:
        yield path, msgspec.json.encode(inside if tag and "v" in tree else tree).decode()
