"""The state as a tree: tensors go to safetensors files, everything else becomes typed JSON, exactly or not at all.

Plain JSON stands for itself. A value of another type is an object whose member ``"$"`` names the type; docs/format.md
lists the types. Nothing is pickled, and nothing that is read back can name code to run.

A type that would not come back as it was is refused, with its place in the state. Two conversions are made on purpose:
an enum member becomes its value, and an ``argparse.Namespace`` becomes a dict.
"""

import argparse
import enum
import itertools
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from peakpoint.errors import ConfigError, FormatError
from peakpoint.state.divided import is_divided, own_shard
from peakpoint.state.json_scalars import (
    SCALAR_TAGS,
    TAG,
    UNREADABLE,
    StatePath,
    decode_scalar,
    dotted_keys,
    dtype_text,
    encode_scalar,
    from_base64,
    is_unicode,
    make_path,
    read_dtype,
    refusal,
    to_base64,
)
from peakpoint.state.shared_storage import DTYPES, TORCH_DTYPES, TensorEntry, clusters, is_dense, store_cluster

_DEEPEST = 100
_INLINE_BYTES = 1024  # arrays up to this size stay in the JSON; larger ones become tensors

_TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)  # a buffer is a plain tensor with a mark
_FACTORIES: dict[str, type] = {kind.__name__: kind for kind in (int, float, str, bool, bytes, list, dict, set, tuple)}
_ALIGNED = 16  # bytes: enough for every element type


