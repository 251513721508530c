"""Encoding a state again, quickly.

From one save to the next a state seldom changes but in its values: the same containers hold tensors in the same places.
Then the way through it is followed again, the tree of the last time is used again, and only what is no tensor is
encoded anew. Whatever looks different in any way is encoded from the start.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from peakpoint.errors import ConfigError
from peakpoint.state.json_scalars import TAG
from peakpoint.state.typed_json import Encoder

TensorTraits = list[tuple[Any, ...]]
Step = Callable[[Any, list[torch.Tensor]], bool]
"""Follows one value: collects its tensors, encodes the rest into the tree; False when it looks different."""


def _traits(tensors: list[torch.Tensor]) -> TensorTraits:
    """What must be the same for a tensor to be where it was, and what it was; nothing when one has no memory."""
    if not all(isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided for tensor in tensors):
        return []
    return [
        (
            tensor.data_ptr(),
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            tensor.requires_grad,
            tensor.is_conj(),
            tensor.is_neg(),
            type(tensor),
        )
        for tensor in tensors
    ]


class EncodeCache:
    """Encodes one part of the state, again and again.

    Attributes:
        tree: of the last ``encode``; changed by the next one.
        tensors: what must be stored, by name.
        place: the same object as long as every tensor is where it was; None when that cannot be told.
    """

    def __init__(self) -> None:
        self.tree: Any = None
        self.tensors: dict[str, torch.Tensor] = {}
        self.place: object = None
        self._follow: Step | None = None
        self._traits: TensorTraits = []
        self._stored: dict[str, int] = {}

    def encode(self, value: Any, path: str, *, attributes: bool) -> bool:
        """Encode the part; see ``Encoder.encode``.

        Returns:
            Whether everything in it was where it was the last time.
        """
        if self._follow is not None:
            found: list[torch.Tensor] = []
            if self._follow(value, found) and _traits(found) == self._traits != []:
                plain = [tensor.detach() if tensor.requires_grad else tensor for tensor in found]
                self.tensors = {name: plain[number] for name, number in self._stored.items()}
                return True
        encoder = Encoder()
        self._follow = self.place = None
        before = self.tensors
        self.tree = encoder.encode(value, path, attributes=attributes)
        self.tensors = encoder.tensors
        self._learn(value, encoder)
        return not before and not self.tensors

    def _learn(self, value: Any, encoder: Encoder) -> None:
        numbers = {name: number for number, name in enumerate(encoder.names)}
        if not numbers.keys() >= encoder.tensors.keys() or not numbers:
            return  # bytes below several tensors, or nothing worth the while
        follow = _learn(value, self.tree)
        found: list[torch.Tensor] = []
        # an array of the state becomes a tensor for the occasion, which cannot be followed
        if follow is not None and follow(value, found) and len(found) == len(numbers):
            self._follow, self._traits = follow, _traits(found)
            self._stored = {name: numbers[name] for name in encoder.tensors}
            self.place = object() if self._traits else None


def _learn(value: Any, tree: Any) -> Step | None:
    """How to follow ``value``, which was encoded as ``tree``; None when it is no tensor and no container of any."""
    if isinstance(value, torch.Tensor):
        return _collect
    kind = type(value)
    if kind in (dict, OrderedDict):
        return _mapping(value, tree if kind is dict else tree["v"])
    if kind in (list, tuple):
        return _sequence(value, tree if kind is list else tree["v"])
    return None


def _collect(value: Any, found: list[torch.Tensor]) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    found.append(value)
    return True


def _mapping(value: Mapping[Any, Any], tree: Any) -> Step | None:
    kind, keys = type(value), list(value)
    kinds = [type(key) for key in keys]
    slots = [(pair, 1) for pair in tree["v"]] if tree.get(TAG) == "dict" else [(tree, key) for key in keys]
    steps = [_learn(child, holder[key]) for child, (holder, key) in zip(value.values(), slots, strict=True)]
    tensors = all(step is _collect for step in steps)
    if not any(steps):
        return None
    versions = copy.deepcopy(getattr(value, "_metadata", None))

    def follow(value: Any, found: list[torch.Tensor]) -> bool:
        if type(value) is not kind or list(value) != keys or list(map(type, value)) != kinds:
            return False
        if kind is OrderedDict and getattr(value, "_metadata", None) != versions:
            return False
        if tensors:
            found += value.values()
            return True
        return _go(zip(steps, value.values(), slots, strict=True), found)

    return follow


def _sequence(value: Any, tree: list[Any]) -> Step | None:
    kind, length = type(value), len(value)
    slots = [(tree, number) for number in range(length)]
    steps = [_learn(child, child_tree) for child, child_tree in zip(value, tree, strict=True)]
    if not any(steps):
        return None

    def follow(value: Any, found: list[torch.Tensor]) -> bool:
        if type(value) is not kind or len(value) != length:
            return False
        return _go(zip(steps, value, slots, strict=True), found)

    return follow


def _go(children: Any, found: list[torch.Tensor]) -> bool:
    for step, child, (holder, key) in children:
        if step is None:
            if not _encode_plain(child, holder, key):
                return False
        elif not step(child, found):
            return False
    return True


def _encode_plain(value: Any, holder: Any, key: Any) -> bool:
    encoder = Encoder()
    try:
        tree = encoder.encode(value, "")
    except ConfigError:
        return False  # the whole is encoded again, to say where this is
    if encoder.names:
        return False  # it holds tensors, or an array that has become one: the tree has their names in the whole
    holder[key] = tree
    return True
