"""What one checkpoint will take: from a count of parameters, from a live state, or from checkpoints that exist.

Live objects are known by what they offer (``state_dict``, ``param_groups``, ``numel``): nothing here needs torch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from peakpoint.errors import ConfigError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.manifest import Manifest
from peakpoint.reports.plan.networks import Architecture
from peakpoint.reports.plan.optimizers import STEP, bytes_of, needs_shapes, optimizer_state

_PAGE = 4096
_METADATA = {"__metadata__": {"format": "pt", "written_by": "peakpoint"}}

# Of state.json, measured: the generators of Python and NumPy have 625 words of 4 bytes each and torch's 5056 bytes, all
# in base64; every tensor has a node of about 75 bytes. tests/reports/test_plan.py compares both with a real save.
GENERATORS = 13_650
NODE = 75
_WORTH_A_FILE = 64 * 1024  # see peakpoint.state.unchanged


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a checkpoint.

    Attributes:
        name: as in the state; ``rest`` for what stands in ``state.json``.
        bytes: of its files.
        frozen: how many of these stand in a file that does not change, and is written once.
        why: where the number comes from.
    """

    name: str
    bytes: int
    frozen: int = 0
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """One checkpoint.

    Attributes:
        parts: its parts in their order, the rest last.
        bfloat16: whether all of its weights and moments are, for the archive.
        source: what was looked at.
        stall: seconds that the loop stood still for a save, if it was measured; without the wait for the save before,
            which depends on how often a run saves.
        durable: seconds until a save was durable, if it was measured.
    """

    parts: tuple[Part, ...]
    bfloat16: bool
    source: str
    stall: float | None = None
    durable: float | None = None

    @property
    def bytes(self) -> int:
        """Of a whole checkpoint."""
        return sum(part.bytes for part in self.parts)


REST = "rest"


def _rest(tensors: int) -> Part:
    why = f"the random generators take {GENERATORS / 1e3:.1f} kB, and about {NODE} bytes describe each tensor"
    return Part(name=REST, bytes=GENERATORS + NODE * tensors, why=why)


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    bytes: int


