"""The state as a tree: tensors go to safetensors files, everything else becomes typed JSON, exactly or not at all.

Plain JSON stands for itself. What JSON cannot say is an object with the member ``"$"``, its type; docs/format.md lists
the types. Nothing is pickled, and nothing that is read back can name code to run.

A type that would not come back as it was is refused, with its place in the state. Two conversions are made on purpose:
an enum member becomes its value, and an ``argparse.Namespace`` becomes a dict.
"""

import argparse
import datetime as dt
import decimal
import enum
import itertools
import pathlib
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from peakpoint.errors import ConfigError, FormatError
from peakpoint.state.json_scalars import (
    PATHS,
    TAG,
    UNREADABLE,
    StatePath,
    dtype_text,
    from_base64,
    is_unicode,
    make_path,
    read_dtype,
    read_float,
    refusal,
    scalar,
    to_base64,
)
from peakpoint.state.shared_storage import DTYPES, TORCH_DTYPES, TensorEntry, clusters, is_dense_layout
from peakpoint.state.shared_storage import store as store_cluster

_DEEPEST = 100
_INLINE_BYTES = 1024  # arrays up to this size stay in the JSON; larger ones become tensors

_TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)  # a buffer is a plain tensor with a mark
_FACTORIES: dict[str, type] = {kind.__name__: kind for kind in (int, float, str, bool, bytes, list, dict, set, tuple)}
_ALIGNED = 16  # bytes: enough for every element type
_NAMED_DTYPES = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}