@dataclass(slots=True)
class Encoder:
    """Encodes one part of the state, once.

    Attributes:
        tensors: after ``encode``, the tensors to store, by their name in the file. Tensors that share memory are stored
            once. Of one that is divided among ranks it is the shard of this rank.
        shards: by name, the tensors that are divided among ranks.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    shards: dict[str, torch.Tensor] = field(default_factory=dict)
    _entries: list[TensorEntry] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)
    _attributes: bool = False
    _depth: int = 0

    def encode(self, value: object, path: StatePath | str, *, attributes: bool = False) -> Any:
        """Return the tree of a state dict or a plain value.

        Args:
            path: its place in the state, for errors: ``state["sampler"]``. What is a ``StatePath`` also leads to the
                names of tensors.
            attributes: name the first level as attributes (``.rng``) since it came out of ``state_dict()``.

        Raises:
            ConfigError: something in it cannot be kept exactly; the message says where.
        """
        self._attributes = attributes
        tree = self._walk(value, path)
        for cluster in clusters(self._entries):
            store_cluster(cluster, self.tensors, self._unused_name)
        return tree

    @property
    def names(self) -> list[str]:
        """The name of every tensor that ``encode`` met, in order; some may be stored under the name of another."""
        return [entry[0] for entry in self._entries]

    def _walk(self, value: Any, path: StatePath | str) -> Any:
        if self._depth > _DEEPEST:
            raise ConfigError(f"{str(path)[:200]} is nested more than {_DEEPEST} levels deep, or contains itself")
        kind = type(value)
        if kind is torch.Tensor:
            return self._tensor(value, path)
        encode_container = _CONTAINERS.get(kind)
        if encode_container is not None:
            self._depth += 1
            node = encode_container(self, value, path)
            self._depth -= 1
            return node
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if kind is np.ndarray:
            return self._array(value, path)
        if isinstance(value, enum.Enum):
            return self._walk(value.value, make_path((path, "value", True)))
        return encode_scalar(value, path)

    def mapping(self, value: Mapping[Any, Any], path: StatePath | str, *, attributes: bool = False) -> Any:
        """Encode a dict: as an object when its keys are strings that do not look like tags, or as a list of pairs."""
        walk = self._walk  # hundreds of thousands of calls in a large state: every look-up counts
        attributes = attributes or (self._attributes and isinstance(path, str))
        encoded = [walk(child, make_path((path, key, attributes))) for key, child in value.items()]
        if all(type(key) is str and not key.startswith(TAG) and is_unicode(key) for key in value):
            return dict(zip(value, encoded, strict=True))
        pairs = [[_key(key, path), child] for key, child in zip(value, encoded, strict=True)]
        _check_distinct(value, path)
        return {TAG: "dict", "v": pairs}

    def sequence(self, value: Any, path: StatePath | str) -> list[Any]:
        """Encode the elements in order."""
        return [self._walk(child, make_path((path, index, False))) for index, child in enumerate(value)]

    def members(self, value: Any, path: StatePath | str) -> list[Any]:
        """Encode the elements of a set, in an order that depends on nothing but the elements."""
        encoded = sorted((_key(member, path) for member in value), key=repr)
        _check_distinct(value, path)
        return encoded

    def _array(self, value: np.ndarray[Any, Any], path: StatePath | str) -> dict[str, Any]:
        node: dict[str, Any] = {TAG: "ndarray", "dtype": _array_dtype(value, path), "shape": list(value.shape)}
        if value.flags.f_contiguous and not value.flags.c_contiguous:
            node["order"] = "F"
        data = value.tobytes(order="C")
        if value.nbytes <= _INLINE_BYTES or value.dtype.names is not None or value.dtype.kind not in "biufc":
            return node | {"v": to_base64(data)}
        return node | {"bytes": self._tensor(torch.frombuffer(bytearray(data), dtype=torch.uint8), path)}

    def _tensor(self, value: torch.Tensor, path: StatePath | str) -> dict[str, Any]:
        check_tensor(value, path)
        name = self._unused_name(dotted_keys(path) or "value")
        node: dict[str, Any] = {TAG: "tensor", "name": name}
        if is_divided(value):
            node |= {TAG: "sharded", "dtype": DTYPES[value.dtype], "shape": list(value.shape)}
            self.shards[name] = value
        if value.requires_grad:
            node["requires_grad"] = True
        if type(value) is torch.nn.Parameter:
            node["class"] = "Parameter"
        elif getattr(value, "_is_buffer", False):
            node["class"] = "Buffer"
            node["persistent"] = bool(getattr(value, "persistent", True))
        if not value.is_cpu:
            node["device"] = str(value.device)
        self._entries.append((name, own_shard(value.detach() if value.requires_grad else value), node))
        return node

    def _unused_name(self, keys: str) -> str:
        name = keys
        if not name.isascii() or "\x00" in name:
            name = keys.replace("\x00", "_").encode("utf-8", "replace").decode()  # what every header can hold
        if name == "__metadata__" or name in self._names:
            numbered = (f"{name}~{number}" for number in itertools.count(2))
            name = next(candidate for candidate in numbered if candidate not in self._names)
        self._names.add(name)
        return name


class StateCheck(Encoder):
    """Walks through a state and refuses what ``Encoder`` does, without copying a byte of arrays and tensors."""

    def _array(self, value: np.ndarray[Any, Any], path: StatePath | str) -> dict[str, Any]:
        return {"dtype": _array_dtype(value, path)}

    def _tensor(self, value: torch.Tensor, path: StatePath | str) -> dict[str, Any]:
        if not is_lazy(value):  # it will have a shape when it is saved
            check_tensor(value, path)
        return {}


def _array_dtype(value: np.ndarray[Any, Any], path: StatePath | str) -> str:
    """Return the element type of an array as text.

    Raises:
        ConfigError: it holds Python objects, or cannot be kept exactly.
    """
    if value.dtype.hasobject:
        raise refusal(path, value, "it holds Python objects, which cannot be kept without pickle")
    return dtype_text(value.dtype, path)


def check_tensor(value: torch.Tensor, path: StatePath | str) -> None:
    """Refuse a tensor that a safetensors file cannot hold exactly.

    Raises:
        ConfigError: its class, layout, device or element type has no place in such a file.
    """
    if is_lazy(value):
        raise refusal(path, value, "it is not initialized yet; run one batch through the model before it is saved")
    if is_divided(value):
        if any(placement.is_partial() for placement in value.placements):
            raise refusal(path, value, "each rank has an addend of it; redistribute it to shards or replicas first")
        value = own_shard(value.detach())
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
    """Encode a dict's key or a set's member: a scalar, or a tuple or frozenset of them."""
    if type(value) is tuple:
        return {TAG: "tuple", "v": [_key(member, path) for member in value]}
    if type(value) is frozenset:
        return {TAG: "frozenset", "v": sorted((_key(member, path) for member in value), key=repr)}
    if isinstance(value, enum.Enum):
        return _key(value.value, path)
    return encode_scalar(value, f"key {value!r} of {path}")


def _plain_key(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return _plain_key(value.value)
    if type(value) in (tuple, frozenset):
        return type(value)(_plain_key(member) for member in value)
    return value


def _check_distinct(keys: Collection[Any], path: StatePath | str) -> None:
    """Refuse keys that are equal once enum members have become their values."""
    if len({_plain_key(key) for key in keys}) != len(keys):
        raise ConfigError(f"{path} has keys that are equal once enum members are their values; use .value yourself")


# --- containers ---------------------------------------------------------------------------------------------------


def _ordered_dict(encoder: Encoder, value: Any, path: StatePath | str) -> Any:
    node = {TAG: "OrderedDict", "v": encoder.mapping(value, path)}
    metadata = getattr(value, "_metadata", None)  # versions of a module's state dict, which load_state_dict reads
    if metadata is not None:
        node["metadata"] = encoder.mapping(dict(metadata), make_path((path, "_metadata", True)))
    return node


def _default_dict(encoder: Encoder, value: Any, path: StatePath | str) -> Any:
    factory = value.default_factory
    if factory is not None and _FACTORIES.get(getattr(factory, "__name__", "")) is not factory:
        raise refusal(path, value, f"its default_factory {factory!r} cannot be kept; turn it into a dict")
    content = encoder.mapping(value, path)
    return {TAG: "defaultdict", "factory": None if factory is None else factory.__name__, "v": content}


_CONTAINERS: dict[type, Callable[[Encoder, Any, StatePath | str], Any]] = {
    dict: Encoder.mapping,
    list: Encoder.sequence,
    OrderedDict: _ordered_dict,
    defaultdict: _default_dict,
    Counter: lambda encoder, value, path: {TAG: "Counter", "v": encoder.mapping(value, path)},
    argparse.Namespace: lambda encoder, value, path: encoder.mapping(vars(value), path, attributes=True),
    tuple: lambda encoder, value, path: {TAG: "tuple", "v": encoder.sequence(value, path)},
    deque: lambda encoder, value, path: {TAG: "deque", "maxlen": value.maxlen, "v": encoder.sequence(value, path)},
    set: lambda encoder, value, path: {TAG: "set", "v": encoder.members(value, path)},
    frozenset: lambda encoder, value, path: {TAG: "frozenset", "v": encoder.members(value, path)},
}


# --- decoding -----------------------------------------------------------------------------------------------------


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
    _bases: dict[str, torch.Tensor] = field(default_factory=dict)

    def decode(self, tree: Any) -> Any:
        """Return the value that ``Encoder.encode`` encoded.

        Raises:
            FormatError: a type that this release does not know, or a node that ``encode`` does not write.
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
        try:
            if isinstance(tag, str) and tag in SCALAR_TAGS:
                return decode_scalar(node)
            if isinstance(tag, str) and tag in _DECODERS:
                return _DECODERS[tag](self, node)
        except RecursionError:
            raise
        except UNREADABLE as error:
            raise FormatError(f"the state holds a {tag!r} that cannot be read: {error!r}") from error
        raise FormatError(f"the state holds a {tag!r}, which this release does not read: update it")

    def mapping(self, tree: Any) -> dict[Any, Any]:
        """Decode what ``Encoder.mapping`` encoded."""
        if isinstance(tree, dict) and tree.get(TAG) == "dict":
            return {self.decode(key): self.decode(child) for key, child in tree["v"]}
        return {key: self.decode(child) for key, child in tree.items()}

    def tensor(self, node: dict[str, Any]) -> torch.Tensor:
        """Decode a tensor; nodes that name the same stored tensor share memory."""
        value = base = self._base(node)
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

    def sharded(self, node: dict[str, Any]) -> torch.Tensor:
        """Decode a tensor that was saved in shards, and so says what they are together."""
        name, stored = node["name"], self.stored[node["name"]]
        if (stored.dtype, list(stored.shape)) != (TORCH_DTYPES[node["dtype"]], node["shape"]):
            kind = f"{DTYPES[stored.dtype]}{list(stored.shape)}"
            raise ValueError(f"the shards of {name!r} are {kind} together, not {node['dtype']}{node['shape']}")
        return self.tensor(node)

    def _base(self, node: dict[str, Any]) -> torch.Tensor:
        """Return the stored tensor of a node with its strides, on its device."""
        name = node["name"]
        if name not in self._bases:
            base = self.stored[name]
            if "view" in node and base.data_ptr() % _ALIGNED:
                base = base.clone()  # bytes in a file are not aligned for larger elements
            if "stride" in node and not is_divided(base):
                if not is_dense(base.shape, node["stride"]):
                    raise ValueError(f"strides {node['stride']} for the shape {list(base.shape)}")
                base = torch.empty_strided(base.shape, node["stride"], dtype=base.dtype, device=base.device).copy_(base)
            if self.devices and "device" in node and _available(torch.device(node["device"])):
                base = base.to(node["device"])
            self._bases[name] = base
        return self._bases[name]

    def array(self, node: dict[str, Any]) -> np.ndarray[Any, Any]:
        """Decode a NumPy array into memory of its own."""
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


