"""The content of a checkpoint, read when it is used."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from peakpoint.errors import CorruptError, FormatError, NotFoundError
from peakpoint.format import layout
from peakpoint.format.manifest import FileRecord, Manifest
from peakpoint.format.names import OWN_PARTS, did_you_mean, no_part
from peakpoint.format.sealed import check_format, gc_paused
from peakpoint.format.shards import StoredTensor, stored_tensors
from peakpoint.repository import reader
from peakpoint.state.json_scalars import TAG, TENSOR_TAGS
from peakpoint.state.origin import NO_ORIGIN, PartOrigin
from peakpoint.state.shards import dtype_of, joined, read_tensor
from peakpoint.state.tensor_files import tensors_of
from peakpoint.state.typed_json import Decoder
from peakpoint.store import Hold, Store


@dataclass(frozen=True, slots=True)
class StateTrees:
    """The content of a checkpoint except its tensors.

    Attributes:
        parts: part name to its tree.
        rng: the tree of the generators.
        loop: the tree of the loop's position.
        ranks: the tree of what ranks have of their own, from rank 1 on; None where one process trained.
        optional: parts that a training which continues from it need not have; ``rng`` when generators were not saved.
        origins: part name to what it was saved from, of the parts of which that is known.
    """

    parts: Mapping[str, Any]
    rng: Any
    loop: Any
    ranks: Any = None
    optional: frozenset[str] = frozenset()
    origins: Mapping[str, PartOrigin] = field(default_factory=dict)

    def origin(self, part: str) -> PartOrigin:
        """Return what a part was saved from."""
        return self.origins.get(part, NO_ORIGIN)


def read_trees(store: Store, manifest: Manifest) -> StateTrees:
    """Read and verify everything but the tensors.

    Raises:
        CorruptError: a file is missing or damaged.
        FormatError: a newer release wrote it.
    """
    text = reader.read(store, manifest, _file(manifest, layout.STATE))
    try:
        with gc_paused():
            record = msgspec.json.decode(text)
        parts = {part: tree for part, tree in dict(record["parts"]).items() if part in manifest.parts}
        origins = msgspec.convert(record.get("origins", {}), dict[str, PartOrigin])
        optional = frozenset(record.get("optional", ()))
        trees = StateTrees(parts, record["rng"], record["loop"], record.get("ranks"), optional, origins)
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"{layout.STATE} of {manifest.name} cannot be read: {error!r}") from error
    check_format(record, where=f"{layout.STATE} of {manifest.name}")
    if not isinstance(trees.rng, dict) or not isinstance(trees.loop, dict):
        raise FormatError(f"{layout.STATE} of {manifest.name} has no generators or no position")
    return trees


def read_tensors(store: Store, manifest: Manifest, part: str, *, verify: bool = True) -> dict[str, torch.Tensor]:
    """Read the stored tensors of one part by name.

    Args:
        verify: compare every byte with its digest now; otherwise the files are only mapped into memory.

    Raises:
        CorruptError: a file is missing or damaged.
        FormatError: a newer release wrote it.
    """
    get = reader.read if verify else reader.view
    tensors: dict[str, torch.Tensor] = {}
    files = [_file(manifest, name) for name in manifest.parts.get(part, ())]
    stored = stored_tensors(manifest, part) if any(file.offsets for file in files) else {}
    for file in files:
        content = tensors_of(file, get(store, manifest, file))
        tensors |= joined(stored, file, content, tensors) if file.offsets else content
    return tensors


def _file(manifest: Manifest, name: str) -> FileRecord:
    try:
        return manifest.file(name)
    except KeyError as error:
        raise CorruptError(f"checkpoint {manifest.name} is damaged: its manifest names no {name}") from error


@dataclass(frozen=True, slots=True)
class SavedState:
    """The content of a checkpoint, read.

    Attributes:
        tensors: part name to its stored tensors, in memory of their own or mapped from the file.
    """

    manifest: Manifest
    trees: StateTrees
    tensors: Mapping[str, Mapping[str, torch.Tensor]]

    def value(self, part: str, *, devices: bool = False, own: bool = False) -> Any:
        """Decode one part.

        Args:
            devices: put tensors on the device that they were saved from, where it exists here.
            own: give tensors memory of their own instead of the file's mapping.
        """
        stored = self.tensors.get(part, {})
        if own:
            stored = {name: tensor.clone() for name, tensor in stored.items()}
        return Decoder(stored, devices=devices).decode(self.trees.parts[part])


@gc_paused()
def read_state(
    store: Store, manifest: Manifest, parts: Sequence[str] | None = None, *, verify: bool = True
) -> SavedState:
    """Read parts of a checkpoint.

    Args:
        parts: the parts whose tensors are read; all by default.
        verify: see ``read_tensors``.

    Raises:
        CorruptError: a file is missing or damaged.
        FormatError: a newer release wrote it.
    """
    trees = read_trees(store, manifest)
    names = [part for part in manifest.parts if parts is None or part in parts]
    return SavedState(manifest, trees, {part: read_tensors(store, manifest, part, verify=verify) for part in names})


def check_part_of(manifest: Manifest, part: str) -> str:
    """Return ``part`` if the checkpoint has it.

    Raises:
        NotFoundError: it does not; the message lists its parts.
    """
    parts = [name for name in manifest.parts if name not in OWN_PARTS]
    if part not in parts:
        raise no_part(part, parts, where=manifest.name)
    return part


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Loaded(Mapping[str, Any]):
    """The parts of a checkpoint, each read when it is first used; ``peakpoint.load`` returns it.

    A mapping of part names to state dicts and plain values. Tensors are on the CPU; large ones are mapped from the
    file where that is the fastest way, in private memory: writing to them changes nothing at rest.

    As long as this exists, rules leave the checkpoint alone; ``close`` ends that.

    Attributes:
        manifest: of the checkpoint.

    Example:
        >>> import tempfile, torch, peakpoint as pp
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"model": torch.nn.Linear(2, 1)}, keep=[pp.Last(1)]) as ckpt:
        ...     _ = ckpt.report(step=1, loss=0.5)
        >>> loaded = pp.load("r@latest", root=root)
        >>> list(loaded), loaded.tensor("model", "weight").shape
        (['model'], torch.Size([1, 2]))
        >>> loaded.names("model")["bias"]
        ('F32', (1,))
    """

    manifest: Manifest
    _store: Store
    _trees: StateTrees
    _verify: bool
    _parts: dict[str, Any] = field(default_factory=dict)
    _hold: Hold | None = None
    _device: str | torch.device | None = None

    def __getitem__(self, part: str) -> Any:
        """Return one part; its bytes are compared with their digests when it is read.

        Raises:
            KeyError: the checkpoint has no such part.
            CorruptError: it is damaged; the message names the file and the tensor.
        """
        if part not in self._trees.parts:
            raise KeyError(part)
        if part not in self._parts:
            with gc_paused():
                stored = read_tensors(self._store, self.manifest, part, verify=self._verify)
                self._parts[part] = Decoder(self._moved(stored)).decode(self._trees.parts[part])
        return self._parts[part]

    def __contains__(self, part: object) -> bool:
        """Return whether there is such a part; nothing is read."""
        return part in self._trees.parts

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the parts."""
        return iter(self._trees.parts)

    def __len__(self) -> int:
        """Return the number of parts."""
        return len(self._trees.parts)

    def __repr__(self) -> str:
        parts = ", ".join(f"{part} ({len(self.names(part))} tensors)" for part in self)
        return f"<Loaded {self.manifest.run}/{self.manifest.name}: {parts}>"

    def close(self) -> None:
        """Allow rules to remove the checkpoint; the parts that have been read stay in memory, and can be used on."""
        if self._hold is not None:
            self._hold.release()

    def verify(self) -> None:
        """Compare every byte of the checkpoint with its digests now.

        Raises:
            CorruptError: it is damaged; the message names the file and the tensor.
        """
        for file in self.manifest.files:
            reader.read(self._store, self.manifest, file)

    def names(self, part: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return element type and shape of every tensor of a part, by the path to it in the state; nothing is read.

        Raises:
            NotFoundError: the checkpoint has no such part.
        """
        return self._reader(part).kinds()

    def tensor(self, part: str, name: str) -> torch.Tensor:
        """Read one tensor, its bytes and no others, and compare them with their digest.

        Args:
            part: such as ``"model"``.
            name: the path to it, joined with dots: for the state dict of a module its key.

        Raises:
            NotFoundError: no such part or tensor.
            CorruptError: it is damaged.
        """
        tensors = self._reader(part)
        if name not in tensors.nodes:
            raise NotFoundError(
                f"part {part!r} of {self.manifest.name} has no tensor {name!r}{did_you_mean(name, list(tensors.nodes))}"
            )
        return tensors.read(name, self._device)

    def each(self, part: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over the tensors of a part with the path to each; no more than one is in memory.

        Tensors that are the same memory come once.

        Raises:
            NotFoundError: the checkpoint has no such part.
            CorruptError: it is damaged.
        """
        tensors = self._reader(part)
        read = set[str]()
        for path, node in tensors.nodes.items():
            memory = repr((node["name"], node.get("view")))
            if memory not in read:
                read.add(memory)
                yield path, tensors.read(path, self._device)

    def _moved(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Put stored tensors where they are wanted, before views of them are made."""
        if self._device is None:
            return tensors
        return {name: tensor.to(self._device) for name, tensor in tensors.items()}

    def _reader(self, part: str) -> "TensorReader":
        check_part_of(self.manifest, part)
        return tensor_reader(self._store, self.manifest, self._trees.parts[part], part)


@dataclass(frozen=True, slots=True)
class TensorReader:
    """The tensors of one part, each read when it is asked for; see ``tensor_reader``.

    Attributes:
        nodes: the path to each, and its node in the tree.
    """

    nodes: Mapping[str, dict[str, Any]]
    _store: Store
    _manifest: Manifest
    _stored: Mapping[str, StoredTensor]

    def kinds(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return element type and shape of each by its path; nothing is read."""
        return {
            path: (node["view"]["dtype"], tuple(node["view"]["shape"]))
            if "view" in node
            else (self._stored[node["name"]].dtype, self._stored[node["name"]].shape)
            for path, node in self.nodes.items()
        }

    def read(self, path: str, device: str | torch.device | None = None) -> torch.Tensor:
        """Read one, its bytes and no others, and compare them with their digest; errors as of ``read_tensor``."""
        base = read_tensor(self._store, self._manifest, self._stored[self.nodes[path]["name"]])
        return self._decoded(path, base if device is None else base.to(device))

    def outline(self, path: str) -> torch.Tensor:
        """Return one without its values, on the meta device; nothing is read.

        Raises:
            FormatError: its elements need a newer release, or its records contradict themselves.
        """
        stored = self._stored[self.nodes[path]["name"]]
        return self._decoded(path, torch.empty(stored.shape, dtype=dtype_of(stored), device="meta"))

    def _decoded(self, path: str, base: torch.Tensor) -> torch.Tensor:
        tensor: torch.Tensor = Decoder({self.nodes[path]["name"]: base}).decode(self.nodes[path])
        return tensor


def tensor_reader(store: Store, manifest: Manifest, tree: Any, part: str) -> TensorReader:
    """Return what reads the tensors of a part one by one.

    Args:
        tree: of the part.

    Raises:
        CorruptError: the shards of a tensor do not make a whole.
    """
    return TensorReader(dict(tensor_nodes(tree)), store, manifest, stored_tensors(manifest, part))


def is_tensor_node(tree: Any) -> bool:
    """Return whether a tree is a tensor."""
    return isinstance(tree, dict) and tree.get(TAG) in TENSOR_TAGS


def tensor_nodes(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over the tensors in a tree, with the keys that lead to them."""
    if isinstance(tree, list):
        for number, child in enumerate(tree):
            yield from tensor_nodes(child, (*path, str(number)))
    elif isinstance(tree, dict):
        tag = tree.get(TAG)
        if tag in TENSOR_TAGS:
            yield ".".join(path), tree
        elif tag == "dict":
            for key, child in tree["v"]:
                yield from tensor_nodes(child, (*path, str(Decoder({}).decode(key))))
        elif tag is None:
            for key, child in tree.items():
                yield from tensor_nodes(child, (*path, key))
        elif isinstance(tree.get("v"), dict | list):
            yield from tensor_nodes(tree["v"], path)