@dataclass(slots=True)
class Encoder:
    """Encodes one part of the state.

    Attributes:
        tensors: after ``encode``, what must be stored: the name in the file and the values. Tensors that share memory
            are stored once.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _entries: list[TensorEntry] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)

    def encode(self, value: object, path: StatePath | str, *, attributes: bool = False) -> Any:
        """The tree of ``value``.

        Args:
            value: a state dict or a plain value.
            path: its place in the state, for errors: ``state["sampler"]``.
            attributes: name the first level as attributes (``.rng``) since it came out of ``state_dict()``.

        Raises:
            ConfigError: something in it cannot be kept exactly; the message says where.
        """
        tree = self._walk(value, path, (), attributes)
        self._store()
        return tree

    @property
    def names(self) -> list[str]:
        """The name of every tensor that ``encode`` met, in order; some may be stored under the name of another."""
        return [entry[0] for entry in self._entries]

    def _walk(self, value: Any, path: StatePath | str, keys: tuple[str, ...], attributes: bool = False) -> Any:  # noqa: FBT001, FBT002
        if len(keys) > _DEEPEST:
            raise ConfigError(f"{str(path)[:200]} is nested more than {_DEEPEST} levels deep, or contains itself")
        kind = type(value)
        if kind is torch.Tensor:
            return self._tensor(value, path, keys)
        container = _CONTAINERS.get(kind)
        if container is not None:
            return container(self, value, path, keys, attributes)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path, keys)
        if type(value) is np.ndarray:
            return self._array(value, path, keys)
        if isinstance(value, enum.Enum):
            return self._walk(value.value, f"{path}.value", (*keys, "value"))
        return scalar(value, path)

    def mapping(self, value: Mapping[Any, Any], path: StatePath | str, keys: tuple[str, ...], attributes: bool) -> Any:  # noqa: FBT001
        """A dict: a JSON object when its keys are strings that do not look like tags, a list of pairs otherwise."""
        walk = self._walk  # hundreds of thousands of calls in a large state: every look-up counts
        encoded = [walk(child, make_path((path, key, attributes)), (*keys, str(key))) for key, child in value.items()]
        if all(type(key) is str and not key.startswith(TAG) and is_unicode(key) for key in value):
            return dict(zip(value, encoded, strict=True))
        pairs = [[_key(key, path), child] for key, child in zip(value, encoded, strict=True)]
        _check_distinct(value, path)
        return {TAG: "dict", "v": pairs}

    def sequence(self, value: Any, path: StatePath | str, keys: tuple[str, ...], attributes: bool) -> list[Any]:  # noqa: ARG002, FBT001
        """The elements in order."""
        return [self._walk(child, make_path((path, at, False)), (*keys, str(at))) for at, child in enumerate(value)]

    def members(self, value: Any, path: StatePath | str) -> list[Any]:
        """The elements of a set, in an order that depends on nothing but the elements."""
        encoded = sorted((_key(member, path) for member in value), key=repr)
        _check_distinct(value, path)
        return encoded

    def _array(self, value: np.ndarray[Any, Any], path: StatePath | str, keys: tuple[str, ...]) -> dict[str, Any]:
        if value.dtype.hasobject:
            raise refusal(path, value, "it holds Python objects, which cannot be kept without pickle")
        node: dict[str, Any] = {TAG: "ndarray", "dtype": dtype_text(value.dtype, path), "shape": list(value.shape)}
        if value.flags.f_contiguous and not value.flags.c_contiguous:
            node["order"] = "F"
        if value.nbytes <= _INLINE_BYTES or value.dtype.names is not None or value.dtype.kind not in "biufc":
            return node | {"v": to_base64(value.tobytes(order="C"))}
        stored = torch.frombuffer(bytearray(value.tobytes(order="C")), dtype=torch.uint8)
        return node | {"bytes": self._tensor(stored, path, keys)}

    def _tensor(self, value: torch.Tensor, path: StatePath | str, keys: tuple[str, ...]) -> dict[str, Any]:
        check_tensor(value, path)
        name = self._name(".".join(keys) or "value")
        node: dict[str, Any] = {TAG: "tensor", "name": name}
        if value.requires_grad:
            node["requires_grad"] = True
        if type(value) is torch.nn.Parameter:
            node["class"] = "Parameter"
        elif getattr(value, "_is_buffer", False):
            node["class"] = "Buffer"
            node["persistent"] = bool(getattr(value, "persistent", True))
        if not value.is_cpu:
            node["device"] = str(value.device)
        self._entries.append((name, value.detach() if value.requires_grad else value, node))
        return node

    def _name(self, wanted: str) -> str:
        name = wanted
        if not name.isascii() or "\x00" in name:
            name = wanted.replace("\x00", "_").encode("utf-8", "replace").decode()  # what every header can hold
        if name == "__metadata__" or name in self._names:
            name = next(n for i in itertools.count(2) if (n := f"{name}~{i}") not in self._names)
        self._names.add(name)
        return name

    def _store(self) -> None:
        for cluster in clusters(self._entries):
            store_cluster(cluster, self.tensors, self._name)


def check_tensor(value: torch.Tensor, path: StatePath | str) -> None:
    """Refuse tensors that a safetensors file cannot hold exactly.

    Raises:
        ConfigError: a subclass, a layout, a device or an element type of that kind.
    """
    if type(value) not in _TENSOR_TYPES:
        raise refusal(path, value, "only plain tensors and parameters can be kept; convert it to a tensor first")
    if value.layout != torch.strided:
        raise refusal(path, value, f"its layout is {value.layout}; convert it with .to_dense() first")
    if value.is_quantized or value.is_nested:
        raise refusal(path, value, "quantized and nested tensors cannot be kept; save their components")
    if value.is_meta:
        raise refusal(path, value, "it is on the meta device and has no values")
    if value.dtype not in DTYPES:
        raise refusal(path, value, f"its dtype {value.dtype} has no place in the safetensors format")


def _key(value: Any, path: StatePath | str) -> Any:
    """A dict's key or a set's member: scalars, tuples and frozensets of them."""
    if type(value) is tuple:
        return {TAG: "tuple", "v": [_key(member, path) for member in value]}
    if type(value) is frozenset:
        return {TAG: "frozenset", "v": sorted((_key(member, path) for member in value), key=repr)}
    if isinstance(value, enum.Enum):
        return _key(value.value, path)
    return scalar(value, f"key {value!r} of {path}")


def _plain_key(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return _plain_key(value.value)
    if type(value) in (tuple, frozenset):
        return type(value)(_plain_key(member) for member in value)
    return value


def _check_distinct(keys: Collection[Any], path: StatePath | str) -> None:
    """Enum members become their values: two keys may then be one."""
    if len({_plain_key(key) for key in keys}) != len(keys):
        raise ConfigError(f"{path} has keys that are equal once enum members are their values; use .value yourself")


# --- containers ---------------------------------------------------------------------------------------------------

_Container = Callable[[Encoder, Any, StatePath | str, tuple[str, ...], bool], Any]


def _ordered(encoder: Encoder, value: Any, path: StatePath | str, keys: tuple[str, ...], attributes: bool) -> Any:  # noqa: FBT001
    node = {TAG: "OrderedDict", "v": encoder.mapping(value, path, keys, attributes)}
    metadata = getattr(value, "_metadata", None)  # versions of a module's state dict, which load_state_dict reads
    if metadata is not None:
        node["metadata"] = encoder.mapping(dict(metadata), f"{path}._metadata", keys, attributes=False)
    return node


def _defaults(encoder: Encoder, value: Any, path: StatePath | str, keys: tuple[str, ...], attributes: bool) -> Any:  # noqa: FBT001
    factory = value.default_factory
    if factory is not None and _FACTORIES.get(getattr(factory, "__name__", "")) is not factory:
        raise refusal(path, value, f"its default_factory {factory!r} cannot be kept; turn it into a dict")
    content = encoder.mapping(value, path, keys, attributes)
    return {TAG: "defaultdict", "factory": None if factory is None else factory.__name__, "v": content}


_CONTAINERS: dict[type, _Container] = {
    dict: Encoder.mapping,
    list: Encoder.sequence,
    OrderedDict: _ordered,
    defaultdict: _defaults,
    Counter: lambda e, v, p, k, a: {TAG: "Counter", "v": e.mapping(v, p, k, a)},
    argparse.Namespace: lambda e, v, p, k, a: e.mapping(vars(v), p, k, True),  # noqa: ARG005, FBT003
    tuple: lambda e, v, p, k, a: {TAG: "tuple", "v": e.sequence(v, p, k, a)},
    deque: lambda e, v, p, k, a: {TAG: "deque", "maxlen": v.maxlen, "v": e.sequence(v, p, k, a)},
    set: lambda e, v, p, k, a: {TAG: "set", "v": e.members(v, p)},  # noqa: ARG005
    frozenset: lambda e, v, p, k, a: {TAG: "frozenset", "v": e.members(v, p)},  # noqa: ARG005
}


# --- back ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Decoder:
    """Decodes one part of the state.

    Attributes:
        stored: the tensors of its files, by name.
        devices: put tensors on the device they were on, where this machine has it; otherwise they stay where
            ``stored`` has them.
    """

    stored: Mapping[str, torch.Tensor]
    devices: bool = False
    _made: dict[str, torch.Tensor] = field(default_factory=dict)

    def decode(self, tree: Any) -> Any:
        """The value that ``Encoder.encode`` was given.

        Raises:
            FormatError: a type that this release does not know, or one that is not what ``encode`` writes.
        """
        try:
            if isinstance(tree, list):
                return [self.decode(child) for child in tree]
            if not isinstance(tree, dict):
                return tree
            if TAG not in tree:
                return {key: self.decode(child) for key, child in tree.items()}
            return self._tagged(tree)
        except RecursionError as error:
            raise FormatError("the state is nested too deep to be read") from error

    def _tagged(self, node: dict[str, Any]) -> Any:
        tag = node[TAG]
        decode = _DECODERS.get(tag) if isinstance(tag, str) else None
        if decode is None:
            raise FormatError(f"the state holds a {tag!r}, which this release does not read: update it")
        try:
            return decode(self, node)
        except RecursionError:
            raise
        except UNREADABLE as error:
            raise FormatError(f"the state holds a {tag!r} that cannot be read: {error!r}") from error

    def mapping(self, tree: Any) -> dict[Any, Any]:
        """What ``Encoder.mapping`` wrote."""
        if isinstance(tree, dict) and tree.get(TAG) == "dict":
            return {self.decode(key): self.decode(child) for key, child in tree["v"]}
        return {key: self.decode(child) for key, child in tree.items()}

    def tensor(self, node: dict[str, Any]) -> torch.Tensor:
        """A tensor; nodes that name the same stored tensor share memory."""
        name = node["name"]
        base = self._made.get(name)
        if base is None:
            base = self.stored[name]
            if "view" in node and base.data_ptr() % _ALIGNED:
                base = base.clone()  # bytes in a file are not aligned for larger elements
            if "stride" in node:
                if not is_dense_layout(base.shape, node["stride"]):
                    raise ValueError(f"strides {node['stride']} for the shape {list(base.shape)}")
                base = torch.empty_strided(base.shape, node["stride"], dtype=base.dtype).copy_(base)
            if self.devices and "device" in node and _available(torch.device(node["device"])):
                base = base.to(node["device"])
            self._made[name] = base
        value = base
        if "view" in node:
            view = node["view"]
            dtype = TORCH_DTYPES[view["dtype"]]
            flat = base.reshape(-1)
            if base.dtype != dtype:
                octets = flat.view(torch.uint8)
                flat = octets[: len(octets) // dtype.itemsize * dtype.itemsize].view(dtype)
            value = flat.as_strided(view["shape"], view["stride"], view["offset"] // dtype.itemsize)
        if node.get("class") == "Parameter":
            return torch.nn.Parameter(value, requires_grad=node.get("requires_grad", False))
        if node.get("class") == "Buffer":
            return torch.nn.Buffer(value, persistent=node.get("persistent", True))
        return value.detach().requires_grad_() if node.get("requires_grad") else value

    def array(self, node: dict[str, Any]) -> np.ndarray[Any, Any]:
        """A NumPy array of its own memory."""
        data = self.tensor(node["bytes"]).numpy().tobytes() if "bytes" in node else from_base64(node["v"])
        dtype = read_dtype(node["dtype"])
        if dtype.itemsize:
            array = np.frombuffer(bytearray(data), dtype=dtype).reshape(node["shape"])
        else:
            array = np.empty(node["shape"], dtype=dtype)
        return np.asfortranarray(array) if node.get("order") == "F" else array


def _available(device: torch.device) -> bool:
    module = getattr(torch, device.type, None)
    return module is not None and module.is_available() and (device.index or 0) < module.device_count()


def _read_zone(zone: Any) -> dt.tzinfo | None:
    if zone is None:
        return None
    if isinstance(zone, str):
        return zoneinfo.ZoneInfo(zone)
    offset = dt.timedelta(seconds=zone[0], microseconds=zone[1])
    return dt.timezone(offset, *map(Decoder({}).decode, zone[2:]))


def _read_ordered(decoder: Decoder, node: dict[str, Any]) -> OrderedDict[Any, Any]:
    ordered = OrderedDict(decoder.mapping(node["v"]))
    if "metadata" in node:
        ordered._metadata = OrderedDict(decoder.mapping(node["metadata"]))  # type: ignore[attr-defined] # noqa: SLF001
    return ordered


def _read_defaults(decoder: Decoder, node: dict[str, Any]) -> defaultdict[Any, Any]:
    factory = None if node["factory"] is None else _FACTORIES[node["factory"]]
    return defaultdict(factory, decoder.mapping(node["v"]))


def _read_path(node: dict[str, Any], decoder: Decoder) -> pathlib.PurePath:
    return PATHS[node["class"]](decoder.decode(node["v"]))


def _read_numpy(node: dict[str, Any]) -> Any:
    data, dtype = from_base64(node["v"]), read_dtype(node["dtype"])
    if dtype.kind == "S":
        return np.bytes_(data)
    if dtype.kind == "U":
        return np.str_(data.decode("utf-32-le", "surrogatepass"))
    if dtype.kind == "V" and dtype.names is None:
        return np.void(data)
    return np.frombuffer(bytearray(data), dtype=dtype)[0]


_DECODERS: dict[str, Callable[[Decoder, dict[str, Any]], Any]] = {
    "tensor": Decoder.tensor,
    "ndarray": Decoder.array,
    "dict": Decoder.mapping,
    "OrderedDict": _read_ordered,
    "defaultdict": _read_defaults,
    "Counter": lambda d, n: Counter(d.mapping(n["v"])),
    "tuple": lambda d, n: tuple(d.decode(n["v"])),
    "deque": lambda d, n: deque(d.decode(n["v"]), maxlen=n["maxlen"]),
    "set": lambda d, n: set(d.decode(n["v"])),
    "frozenset": lambda d, n: frozenset(d.decode(n["v"])),
    "int": lambda d, n: int(n["v"], 16),  # noqa: ARG005
    "float": lambda d, n: read_float(n["v"]),  # noqa: ARG005
    "str": lambda d, n: from_base64(n["v"]).decode("utf-8", "surrogatepass"),  # noqa: ARG005
    "bytes": lambda d, n: from_base64(n["v"]),  # noqa: ARG005
    "bytearray": lambda d, n: bytearray(from_base64(n["v"])),  # noqa: ARG005
    "complex": lambda d, n: complex(*d.decode(n["v"])),
    "Decimal": lambda d, n: decimal.Decimal(n["v"]),  # noqa: ARG005
    "range": lambda d, n: range(*d.decode(n["v"])),
    "datetime": lambda d, n: dt.datetime.fromisoformat(n["v"]).replace(  # noqa: ARG005
        tzinfo=_read_zone(n["zone"]), fold=n["fold"]
    ),
    "time": lambda d, n: dt.time.fromisoformat(n["v"]).replace(  # noqa: ARG005
        tzinfo=_read_zone(n["zone"]), fold=n["fold"]
    ),
    "date": lambda d, n: dt.date.fromisoformat(n["v"]),  # noqa: ARG005
    "timedelta": lambda d, n: dt.timedelta(*n["v"]),  # noqa: ARG005
    "torch.dtype": lambda d, n: _NAMED_DTYPES[n["v"]],  # noqa: ARG005
    "torch.device": lambda d, n: torch.device(n["v"]),  # noqa: ARG005
    "torch.Size": lambda d, n: torch.Size(n["v"]),  # noqa: ARG005
    "numpy": lambda d, n: _read_numpy(n),  # noqa: ARG005
    "numpy.dtype": lambda d, n: read_dtype(n["v"]),  # noqa: ARG005
    "path": lambda d, n: _read_path(n, d),
}
