"""The size of one checkpoint: from a count of parameters, from a live state, or from checkpoints that exist.

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
from peakpoint.format.names import OWN_PARTS
from peakpoint.format.shards import stored_tensors
from peakpoint.reports.plan.networks import Architecture
from peakpoint.reports.plan.optimizers import STEP, bytes_of, needs_shapes, optimizer_state

REST = "rest"
_PAGE = 4096
_METADATA = {"__metadata__": {"format": "pt", "written_by": "peakpoint"}}

# Of state.json, measured: the generators of Python and NumPy have 625 words of 4 bytes each and torch's 5056 bytes, all
# in base64; every tensor has a node of about 75 bytes. tests/reports/test_plan.py compares both with a real save.
GENERATORS = 13_650
NODE = 75
_WORTH_A_FILE = 64 * 1024  # see peakpoint.state.unchanged


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSize:
    """The size of one part of a checkpoint.

    Attributes:
        name: as in the state; ``rest`` for the content of ``state.json``.
        bytes: of its files.
        frozen: the bytes of these that do not change, and are written once.
        why: where the number comes from.
    """

    name: str
    bytes: int
    frozen: int = 0
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of one checkpoint.

    Attributes:
        parts: in their order, the rest last.
        bfloat16: whether all weights and moments are, which archives use.
        source: what the sizes are of.
        stall: seconds for which a save blocks the loop, if it was measured; without the wait for the save before,
            which depends on how often a run saves.
        durable: seconds until a save is durable, if it was measured.
    """

    parts: tuple[PartSize, ...]
    bfloat16: bool
    source: str
    stall: float | None = None
    durable: float | None = None

    @property
    def bytes(self) -> int:
        """The size of a whole checkpoint."""
        return sum(part.bytes for part in self.parts)


def _rest(tensors: int) -> PartSize:
    why = f"the random generators take {GENERATORS / 1e3:.1f} kB, and about {NODE} bytes describe each tensor"
    return PartSize(name=REST, bytes=GENERATORS + NODE * tensors, why=why)


@dataclass(frozen=True, slots=True)
class _SizedTensor:
    name: str
    shape: tuple[int, ...]
    bytes: int


