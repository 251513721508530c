"""From live objects to the files of a checkpoint: ``state -> tree + tensors -> images``.

The copy of the state that is written is taken here, in one go, so that training can go on while it is being written.
"""

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import torch
from torch.nn.parameter import is_lazy

from peakpoint.errors import ConfigError
from peakpoint.format import layout
from peakpoint.format.manifest import Manifest
from peakpoint.format.sealed import gc_paused
from peakpoint.repository.commit import FileImage, image_of
from peakpoint.state import rng
from peakpoint.state.divided import Offsets, layout_of, own_shard, shards_plan, shards_to_write
from peakpoint.state.encode_cache import EncodeCache
from peakpoint.state.host_copy import Storage, storage_of, versions_of
from peakpoint.state.origin import PartOrigin, origins_of, param_groups
from peakpoint.state.parts import saves_nothing, state_of
from peakpoint.state.step_guard import StateCopy
from peakpoint.state.streamed_copy import RingBuffer
from peakpoint.state.tensor_files import FileShards, StagingBuffer
from peakpoint.state.typed_json import Encoder
from peakpoint.state.unchanged import PartTensors, UnchangedTensors


@dataclass(frozen=True, slots=True)
class CapturedState:
    """A copy of the state, ready to be written.

    Attributes:
        images: the files.
        parts: part name to the names of its tensor files.
        copying: the copy under way, which the images wait for.
        stays: whether the copy stays in memory until the next capture, so that it can be written again.
        committed: to be called with the manifest once it exists.
        empty: the parts that have given an empty state, though they have something to save.
    """

    images: tuple[FileImage, ...]
    parts: Mapping[str, tuple[str, ...]]
    copying: StateCopy
    stays: bool
    committed: Callable[[Manifest], None]
    empty: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(image.size for image in self.images)


FROZEN = "+frozen"  # no part can have such a name
LOOP = "loop"  # its file has the tensors of the ranks' own states


class _PartEncoder:
    """Encodes one part of a state, save after save, and knows which of its tensors should have a file of their own."""

    def __init__(self) -> None:
        self.cache = EncodeCache()
        self.unchanged = UnchangedTensors()
        self._tensors = PartTensors((), {})
        self._valid_for: tuple[object, frozenset[Storage]] | None = None

    def separate(self, value: Any, stepped: frozenset[Storage], *, shares: bool) -> frozenset[str]:
        """Return the names of the tensors for the separate file; see ``StateEncoder.split``."""
        tensors = self.cache.tensors
        conditions = self.cache.placement, stepped
        if self.cache.placement is None or self._valid_for != conditions:
            self._tensors, self._valid_for = _part_tensors(value, tensors, stepped), conditions
        if not shares:
            return self._tensors.separate_frozen
        self.unchanged.decide(self._tensors, self.cache.placement, versions_of(tensors.values()))
        return self.unchanged.separate


