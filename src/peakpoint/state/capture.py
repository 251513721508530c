"""From live objects to the files of a checkpoint: ``state -> tree + tensors -> images``.

The copy of the state that is written is taken here, in one go, so that training can go on while it is being written.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np
import torch
from torch.nn.parameter import is_lazy

from peakpoint.errors import ConfigError
from peakpoint.format import layout
from peakpoint.format.manifest import Manifest
from peakpoint.format.names import check_part
from peakpoint.format.sealed import gc_paused
from peakpoint.repository.commit import FileImage, WholeImage
from peakpoint.state import rng
from peakpoint.state.encode_cache import EncodeCache
from peakpoint.state.host_copy import Storage, storage_of, versions_of
from peakpoint.state.step_guard import StateCopy
from peakpoint.state.streamed_copy import RingBuffer
from peakpoint.state.tensor_files import StagingBuffer
from peakpoint.state.typed_json import Encoder
from peakpoint.state.unchanged import PartTensors, UnchangedTensors


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


def is_generator(value: Any) -> bool:
    """Whether it draws random numbers."""
    return isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random)


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
class CapturedState:
    """A copy of the state, ready to be written.

    Attributes:
        images: the files.
        parts: part name to the names of its tensor files.
        copying: what is still being copied.
        stays: whether the copy stays in memory until the next capture, so that it can be written again.
        committed: to be called with the manifest once it exists.
    """

    images: tuple[FileImage, ...]
    parts: Mapping[str, tuple[str, ...]]
    copying: StateCopy
    stays: bool
    committed: Callable[[Manifest], None]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(image.size for image in self.images)


class StateEncoder:
    """Encodes the parts of a state, save after save, and says which tensors go into which file.

    Args:
        shares: whether files may be shared with the checkpoint before.
    """

    def __init__(self, *, shares: bool = True) -> None:
        self._shares = shares
        self._tracers: dict[str, EncodeCache] = {}
        self._standing: dict[str, UnchangedTensors] = {}
        self._facts: dict[str, tuple[object, frozenset[Storage], PartTensors]] = {}
        self._apart: dict[str, frozenset[str]] = {}
        self._places = object()

    def encode(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]], object]:
        """See ``encode_state``; what the last call returned is overwritten.

        Returns:
            Besides, an object that is the same as long as all tensors are where they were.
        """
        same = list(self._tracers) == list(state)
        self._tracers = {name: self._tracers.get(name) or EncodeCache() for name in state}
        for name, value in state.items():
            given = state_of(value)
            again = self._tracers[name].encode(given, f'state["{name}"]', attributes=given is not value)
            same = same and again
        trees = {name: tracer.tree for name, tracer in self._tracers.items()}
        files = {name: tracer.tensors for name, tracer in self._tracers.items() if tracer.tensors}
        if not same:
            self._places = object()
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
    ) -> tuple[dict[str, Mapping[str, torch.Tensor]], set[str]]:
        """The tensor files of what ``encode`` has returned: tensors that stand still get files of their own.

        Args:
            state: part name to live object.
            files: part name to its tensors.
            stepped: memory that optimizers change; empty when there is no optimizer.

        Returns:
            File name to its tensors, and the names of the files that are likely to be those of the checkpoint before.
        """
        apart = {}
        calm = set()
        for part, tensors in files.items():
            facts = self._facts_of(part, state[part], tensors, stepped)
            if not self._shares:
                apart[part] = facts.frozen_apart
                continue
            standing = self._standing.setdefault(part, UnchangedTensors())
            standing.decide(facts, self._tracers[part].place, versions_of(tensors.values()))
            apart[part] = standing.apart
            if standing.calm:
                calm.add(part)
        if apart != self._apart:
            self._places, self._apart = object(), apart
        named: dict[str, Mapping[str, torch.Tensor]] = {}
        stable = set()
        for part, tensors in files.items():
            own = apart[part]
            main = f"{part}.safetensors"
            if not own:
                named[main] = tensors
            elif len(own) == len(tensors):
                named[main] = tensors
                stable.add(main)
            else:
                named[main] = {name: tensor for name, tensor in tensors.items() if name not in own}
                named[f"{part}{FROZEN}.safetensors"] = {name: tensors[name] for name in tensors if name in own}
                stable.add(f"{part}{FROZEN}.safetensors")
            if part in calm:
                stable.add(main)
        return named, stable

    def _facts_of(
        self, part: str, value: Any, tensors: Mapping[str, torch.Tensor], stepped: frozenset[Storage]
    ) -> PartTensors:
        place = self._tracers[part].place
        known = self._facts.get(part)
        if known is not None and place is not None and known[0] is place and known[1] is stepped:
            return known[2]
        facts = _facts(value, tensors, stepped)
        self._facts[part] = place, stepped, facts
        return facts

    def learn(self, manifest: Manifest) -> None:
        """What was captured last has been committed as ``manifest``."""
        if self._shares:
            for part in manifest.parts:
                if part in self._standing:
                    self._standing[part].learn(_digests(manifest, manifest.parts[part]))

    def inherit(self, manifest: Manifest) -> None:
        """The state has been restored from a checkpoint: what stood still before it is expected to go on so."""
        for part, names in manifest.parts.items():
            if names:
                apart = _digests(manifest, [name for name in names if FROZEN in name])
                shared = _digests(manifest, [name for name in names if manifest.file(name).shared])
                self._standing[part] = UnchangedTensors()
                self._standing[part].inherit(_digests(manifest, names), apart.keys(), shared.keys())


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignState:
    """What is special about a state that another tool has saved: the random generators are not in it.

    Attributes:
        optional: parts that are kept, and that a training which continues from it need not have.
        images: files that exist already and hold what would be copied otherwise, by name.
    """

    optional: tuple[str, ...] = ()
    images: Mapping[str, FileImage] = field(default_factory=dict)


FROZEN = "+frozen"  # no part can have such a name


def _facts(value: Any, tensors: Mapping[str, torch.Tensor], stepped: frozenset[Storage]) -> PartTensors:
    sizes = {name: size for name, tensor in tensors.items() if (size := tensor.nbytes)}
    if not stepped:
        return PartTensors(tuple(tensors), sizes)
    memory = {name: storage_of(tensors[name]) for name in sizes}
    owned = frozenset(name for name, storage in memory.items() if storage in stepped)
    if not isinstance(value, torch.nn.Module):
        return PartTensors(tuple(tensors), sizes, stepped=owned)
    parameters = {storage_of(parameter) for parameter in value.parameters() if not is_lazy(parameter)} - stepped
    frozen = frozenset(name for name, storage in memory.items() if storage in parameters)
    return PartTensors(tuple(tensors), sizes, frozen, owned)


def _digests(manifest: Manifest, files: Sequence[str]) -> dict[str, str]:
    """The digests of all tensors in some files of a checkpoint."""
    return {tensor.name: tensor.digest for name in files for tensor in manifest.file(name).tensors}


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
    buffer: StagingBuffer | RingBuffer,
    owned: frozenset[Storage],
    stepped: frozenset[Storage],
    foreign: "ForeignState | None" = None,
) -> CapturedState:
    """Copy the state.

    On return everything is copied but the memory that is ``owned``; with a ring nothing is. Nothing is written yet.

    Args:
        state: part name to live object or plain value.
        loop: the loop's position, plain values.
        encoder: of this state, for the whole run.
        buffer: receives the tensors.
        owned: memory that may be copied later; empty to copy everything now.
        stepped: memory that optimizers change; parameters elsewhere are frozen, and get files of their own at once.
        foreign: for a state of another tool.

    Raises:
        ConfigError: something in the state cannot be kept exactly; the message says where it is.
    """
    with gc_paused():
        return _capture(state, loop, encoder, buffer, owned, stepped, foreign)


def _capture(
    state: Mapping[str, Any],
    loop: Mapping[str, Any],
    encoder: StateEncoder,
    buffer: StagingBuffer | RingBuffer,
    owned: frozenset[Storage],
    stepped: frozenset[Storage],
    foreign: "ForeignState | None",
) -> CapturedState:
    trees, files, _ = encoder.encode(state)
    extra = Encoder()
    record = {
        "format": 1,
        "parts": trees,
        "rng": extra.encode(rng.take() if foreign is None else {}, "the random number generators"),
        "loop": extra.encode(dict(loop), "the loop's position"),
    }
    assert not extra.tensors
    if foreign is not None:
        record["optional"] = [*foreign.optional, "rng"]
    text = msgspec.json.encode(record)
    named, stable = encoder.split(state, files, stepped)
    there = {} if foreign is None else foreign.images
    names = list(named)
    named = {name: tensors for name, tensors in named.items() if name not in there}
    images: Sequence[FileImage]
    copying: StateCopy
    if isinstance(buffer, RingBuffer):
        images, copying = buffer.capture(named)
    else:
        images, copying = buffer.capture(named, owned, encoder.places)
    images = [replace(image, stable=True) if image.name in stable else image for image in images]
    parts = {part: tuple(name for name in names if _part_of(name) == part) for part in trees}
    return CapturedState(
        (*images, *there.values(), WholeImage(layout.STATE, text)),
        {**parts, "rng": (), "loop": ()},
        copying,
        isinstance(buffer, StagingBuffer),
        encoder.learn,
    )
