"""Encoding a state again, quickly.

From one save to the next a state seldom changes but in its values: the same containers hold tensors in the same places.
Then the tree of the last time is used again, and only values that are not tensors are encoded anew. A state that looks
different in any way is encoded from the start.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from peakpoint.errors import ConfigError
from peakpoint.state.divided import own_shards
from peakpoint.state.json_scalars import TAG
from peakpoint.state.typed_json import Encoder

TensorTraits = list[tuple[Any, ...]]
Follower = Callable[[Any, list[torch.Tensor]], bool]
"""Collects the tensors of one value, and encodes the rest into the tree; False when the value looks different."""


def _traits(tensors: list[torch.Tensor]) -> TensorTraits:
    """Return what must be the same for each tensor to be stored as before; empty when one of them has no memory."""
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
        tensors: the tensors to store, by name.
        shards: see ``Encoder``.
        placement: the same object as long as every tensor is where it was; None when that cannot be told.
    """

    def __init__(self) -> None:
        self.tree: Any = None
        self.tensors: dict[str, torch.Tensor] = {}
        self.shards: dict[str, torch.Tensor] = {}
        self.placement: object = None
        self._follow: Follower | None = None
        self._traits: TensorTraits = []
        self._stored: dict[str, int] = {}  # name to the number of its tensor in the order of following

    def encode(self, value: Any, path: str, *, attributes: bool) -> bool:
        """Encode the part; see ``Encoder.encode``.

        Returns:
            Whether all tensors are where they were the last time.
        """
        if self._follow is not None:
            tensors: list[torch.Tensor] = []
            followed = self._follow(value, tensors)
            tensors = own_shards(tensors) if self.shards else tensors
            if followed and _traits(tensors) == self._traits != []:
                plain = [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]
                self.tensors = {name: plain[number] for name, number in self._stored.items()}
                return True
        encoder = Encoder()
        self._follow = self.placement = None
        had_tensors = bool(self.tensors)
        self.tree = encoder.encode(value, path, attributes=attributes)
        self.tensors, self.shards = encoder.tensors, encoder.shards
        self._learn(value, encoder)
        return not had_tensors and not self.tensors

    def _learn(self, value: Any, encoder: Encoder) -> None:
        numbers = {name: number for number, name in enumerate(encoder.names)}
        if not numbers.keys() >= encoder.tensors.keys() or not numbers:
            return  # bytes below several tensors, or no tensors at all
        follow = _follower(value, self.tree)
        tensors: list[torch.Tensor] = []
        # an array of the state becomes a tensor for the occasion, which cannot be followed
        if follow is not None and follow(value, tensors) and len(tensors) == len(numbers):
            self._follow, self._traits = follow, _traits(own_shards(tensors))
            self._stored = {name: numbers[name] for name in encoder.tensors}
            self.placement = object() if self._traits else None


def _follower(value: Any, tree: Any) -> Follower | None:
    """Make a follower of ``value``, which was encoded as ``tree``; None when it is neither a tensor nor holds any."""
    if isinstance(value, torch.Tensor):
        return _collect
    kind = type(value)
    if kind in (OrderedDict, tuple):
        tree = tree["v"]
    if kind in (dict, OrderedDict):
        pairs = tree["v"] if tree.get(TAG) == "dict" else None
        return _follow_children(
            value, [(tree, key) for key in value] if pairs is None else [(pair, 1) for pair in pairs]
        )
    if kind in (list, tuple):
        return _follow_children(value, [(tree, number) for number in range(len(value))])
    return None


def _collect(value: Any, tensors: list[torch.Tensor]) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    tensors.append(value)
    return True


def _children(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _outline(container: Any) -> tuple[Any, ...]:
    """Return what must be the same for a container to be encoded as before, but for its children."""
    if not isinstance(container, dict):
        return type(container), len(container)
    return type(container), list(container), list(map(type, container)), getattr(container, "_metadata", None)


def _follow_children(container: Any, slots: list[tuple[Any, Any]]) -> Follower | None:
    """Make a follower of a container.

    Args:
        slots: for each child, the dict or list of the tree that holds it, and its key there.
    """
    followers = [
        _follower(child, holder[key]) for child, (holder, key) in zip(_children(container), slots, strict=True)
    ]
    if not any(followers):
        return None
    only_tensors = all(follower is _collect for follower in followers)
    outline = _outline(container)
    outline = *outline[:-1], copy.deepcopy(outline[-1])  # the versions of modules, which may be changed in place

    def follow(value: Any, tensors: list[torch.Tensor]) -> bool:
        if type(value) is not outline[0] or _outline(value) != outline:
            return False
        if only_tensors:
            tensors += _children(value)
            return True
        for follower, child, (holder, key) in zip(followers, _children(value), slots, strict=True):
            if not (follower(child, tensors) if follower is not None else _encode_plain(child, holder, key)):
                return False
        return True

    return follow


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