def _read_ordered_dict(decoder: Decoder, node: dict[str, Any]) -> OrderedDict[Any, Any]:
    ordered = OrderedDict(decoder.mapping(node["v"]))
    if "metadata" in node:
        ordered._metadata = OrderedDict(decoder.mapping(node["metadata"]))  # type: ignore[attr-defined] # noqa: SLF001
    return ordered


def _read_default_dict(decoder: Decoder, node: dict[str, Any]) -> defaultdict[Any, Any]:
    factory = None if node["factory"] is None else _FACTORIES[node["factory"]]
    return defaultdict(factory, decoder.mapping(node["v"]))


_DECODERS: dict[str, Callable[[Decoder, dict[str, Any]], Any]] = {
    "tensor": Decoder.tensor,
    "sharded": Decoder.sharded,
    "ndarray": Decoder.array,
    "dict": Decoder.mapping,
    "OrderedDict": _read_ordered_dict,
    "defaultdict": _read_default_dict,
    "Counter": lambda decoder, node: Counter(decoder.mapping(node["v"])),
    "tuple": lambda decoder, node: tuple(decoder.decode(node["v"])),
    "deque": lambda decoder, node: deque(decoder.decode(node["v"]), maxlen=node["maxlen"]),
    "set": lambda decoder, node: set(decoder.decode(node["v"])),
    "frozenset": lambda decoder, node: frozenset(decoder.decode(node["v"])),
}