def _file_bytes(tensors: Sequence[_SizedTensor]) -> int:
    """The size of a safetensors file: the header, padded to pages, and the data."""
    if not tensors:
        return 0
    header: dict[str, Any] = dict(_METADATA)
    end = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": (end, end + tensor.bytes)}
        end += tensor.bytes
    return end + -(-(8 + len(msgspec.json.encode(header))) // _PAGE) * _PAGE


def check_whole(name: str, value: object) -> None:
    """Refuse everything but a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")


# --- from a count, or from an architecture ------------------------------------------------------------------------


def from_count(parameters: int, *, optimizer: str, dtype: str = "float32", master: str | None = None) -> Sizes:
    """Estimate sizes from a parameter count alone.

    Args:
        parameters: how many.
        optimizer: see ``peakpoint.reports.plan.optimizers.optimizer_state``.
        dtype: of the weights; also of the moments, unless there is a ``master``.
        master: of a second copy of the weights that the optimizer keeps, and of the moments: ``"float32"`` in training
            with weights of 16 bits.

    Raises:
        ConfigError: an unknown optimizer or dtype, no parameters, or an optimizer whose state depends on the shapes.

    Example:
        >>> sizes = from_count(25_600_000, optimizer="adamw")
        >>> [(part.name, part.bytes) for part in sizes.parts]
        [('model', 102404096), ('optimizer', 204804100), ('rest', 13950)]
    """
    check_whole("parameters", parameters)
    if needs_shapes(optimizer):
        raise ConfigError(f"the state of {optimizer} depends on the shapes: give --preset, or plan from the live state")
    return from_network(Architecture("", "", dtype, optimizer, ((parameters,),), ""), master=master)


def from_network(
    network: Architecture, *, optimizer: str | None = None, dtype: str | None = None, master: str | None = None
) -> Sizes:
    """Calculate sizes from a known network; by default with its usual element type and optimizer.

    Raises:
        ConfigError: as ``from_count``.
    """
    optimizer, dtype, count = optimizer or network.optimizer, dtype or network.dtype, network.parameters
    weights = _weights(network, bytes_of(dtype))
    moment_bytes = bytes_of(master or dtype)
    state = optimizer_state(optimizer, network.shapes)
    state_bytes = moment_bytes * (state.elements + (count if master else 0)) + STEP * state.scalars
    tensors = state.tensors + state.scalars + (len(network.shapes) if master else 0)
    # only the length of the header depends on the tensors, so the first one stands for all bytes
    state_tensors = [_SizedTensor(f"state.{n}.exp_avg_sq", (), state_bytes if n == 0 else 0) for n in range(tensors)]
    copy = f"a copy of the weights in {master}" if master else ""
    why = f"{optimizer}: {state.elements / count:.3g} numbers of {moment_bytes} bytes for each parameter"
    why_weights = f"{bytes_of(dtype)} bytes a parameter" + (", buffers" if network.norms else "")
    title = network.title and f"{network.title}, "
    parts = [
        PartSize(name="model", bytes=_file_bytes(weights), why=why_weights),
        PartSize(name="optimizer", bytes=_file_bytes(state_tensors), why=why + (copy and f", and {copy}")),
        _rest(len(weights) + tensors),
    ]
    return Sizes(
        parts=tuple(part for part in parts if part.bytes),
        bfloat16=dtype == "bfloat16" and master in {None, "bfloat16"},
        source=f"{title}{count:,} parameters in {dtype}, {optimizer}" + (copy and f", {copy}"),
    )


def _weights(network: Architecture, width: int) -> list[_SizedTensor]:
    """The parameters, and the buffers of batch norms: means and variances in float32, and a count in eight bytes."""
    shapes, norms = network.shapes, network.norms
    weights = [_SizedTensor(f"layers.{n}.weight", shape, width * math.prod(shape)) for n, shape in enumerate(shapes)]
    averages = [channels for channels in norms for _ in ("mean", "variance")]
    weights += [_SizedTensor(f"layers.{n}.running_mean", (size,), 4 * size) for n, size in enumerate(averages)]
    return weights + [_SizedTensor(f"layers.{n}.batches", (), 8) for n in range(len(norms))]


# --- from live objects --------------------------------------------------------------------------------------------


def from_state(state: Mapping[str, Any]) -> Sizes:
    """Calculate sizes from a live state: the one that ``Checkpointer`` would be given.

    The state of an optimizer that has not stepped yet follows from its class.

    Args:
        state: part name to live object.

    Raises:
        ConfigError: no state, or an optimizer without a first step whose class is not known.
    """
    if not isinstance(state, Mapping) or not state:
        raise ConfigError(f'state= takes a mapping of parts, such as {{"model": model}}, not {state!r}')
    trained = {_place(parameter) for value in state.values() for parameter in _trained(value)}
    parts, count = [], 0
    dtypes: set[str] = set()
    for name, value in state.items():
        part, tensors = _live_part(name, value, trained, dtypes)
        parts.append(part)
        count += tensors
    return Sizes(
        parts=(*parts, _rest(count)),
        bfloat16=bool(dtypes) and all("bfloat16" in dtype for dtype in dtypes),
        source="the live state",
    )


def _live_part(name: str, value: Any, trained: set[tuple[int, int]], dtypes: set[str]) -> tuple[PartSize, int]:
    """Size one part, and count its tensors; its element types are added to ``dtypes``."""
    content = value.state_dict() if callable(getattr(value, "state_dict", None)) else value
    tensors: dict[tuple[int, int], _SizedTensor] = {}  # tied weights are stored once
    for path, tensor in _tensors(content):
        sized = _SizedTensor(path, tuple(tensor.shape), tensor.numel() * tensor.element_size())
        tensors.setdefault(_place(tensor), sized)
        if tensor.numel() > 1:
            dtypes.add(str(tensor.dtype))
    why = f"{len(tensors)} tensors of {type(value).__name__}"
    future = list(_future_tensors(value, dtypes)) if hasattr(value, "param_groups") else []
    why += f", and {len(future)} to come with the first step" if future else ""
    places = set() if hasattr(value, "param_groups") else _frozen_places(value, trained)
    frozen = [tensor for place, tensor in tensors.items() if place in places]
    if sum(tensor.bytes for tensor in frozen) < _WORTH_A_FILE:
        places, frozen = set(), []
    changing = [*(tensor for place, tensor in tensors.items() if place not in places), *future]
    frozen_bytes = _file_bytes(frozen)
    part = PartSize(name=name, bytes=_file_bytes(changing) + frozen_bytes, frozen=frozen_bytes, why=why)
    return part, len(changing) + len(frozen)


def _frozen_places(value: Any, trained: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """The parameters that no optimizer trains, in a part of which it trains others.

    A part of which nothing is trained may stand still, or be an average that moves: the worse is assumed.
    """
    if not trained or not callable(getattr(value, "parameters", None)):
        return set()
    parameters = {_place(parameter) for parameter in value.parameters()}
    return parameters - trained if parameters & trained else set()


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
    address = tensor.data_ptr() if callable(getattr(tensor, "data_ptr", None)) else 0
    return (address, tensor.numel() * tensor.element_size()) if address else (0, id(tensor))


def _future_tensors(optimizer: Any, dtypes: set[str]) -> Iterator[_SizedTensor]:
    """The tensors that an optimizer will make at its first step, for the parameters that it has not stepped on."""
    states = getattr(optimizer, "state", {})
    parameters = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    for number, (group, parameter) in enumerate(parameters):
        if states.get(parameter) or not getattr(parameter, "requires_grad", True):
            continue
        shape = tuple(parameter.shape)
        state = optimizer_state(type(optimizer).__name__, [shape], group)
        size = state.elements * parameter.element_size()
        dtypes.add(str(parameter.dtype))
        for n in range(state.tensors):
            yield _SizedTensor(f"state.{number}.exp_avg_{n}", shape, size if n == 0 else 0)
        for n in range(state.scalars):
            yield _SizedTensor(f"state.{number}.step_{n}", (), STEP)


# --- from checkpoints ---------------------------------------------------------------------------------------------


def from_manifests(manifests: Sequence[Manifest], run: str) -> Sizes:
    """Return the sizes of a run's newest whole checkpoint, with the mean times of all its saves.

    Args:
        manifests: of the run, earliest first.
        run: its name.

    Raises:
        NotFoundError: it has no checkpoint.
    """
    if not manifests:
        raise NotFoundError(f"run {run!r} has no checkpoints yet: plan with --params, --preset or from the live state")
    all_parts = max(len(manifest.parts) for manifest in manifests)
    newest = [manifest for manifest in manifests if len(manifest.parts) == all_parts][-1]
    parts = [_measured_part(newest, part) for part in newest.parts if part not in OWN_PARTS]
    why = f"{layout.STATE} of {newest.name}: random generators, plain values"
    parts.append(PartSize(name=REST, bytes=newest.size_bytes - sum(part.bytes for part in parts), why=why))
    dtypes = {tensor.dtype for file in newest.files for tensor in file.tensors if tensor.shape}
    stalls = [_seconds(manifest, "capture_seconds", "step_waited_seconds") for manifest in manifests]
    timed = [manifest for manifest in manifests if "write_seconds" in manifest.timing]
    writes = [_seconds(manifest, "capture_seconds", "write_seconds") for manifest in timed]
    return Sizes(
        parts=tuple(parts),
        bfloat16=dtypes == {"BF16"},
        source=f"{newest.run}/{newest.name}",
        stall=sum(stalls) / len(stalls),
        durable=sum(writes) / len(writes) if writes else None,
    )


def _measured_part(manifest: Manifest, part: str) -> PartSize:
    files = [manifest.file(name) for name in manifest.parts[part]]
    frozen = sum(file.size for file in files if file.shared or f"{part}+frozen" in file.name)
    why = f"{len(stored_tensors(manifest, part))} tensors, as in {manifest.name}"
    return PartSize(name=part, bytes=sum(file.size for file in files), frozen=frozen, why=why)


def stalled_seconds(manifest: Manifest) -> float:
    """Return the seconds for which a save blocked the loop, with the wait for the save before it."""
    return _seconds(manifest, "waited_seconds", "capture_seconds", "step_waited_seconds")


def _seconds(manifest: Manifest, *names: str) -> float:
    return math.fsum(manifest.timing.get(name, 0.0) for name in names)
