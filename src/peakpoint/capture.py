"""From live objects to the files of a checkpoint: ``state -> tree + tensors -> images``.

The copy of the state that is written is taken here, in one go, so that training can go on while it is being written.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np
import torch
from torch.nn.parameter import is_lazy

from peakpoint import layout, rng
from peakpoint.collector import no_collection
from peakpoint.copying import Storage, Transfer, storage_of
from peakpoint.errors import ConfigError
from peakpoint.names import check_part
from peakpoint.ring import Ring
from peakpoint.tensors import Staging
from peakpoint.tracing import Tracer
from peakpoint.tree import Encoder
from peakpoint.writer import FileImage, WholeImage


@runtime_checkable
class Stateful(Protocol):
    """Anything that gives and takes its state: modules, optimizers, schedulers, data loaders, objects of yours."""

    def state_dict(self) -> Any:
        """The state."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take the state."""


def check_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state as a dict of parts.

    Raises:
        ConfigError: it is no mapping, it is empty, or a part cannot be named so.
    """
    if not isinstance(state, Mapping):
        raise ConfigError(f'state= takes a mapping such as {{"model": model, "optimizer": optimizer}}, not {state!r}')
    if not state:
        raise ConfigError('state= is empty: name at least one part, such as {"model": model}')
    return {check_part(name): value for name, value in state.items()}


def state_of(value: Any) -> Any:
    """The state of one part as a tree of tensors and plain values."""
    if isinstance(value, type):
        return value  # a class is no object; the encoder refuses it with its place
    if isinstance(value, Stateful):
        return value.state_dict()
    if isinstance(value, torch.Generator):
        return {"generator": value.get_state()}
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    if type(value) is random.Random:
        return value.getstate()
    return value


@dataclass(frozen=True, slots=True)
class Captured:
    """A copy of the state, ready to be written.

    Attributes:
        images: the files.
        parts: part name to the names of its tensor files.
        copying: what is still being copied.
        stays: whether the copy stays in memory until the next capture, so that it can be written again.
    """

    images: tuple[FileImage, ...]
    parts: Mapping[str, tuple[str, ...]]
    copying: Transfer
    stays: bool

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(image.size for image in self.images)


class StateEncoder:
    """Encodes the parts of a state, save after save."""

    def __init__(self) -> None:
        self._tracers: dict[str, Tracer] = {}
        self._places = object()
        self._frozen: dict[str, frozenset[str]] = {}
        self._stepped: frozenset[Storage] | None = None

    def encode(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]], object]:
        """See ``encode_state``; what the last call returned is overwritten.

        Returns:
            Besides, an object that is the same as long as all tensors are where they were.
        """
        same = list(self._tracers) == list(state)
        self._tracers = {name: self._tracers.get(name) or Tracer() for name in state}
        for name, value in state.items():
            given = state_of(value)
            again = self._tracers[name].encode(given, f'state["{name}"]', attributes=given is not value)
            same = same and again
        trees = {name: tracer.tree for name, tracer in self._tracers.items()}
        files = {name: tracer.tensors for name, tracer in self._tracers.items() if tracer.tensors}
        if not same:
            self._places, self._frozen, self._stepped = object(), {}, None
        return trees, files, self._places

    @property
    def places(self) -> object:
        """The same object as long as all tensors are where they were, and in the same files."""
        return self._places

    def split(
        self,
        state: Mapping[str, Any],
        files: Mapping[str, Mapping[str, torch.Tensor]],
        stepped: frozenset[Storage],
    ) -> tuple[dict[str, dict[str, torch.Tensor]], set[str]]:
        """The tensor files of what ``encode`` has returned: parameters that nothing trains get files of their own.

        Args:
            state: part name to live object.
            files: part name to its tensors.
            stepped: memory that optimizers change; empty when there is no optimizer.

        Returns:
            File name to its tensors, and the names of the files that hold only frozen parameters.
        """
        if stepped is not self._stepped:
            frozen = {part: _frozen(state[part], tensors, stepped) for part, tensors in files.items()}
            if frozen != self._frozen:
                self._places, self._frozen = object(), frozen
            self._stepped = stepped
        named: dict[str, dict[str, torch.Tensor]] = {}
        stable = set()
        for part, tensors in files.items():
            apart = self._frozen[part]
            whole = len(apart) == len(tensors)
            if apart:
                name = f"{part}.safetensors" if whole else f"{part}{FROZEN}.safetensors"
                stable.add(name)
            if not whole:
                named[f"{part}.safetensors"] = {name: t for name, t in tensors.items() if name not in apart}
            if apart:
                named[name] = {key: tensors[key] for key in tensors if key in apart}
        return named, stable


FROZEN = "+frozen"  # no part can have such a name
_WORTH_A_FILE = 64 * 1024  # bytes


def _frozen(value: Any, tensors: Mapping[str, torch.Tensor], stepped: frozenset[Storage]) -> frozenset[str]:
    """The names of tensors that are parameters of a module, and that no optimizer steps on."""
    if not isinstance(value, torch.nn.Module) or not stepped:
        return NONE
    parameters = {storage_of(parameter) for parameter in value.parameters() if not is_lazy(parameter)} - stepped
    names = [name for name, tensor in tensors.items() if tensor.numel() and storage_of(tensor) in parameters]
    enough = sum(tensors[name].nbytes for name in names) >= _WORTH_A_FILE
    return frozenset(names) if enough else NONE


NONE: frozenset[str] = frozenset()


def _part_of(file: str) -> str:
    return file.removesuffix(".safetensors").removesuffix(FROZEN)


def encode_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """Encode every part, copying nothing.

    Returns:
        The tree of each part, and the tensors to be stored in each part's file; parts without tensors have no file.

    Raises:
        ConfigError: something cannot be kept exactly; the message says where it is.
    """
    trees, files, _ = StateEncoder().encode(state)
    return trees, files


def capture(
    state: Mapping[str, Any],
    loop: Mapping[str, Any],
    encoder: StateEncoder,
    buffer: Staging | Ring,
    owned: frozenset[Storage],
    stepped: frozenset[Storage],
) -> Captured:
    """Copy the state.

    On return everything is copied but the memory that is ``owned``; with a ring nothing is. Nothing is written yet.

    Args:
        state: part name to live object or plain value.
        loop: the loop's position, plain values.
        encoder: of this state, for the whole run.
        buffer: receives the tensors.
        owned: memory that may be copied later; empty to copy everything now.
        stepped: memory that optimizers change; parameters elsewhere are frozen, and get files of their own.

    Raises:
        ConfigError: something in the state cannot be kept exactly; the message says where it is.
    """
    with no_collection():
        return _capture(state, loop, encoder, buffer, owned, stepped)


def _capture(
    state: Mapping[str, Any],
    loop: Mapping[str, Any],
    encoder: StateEncoder,
    buffer: Staging | Ring,
    owned: frozenset[Storage],
    stepped: frozenset[Storage],
) -> Captured:
    trees, files, _ = encoder.encode(state)
    extra = Encoder()
    record = {
        "format": 1,
        "parts": trees,
        "rng": extra.encode(rng.take(), "the random number generators"),
        "loop": extra.encode(dict(loop), "the loop's position"),
    }
    assert not extra.tensors
    text = msgspec.json.encode(record)
    named, stable = encoder.split(state, files, stepped)
    images: Sequence[FileImage]
    copying: Transfer
    if isinstance(buffer, Ring):
        images, copying = buffer.capture(named)
    else:
        images, copying = buffer.capture(named, owned, encoder.places)
    images = [replace(image, stable=True) if image.name in stable else image for image in images]
    parts = {part: tuple(name for name in named if _part_of(name) == part) for part in trees}
    return Captured(
        (*images, WholeImage(layout.STATE, text)),
        {**parts, "rng": (), "loop": ()},
        copying,
        isinstance(buffer, Staging),
    )