def _file(tensors: Sequence[_Tensor]) -> int:
    """Bytes of a safetensors file: the header, padded to pages, and the data."""
    if not tensors:
        return 0
    header: dict[str, Any] = dict(_METADATA)
    end = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": (end, end + tensor.bytes)}
        end += tensor.bytes
    return end + -(-(8 + len(msgspec.json.encode(header))) // _PAGE) * _PAGE


def check_whole(name: str, value: object) -> None:
    """Refuse what is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")


# --- from a count, or from an architecture ------------------------------------------------------------------------


def from_count(parameters: int, *, optimizer: str, dtype: str = "float32", master: str | None = None) -> Sizes:
    """Of a model of which only the number of parameters is known.

    Args:
        parameters: how many there are.
        optimizer: see ``peakpoint.reports.plan.optimizers.optimizer_state``.
        dtype: of the weights; of the moments as well, unless there is a ``master``.
        master: of a second copy of the weights that the optimizer keeps, and of the moments: ``"float32"`` in training
            with weights of 16 bits.

    Raises:
        ConfigError: an optimizer or a dtype that is not known, no parameters, or an optimizer whose state depends on
            the shapes.

    Example:
        >>> sizes = from_count(25_600_000, optimizer="adamw")
        >>> [(part.name, part.bytes) for part in sizes.parts]
        [('model', 102404096), ('optimizer', 204804100), ('rest', 13950)]
    """
    check_whole("parameters", parameters)
    if needs_shapes(optimizer):
        raise ConfigError(f"what {optimizer} holds depends on the shapes: give a preset, or plan from the live state")
    return _foreseen([(parameters,)], (), optimizer, dtype, master, "")


def from_network(
    network: Architecture, *, optimizer: str | None = None, dtype: str | None = None, master: str | None = None
) -> Sizes:
    """Of a known architecture; by default in the element type and with the optimizer that are usual for it.

    Raises:
        ConfigError: as ``counted``.
    """
    chosen, element = optimizer or network.optimizer, dtype or network.dtype
    return _foreseen(network.shapes, network.norms, chosen, element, master, f"{network.title}, ")


def _foreseen(
    shapes: Sequence[tuple[int, ...]],
    norms: Sequence[int],
    optimizer: str,
    dtype: str,
    master: str | None,
    title: str,
) -> Sizes:
    width, moment = bytes_of(dtype), bytes_of(master or dtype)
    weights = [_Tensor(f"layers.{n}.weight", shape, width * math.prod(shape)) for n, shape in enumerate(shapes)]
    averages = [width for width in norms for _ in ("mean", "variance")]
    weights += [_Tensor(f"layers.{n}.running_mean", (width,), 4 * width) for n, width in enumerate(averages)]
    weights += [_Tensor(f"layers.{n}.batches", (), 8) for n in range(len(norms))]
    count = sum(map(math.prod, shapes))
    state = optimizer_state(optimizer, shapes)
    total = moment * (state.elements + (count if master else 0)) + STEP * state.scalars
    tensors = state.tensors + state.scalars + (len(shapes) if master else 0)
    named = [_Tensor(f"state.{n}.exp_avg_sq", (), total if n == 0 else 0) for n in range(tensors)]
    copies = state.elements / count
    copy = f"a copy of the weights in {master}" if master else ""
    why = f"{optimizer}: {copies:.3g} numbers of {moment} bytes for each parameter" + (copy and f", and {copy}")
    parts = [
        Part(name="model", bytes=_file(weights), why=f"{width} bytes a parameter" + (", buffers" if norms else "")),
        Part(name="optimizer", bytes=_file(named), why=why),
        _rest(len(weights) + tensors),
    ]
    return Sizes(
        parts=tuple(part for part in parts if part.bytes),
        bfloat16=dtype == "bfloat16" and master in {None, "bfloat16"},
        source=f"{title}{count:,} parameters in {dtype}, {optimizer}" + (copy and f", {copy}"),
    )


# --- from live objects --------------------------------------------------------------------------------------------


def from_state(state: Mapping[str, Any]) -> Sizes:
    """Of a training that has not begun: the state that would be given to ``Checkpointer``.

    What an optimizer will hold of parameters that it has not stepped on yet is foreseen from its class.

    Args:
        state: part name to live object.

    Raises:
        ConfigError: no state, or an optimizer without a first step whose class is not known.
    """
    if not isinstance(state, Mapping) or not state:
        raise ConfigError(f'state= takes a mapping of parts, such as {{"model": model}}, not {state!r}')
    stepped = {_place(parameter) for one in state.values() for parameter in _trained(one)}
    parts, count = [], 0
    dtypes: set[str] = set()
    for name, value in state.items():
        part, tensors = _live_part(name, value, stepped, dtypes)
        parts.append(part)
        count += tensors
    return Sizes(
        parts=(*parts, _rest(count)),
        bfloat16=bool(dtypes) and all("bfloat16" in dtype for dtype in dtypes),
        source="the live state",
    )


def _live_part(name: str, value: Any, stepped: set[tuple[int, int]], dtypes: set[str]) -> tuple[Part, int]:
    """One part, with the number of its tensors; the element types that it has are added to ``dtypes``."""
    given = value.state_dict() if callable(getattr(value, "state_dict", None)) else value
    once: dict[tuple[int, int], _Tensor] = {}  # tied weights are stored once
    for path, tensor in _tensors(given):
        once.setdefault(_place(tensor), _Tensor(path, tuple(tensor.shape), tensor.numel() * tensor.element_size()))
        if tensor.numel() > 1:
            dtypes.add(str(tensor.dtype))
    why = f"{len(once)} tensors of {type(value).__name__}"
    coming: list[_Tensor] = []
    still: set[tuple[int, int]] = set()
    if hasattr(value, "param_groups"):
        coming = list(_coming(value, dtypes))
        why += f", and {len(coming)} to come with the first step" if coming else ""
    elif stepped and callable(getattr(value, "parameters", None)):
        own = {_place(parameter) for parameter in value.parameters()}
        # a part of which nothing is trained may stand still or be an average that moves: the worse is assumed
        still = own - stepped if own & stepped else set()
    frozen = [tensor for place, tensor in once.items() if place in still]
    if sum(tensor.bytes for tensor in frozen) < _WORTH_A_FILE:
        still, frozen = set(), []
    moving = [*(tensor for place, tensor in once.items() if place not in still), *coming]
    part = Part(name=name, bytes=_file(moving) + _file(frozen), frozen=_file(frozen), why=why)
    return part, len(moving) + len(frozen)


def _trained(value: Any) -> Iterator[Any]:
    """The parameters of an optimizer."""
    for group in getattr(value, "param_groups", ()):
        yield from group["params"]


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if callable(getattr(value, "numel", None)) and callable(getattr(value, "element_size", None)):
        yield path, value
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from _tensors(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for number, child in enumerate(value):
            yield from _tensors(child, f"{path}.{number}")


def _place(tensor: Any) -> tuple[int, int]:
    """Where a tensor is in memory; an identity of its own for one that is nowhere (torch's device ``meta``)."""
    at = tensor.data_ptr() if callable(getattr(tensor, "data_ptr", None)) else 0
    return (at, tensor.numel() * tensor.element_size()) if at else (0, id(tensor))


def _coming(optimizer: Any, dtypes: set[str]) -> Iterator[_Tensor]:
    """The tensors that an optimizer will make at its first step, for the parameters that it has not stepped on."""
    have = getattr(optimizer, "state", {})
    number = -1
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            number += 1
            if have.get(parameter) or not getattr(parameter, "requires_grad", True):
                continue
            shape = tuple(parameter.shape)
            one = optimizer_state(type(optimizer).__name__, [shape], group)
            size = one.elements * parameter.element_size()
            dtypes.add(str(parameter.dtype))
            for n in range(one.tensors):
                yield _Tensor(f"state.{number}.exp_avg_{n}", shape, size if n == 0 else 0)
            for n in range(one.scalars):
                yield _Tensor(f"state.{number}.step_{n}", (), STEP)


# --- from checkpoints ---------------------------------------------------------------------------------------------


def from_manifests(manifests: Sequence[Manifest], run: str) -> Sizes:
    """Of a run that exists: the sizes of its newest whole checkpoint, and the times of all of them.

    Args:
        manifests: of the run, earliest first.
        run: its name.

    Raises:
        NotFoundError: it has no checkpoint.
    """
    if not manifests:
        raise NotFoundError(f"run {run!r} has no checkpoints yet: plan with --params, --preset or from the live state")
    most = max(len(one.parts) for one in manifests)
    newest = [one for one in manifests if len(one.parts) == most][-1]
    parts = []
    for part, names in newest.parts.items():
        if part in {"rng", "loop"}:
            continue
        files = [newest.file(name) for name in names]
        frozen = sum(file.size for file in files if file.shared or f"{part}+frozen." in file.name)
        why = f"{sum(len(file.tensors) for file in files)} tensors, as in {newest.name}"
        parts.append(Part(name=part, bytes=sum(file.size for file in files), frozen=frozen, why=why))
    rest = newest.size_bytes - sum(part.bytes for part in parts)
    parts.append(Part(name=REST, bytes=rest, why=f"{layout.STATE} of {newest.name}: random generators, plain values"))
    kinds = {tensor.dtype for file in newest.files for tensor in file.tensors if tensor.shape}
    stalls = [_sum(one.timing, "capture_seconds", "step_waited_seconds") for one in manifests]
    writes = [
        _sum(one.timing, "capture_seconds", "write_seconds") for one in manifests if "write_seconds" in one.timing
    ]
    return Sizes(
        parts=tuple(parts),
        bfloat16=kinds == {"BF16"},
        source=f"{newest.run}/{newest.name}",
        stall=sum(stalls) / len(stalls),
        durable=sum(writes) / len(writes) if writes else None,
    )


def stalled_seconds(manifest: Manifest) -> float:
    """Seconds that the loop stood still for a save in all, also for the save before it."""
    return _sum(manifest.timing, "waited_seconds", "capture_seconds", "step_waited_seconds")


def _sum(timing: Mapping[str, float], *names: str) -> float:
    return math.fsum(timing.get(name, 0.0) for name in names)