class StateEncoder:
    """Encodes the parts of a state, save after save, and decides which tensors go into which file.

    Args:
        shares: whether files may be shared with the checkpoint before.

    Attributes:
        placement: the same object as long as all tensors are where they were, and in the same files.
        settings: of optimizers and schedulers by part, as the script has made them; see ``script_settings``.
        rank: of this process.
    """

    def __init__(self, *, shares: bool = True) -> None:
        self.placement = object()
        self.settings: Mapping[str, Mapping[str, Any]] = {}
        self._origins: tuple[object, dict[str, PartOrigin]] | None = None
        self._shares = shares
        self.rank = 0
        self._planned: list[tuple[Any, ...]] = []
        self._written: dict[str, dict[str, Offsets]] = {}
        self._parts: dict[str, _PartEncoder] = {}
        self._separate: dict[str, frozenset[str]] = {}

    def encode(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
        """Encode every part, copying nothing. The next call overwrites what this one returns.

        Returns:
            The tree of each part, and the tensors to be stored of each part that has any.

        Raises:
            ConfigError: something cannot be kept exactly; the message says where it is.
        """
        same = list(self._parts) == list(state)
        self._parts = {name: self._parts.get(name) or _PartEncoder() for name in state}
        for name, value in state.items():
            content = state_of(value)
            cache = self._parts[name].cache
            same = cache.encode(content, f'state["{name}"]', attributes=content is not value) and same
        if not same:
            self.placement = object()
        return self.trees, {name: part.cache.tensors for name, part in self._parts.items() if part.cache.tensors}

    @property
    def trees(self) -> dict[str, Any]:
        """The tree of each part, as the last ``encode`` or ``plan`` has made it."""
        return {name: part.cache.tree for name, part in self._parts.items()}

    @property
    def is_divided(self) -> bool:
        """Whether there are tensors that are divided among ranks."""
        return bool(self._planned)

    @gc_paused()
    def plan(self, state: Mapping[str, Any], share: Callable[[Callable[[], Any]], Sequence[Any]]) -> None:
        """Encode a state, and decide which rank writes which shard, unless that is as it was; called on every rank.

        Args:
            state: part name to live object or plain value.
            share: does some work on every rank, and returns what it has made on each.
        """
        divided: dict[str, Any] = {}

        def encode() -> bool:
            self.encode(state)
            divided.update(
                (f"{part}/{name}", encoder.cache.shards[name])
                for part, encoder in self._parts.items()
                for name in encoder.cache.tensors
                if name in encoder.cache.shards
            )
            return layout_of(divided) == self._planned

        if all(share(encode)):
            return
        self._planned, self._written, self.placement = layout_of(divided), {}, object()
        for place, offsets in shards_to_write(share(lambda: shards_plan(divided)), self.rank).items():
            part, _, name = place.partition("/")
            self._written.setdefault(part, {})[name] = offsets

    def split(
        self, state: Mapping[str, Any], stepped: frozenset[Storage]
    ) -> tuple[dict[str, Mapping[str, torch.Tensor]], set[str], FileShards]:
        """Divide the tensors that ``encode`` has collected into files: unchanged ones get a file of their own.

        Shards of this rank get files of their own, too; what is whole is rank 0's to write.

        Args:
            state: part name to live object, as it was encoded.
            stepped: memory that optimizers change; empty when there is no optimizer.

        Returns:
            File name to its tensors, the names of the files that are likely to be those of the checkpoint before, and
            the places of shards.
        """
        separate = {
            name: part.separate(state[name], stepped, shares=self._shares)
            for name, part in self._parts.items()
            if part.cache.tensors
        }
        if separate != self._separate:
            self.placement, self._separate = object(), separate
        files: dict[str, Mapping[str, torch.Tensor]] = {}
        stable = set()
        offsets: dict[str, dict[str, Offsets]] = {}
        for part, names in separate.items():
            main, frozen, *_ = _file_names(part)
            tensors = self._parts[part].cache.tensors
            if not names or len(names) == len(tensors):
                files[main] = tensors
            else:
                files[main] = {name: tensor for name, tensor in tensors.items() if name not in names}
                files[frozen] = {name: tensor for name, tensor in tensors.items() if name in names}
            if names:
                stable.add(frozen if frozen in files else main)
            if self._parts[part].unchanged.rest_unchanged:
                stable.add(main)
            if self._parts[part].cache.shards and not self.is_divided:
                raise ConfigError(
                    f'state["{part}"] holds tensors that are divided among ranks, and no model or optimizer in '
                    "state= had such parameters when the Checkpointer was made: call fully_shard() before, and "
                    "name the model in state="
                )
            if self._parts[part].cache.shards or self.rank:
                for file in (main, frozen):
                    offsets |= self._without_shards(part, file, files, stable)
        return files, stable, offsets

    def _without_shards(
        self, part: str, file: str, files: dict[str, Mapping[str, torch.Tensor]], stable: set[str]
    ) -> dict[str, dict[str, Offsets]]:
        """Put the shards that this rank writes into a file of their own; returns their places in it."""
        tensors, places = files.pop(file, {}), self._written.get(part, {})
        whole = {name: tensor for name, tensor in tensors.items() if name not in self._parts[part].cache.shards}
        shards = {name: tensor for name, tensor in tensors.items() if name in places}
        of_rank = layout.rank_file(file, self.rank)
        if file in stable:
            stable.add(of_rank)
        if whole and not self.rank:
            files[file] = whole
        if not shards:
            return {}
        files[of_rank] = shards
        return {of_rank: {name: places[name] for name in shards}}

    def origins(self, state: Mapping[str, Any]) -> dict[str, PartOrigin]:
        """Return what the parts are saved from, after ``encode``."""
        optimizers = [value for value in state.values() if isinstance(value, torch.optim.Optimizer)]
        conditions = (
            self.placement,
            [list(map(id, group["params"])) for optimizer in optimizers for group in param_groups(optimizer)],
        )
        if self._origins is None or self._origins[0] != conditions:
            self._origins = conditions, origins_of(state, self.settings)
        return self._origins[1]

    def learn(self, manifest: Manifest) -> None:
        """Compare the digests of ``manifest``, as which the last capture has been committed, with those before."""
        if self._shares:
            for part, files in manifest.parts.items():
                if files and part in self._parts:
                    self._parts[part].unchanged.learn(self._digests(manifest, files))

    def inherit(self, manifest: Manifest) -> None:
        """Go on from a checkpoint that the state has been restored from: expect the same tensors not to change."""
        for part, files in manifest.parts.items():
            if files:
                separate = self._digests(manifest, [name for name in files if FROZEN in name])
                shared = self._digests(manifest, [name for name in files if manifest.file(name).shared])
                encoder = self._parts.setdefault(part, _PartEncoder())
                encoder.unchanged = UnchangedTensors()
                encoder.unchanged.inherit(self._digests(manifest, files), separate.keys(), shared.keys())

    def _digests(self, manifest: Manifest, files: Sequence[str]) -> dict[str, str]:
        """Return the digests of all tensors in some files of a checkpoint, those of other ranks left out."""
        own_files = [name for name in files if (layout.rank_of(name) or 0) == self.rank]
        return {tensor.name: tensor.digest for name in own_files for tensor in manifest.file(name).tensors}


def _part_tensors(value: Any, tensors: Mapping[str, torch.Tensor], stepped: frozenset[Storage]) -> PartTensors:
    sizes = {name: size for name, tensor in tensors.items() if (size := tensor.nbytes)}
    if not stepped:
        return PartTensors(tuple(tensors), sizes)
    storages = {name: storage_of(tensors[name]) for name in sizes}
    stepped_names = frozenset(name for name, storage in storages.items() if storage in stepped)
    if not isinstance(value, torch.nn.Module):
        return PartTensors(tuple(tensors), sizes, stepped=stepped_names)
    own_parameters = [own_shard(parameter) for parameter in value.parameters() if not is_lazy(parameter)]
    parameters = {*map(storage_of, own_parameters)} - stepped
    frozen = frozenset(name for name, storage in storages.items() if storage in parameters)
    return PartTensors(tuple(tensors), sizes, frozen, stepped_names)


def _file_names(part: str, rank: int = 0) -> tuple[str, ...]:
    """Return the names of a part's file, of its separate file, and of those of a rank."""
    names = f"{part}.safetensors", f"{part}{FROZEN}.safetensors"
    return *names, *(layout.rank_file(name, rank) for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignState:
    """Options for a state that another tool has saved.

    Attributes:
        generators: the states of the random generators as ``rng.pack`` returns them, empty when there are none.
        optional: parts that are kept, and that a training which continues from it need not have.
        images: files that exist already and hold what would be copied otherwise, by name.
    """

    generators: Mapping[str, Any] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    images: Mapping[str, FileImage] = field(default_factory=dict)


def _state_file(
    trees: Mapping[str, Any], origins: Mapping[str, PartOrigin], loop: Mapping[str, Any], foreign: ForeignState | None
) -> FileImage:
    encoder = Encoder()
    record = {
        "format": 1,
        "parts": trees,
        "rng": encoder.encode(
            rng.take() if foreign is None else dict(foreign.generators), "the random number generators"
        ),
        "loop": encoder.encode(dict(loop), "the loop's position"),
    }
    assert not encoder.tensors
    if LOOP in trees:
        record["parts"] = {part: tree for part, tree in trees.items() if part != LOOP}
        record["ranks"] = trees[LOOP]
    if foreign is not None:
        record["optional"] = [*foreign.optional, *([] if foreign.generators else ["rng"])]
    elif origins:
        record["origins"] = origins
    return image_of(layout.STATE, msgspec.json.encode(record))


@gc_paused()
def capture_shards(
    state: Mapping[str, Any],
    encoder: StateEncoder,
    buffer: StagingBuffer | RingBuffer,
    owned: frozenset[Storage],
    stepped: frozenset[Storage],
) -> CapturedState:
    """Copy the shards that a rank other than 0 writes; see ``capture``. ``StateEncoder.plan`` comes first."""
    files, stable, offsets = encoder.split(state, stepped)
    images, copying = _copy(files, stable, offsets, encoder, buffer, owned)
    parts = {part: tuple(name for name in _file_names(part, encoder.rank) if name in files) for part in state}
    return CapturedState(images, parts, copying, stays=False, committed=encoder.learn)


def _copy(
    files: Mapping[str, Mapping[str, torch.Tensor]],
    stable: AbstractSet[str],
    offsets: FileShards,
    encoder: StateEncoder,
    buffer: StagingBuffer | RingBuffer,
    owned: frozenset[Storage],
) -> tuple[tuple[FileImage, ...], StateCopy]:
    images: Sequence[FileImage]
    copying: StateCopy
    if isinstance(buffer, RingBuffer):
        images, copying = buffer.capture(files, offsets)
    else:
        images, copying = buffer.capture(files, owned, encoder.placement, offsets)
    return tuple(replace(image, stable=True) if image.name in stable else image for image in images), copying


@gc_paused()
def capture(
    state: Mapping[str, Any],
    loop: Mapping[str, Any],
    encoder: StateEncoder,
    buffer: StagingBuffer | RingBuffer,
    owned: frozenset[Storage],
    stepped: frozenset[Storage],
    foreign: ForeignState | None = None,
    ranks: Sequence[Mapping[str, Any]] = (),
) -> CapturedState:
    """Copy the state.

    On return everything is copied but the memory that is ``owned``; with a ring nothing is. Nothing is written yet.

    Args:
        state: part name to live object or plain value.
        loop: the loop's position, plain values.
        encoder: of this state, for the whole run; where tensors are divided, ``plan`` has encoded it a moment ago.
        buffer: receives the tensors.
        owned: memory that may be copied later; empty to copy everything now.
        stepped: memory that optimizers change; parameters elsewhere are frozen, and get files of their own at once.
        foreign: for a state of another tool.
        ranks: what the other ranks have of their own, from rank 1 on.

    Raises:
        ConfigError: something in the state cannot be kept exactly; the message says where it is.
    """
    saved = {**state, LOOP: list(ranks)} if ranks else state
    trees = encoder.trees if encoder.is_divided else encoder.encode(saved)[0]
    state_file = _state_file(trees, encoder.origins(state), loop, foreign)
    files, stable, offsets = encoder.split(saved, stepped)
    ready_images = {} if foreign is None else foreign.images
    copied = {name: tensors for name, tensors in files.items() if name not in ready_images}
    images, copying = _copy(copied, stable, offsets, encoder, buffer, owned)
    parts = {part: tuple(name for name in _file_names(part, encoder.rank) if name in files) for part in state}
    loop_files = tuple(name for name in _file_names(LOOP) if name in files)
    return CapturedState(
        (*images, *ready_images.values(), state_file),
        {**parts, "rng": (), LOOP: loop_files},
        copying,
        isinstance(buffer, StagingBuffer) and not encoder.is_divided,
        encoder.learn,
        tuple(name for name, value in state.items() if saves_nothing(value, trees[name])),
    )
