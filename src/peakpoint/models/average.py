"""The mean of the tensors of several checkpoints, one tensor in memory at a time."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peakpoint.errors import ConfigError, FormatError, MismatchError
from peakpoint.format.manifest import FileRecord, Manifest, TensorRecord
from peakpoint.repository import reader
from peakpoint.repository.root import Repository
from peakpoint.state.json_scalars import TAG
from peakpoint.state.saved import check_part_of, read_trees, tensor_nodes
from peakpoint.state.shared_storage import TORCH_DTYPES
from peakpoint.state.tensor_files import tensors_of
from peakpoint.store import Store

COUNTER = "num_batches_tracked"
STATISTICS = ("running_mean", "running_var")

_SHOWN = 30  # differences that one message lists
_GEOMETRY = ("name", "view")  # of a tensor's node: everything else may differ from member to member


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One part of one checkpoint, without its bytes.

    Attributes:
        manifest: of the checkpoint.
        tree: of the part.
        records: name to file and place of every stored tensor, in file order.
    """

    manifest: Manifest
    tree: Any
    records: Mapping[str, tuple[FileRecord, TensorRecord]]

    @property
    def ref(self) -> str:
        """A ref that names this checkpoint and no other."""
        return f"{self.manifest.run}/{self.manifest.id}"

    def __str__(self) -> str:
        return f"{self.manifest.run}/{self.manifest.name}"


def find_all(repository: Repository, refs: Sequence[str], least: int) -> list[Manifest]:
    """The checkpoints that ``refs`` name, in this order.

    Raises:
        ConfigError: fewer than ``least``, a text instead of a list, what is no ref, or one checkpoint twice.
        NotFoundError: there is no such run or checkpoint.
    """
    given: object = refs
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f"refs= takes a list of refs, not {given!r}")
    refs = list(refs)
    if len(refs) < least:
        raise ConfigError(f"{len(refs)} {'ref is' if len(refs) == 1 else 'refs are'} given: name at least {least}")
    seen: dict[str, str] = {}
    found = []
    for ref in refs:
        if not isinstance(ref, str):
            raise ConfigError(f"{ref!r} is no ref: give texts, such as a checkpoint's .ref")
        manifest = repository.find_manifest(ref)
        if manifest.id in seen:
            raise ConfigError(
                f"{seen[manifest.id]!r} and {ref!r} name the same checkpoint, {manifest.run}/{manifest.name}: "
                "it would count twice; name each once"
            )
        seen[manifest.id] = ref
        found.append(manifest)
    return found


@contextlib.contextmanager
def held(store: Store, manifests: Sequence[Manifest]) -> Iterator[None]:
    """No rule removes these as long as this lasts."""
    with contextlib.ExitStack() as holds:
        for manifest in manifests:
            hold = reader.hold_for_reading(store, manifest)
            if hold is not None:
                holds.callback(hold.release)
        yield


def member(store: Store, manifest: Manifest, part: str) -> Member:
    """One part of a checkpoint, but for its tensors.

    Raises:
        NotFoundError: it has no such part.
        CorruptError: it is damaged.
    """
    check_part_of(manifest, part)
    files = [manifest.file(name) for name in manifest.parts[part]]
    records = {record.name: (file, record) for file in files for record in file.tensors}
    return Member(manifest=manifest, tree=read_trees(store, manifest).parts[part], records=records)


# --- do they go together? -----------------------------------------------------------------------------------------


def _outline(tree: Any) -> Any:
    """A tree without what may differ: devices, gradients, strides in memory."""
    if isinstance(tree, list):
        return [_outline(child) for child in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.get(TAG) == "tensor":
        return {TAG: "tensor"}
    return {key: _outline(child) for key, child in tree.items()}


def _described(one: Member) -> dict[str, tuple[str, tuple[int, ...], Any]]:
    """Path to element type, shape, and where in which stored tensor."""
    found = {}
    for path, node in tensor_nodes(one.tree):
        dtype, shape = one.records[node["name"]][1][1:3]
        view = node.get("view")
        if view is not None:
            dtype, shape = view["dtype"], tuple(view["shape"])
        found[path] = (dtype, shape, {key: node.get(key) for key in _GEOMETRY})
    return found


def blanks(one: Member) -> dict[str, torch.Tensor]:
    """Path to a tensor of that element type and shape which has no values and takes no memory."""
    return {
        path: torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta")
        for path, (dtype, shape, _) in _described(one).items()
    }


def without_tensors(tree: Any) -> Any:
    """A tree with null in the place of each tensor."""
    if isinstance(tree, list):
        return [without_tensors(child) for child in tree]
    if not isinstance(tree, dict):
        return tree
    return None if tree.get(TAG) == "tensor" else {key: without_tensors(child) for key, child in tree.items()}


def _differences(one: Member, other: Member) -> Iterator[str]:
    mine, theirs = _described(one), _described(other)
    for path in mine.keys() - theirs.keys():
        yield f"{path!r} is in {one}, and not in {other}"
    for path in theirs.keys() - mine.keys():
        yield f"{path!r} is in {other}, and not in {one}"
    for path in mine.keys() & theirs.keys():
        (dtype, shape, place), (its_dtype, its_shape, its_place) = mine[path], theirs[path]
        if (dtype, shape) != (its_dtype, its_shape):
            yield f"{path!r} is {dtype}{list(shape)} in {one}, and {its_dtype}{list(its_shape)} in {other}"
        elif place != its_place:
            yield f"{path!r} shares memory with other tensors in one of {one} and {other}, and not in the other"


def check_alike(members: Sequence[Member], part: str) -> None:
    """Refuse members that have no mean.

    Raises:
        MismatchError: names, shapes, dtypes, ties, values that are no tensors, or integers differ; lists all.
        ConfigError: the part holds no tensors.
    """
    first, *others = members
    if not first.records:
        raise ConfigError(f"part {part!r} of {first} holds no tensors, so it has no mean")
    lines: list[str] = []
    for other in others:
        found = sorted(_differences(first, other))
        if not found and _outline(first.tree) != _outline(other.tree):
            found = [f"values in part {part!r} that are no tensors differ between {first} and {other}"]
        if not found:
            found = sorted(_fixed_differ(first, other))
        lines += found
    if lines:
        shown = "\n  ".join(lines[:_SHOWN])
        more = f"\n  ... and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise MismatchError(f"these checkpoints have no mean:\n  {shown}{more}", tuple(lines))


def _fixed_differ(one: Member, other: Member) -> Iterator[str]:
    """Integers and booleans have no mean, so they must be the same; their digests tell."""
    for name, dtype in elements(one).items():
        if dtype is None and name.rpartition(".")[2] != COUNTER:
            record, its = one.records[name][1], other.records[name][1]
            if its.digest != record.digest:
                yield f"{name!r} holds {record.dtype}, which is not averaged, and differs between {one} and {other}"


def elements(one: Member) -> dict[str, torch.dtype | None]:
    """The element type that each stored tensor is averaged in; None for those that are not averaged.

    Raises:
        ConfigError: bytes of one are shared by tensors of several element types.
        FormatError: an element type that this release does not know.
    """
    kinds: dict[str, set[str]] = {name: set() for name in one.records}
    for _, node in tensor_nodes(one.tree):
        name = node["name"]
        kinds[name].add(node["view"]["dtype"] if "view" in node else one.records[name][1].dtype)
    found = {}
    for name, several in kinds.items():
        if len(several) > 1:
            names = ", ".join(sorted(several))
            raise ConfigError(f"tensors of {names} share the memory of {name!r} in {one}: it has no mean")
        kind = several.pop() if several else one.records[name][1].dtype
        if kind not in TORCH_DTYPES:
            raise FormatError(f"tensor {name!r} of {one} has elements {kind!r}: update Peakpoint")
        dtype = TORCH_DTYPES[kind]
        found[name] = dtype if dtype.is_floating_point or dtype.is_complex else None
    return found


# --- the mean -----------------------------------------------------------------------------------------------------


def rounded(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Double precision to a narrower type, rounded once, to nearest and ties to even.

    torch goes through single precision and so rounds twice to types of 8 and 16 bits. Here the first of the two is to
    odd, after which the second gives what one rounding would have given. Source: Boldo and Melquiond, "Emulation of a
    FMA and Correctly Rounded Sums: Proved Algorithms Using Rounding to Odd", IEEE Transactions on Computers, 2008.

    Example:
        >>> tie = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)  # a little above the middle of two
        >>> tie.to(torch.bfloat16).item(), rounded(tie, torch.bfloat16).item()
        (1.0, 1.0078125)
    """
    if dtype.itemsize > 2:
        return wide.to(dtype)
    single = wide.to(torch.float32)
    back = single.to(torch.float64)
    bits = single.view(torch.int32)
    inexact = back != wide
    away = back.abs_() > wide.abs()
    del back
    bits -= away.to(torch.int32)  # towards zero, then to odd
    bits |= inexact.to(torch.int32)
    return single.to(dtype)


class Averaging:
    """The means of members that have been found alike.

    In memory are less than four copies of one tensor in double precision, whatever the number of members: the sum, one
    member, and what it takes to look whether all of it is finite.

    Args:
        store: where.
        members: see ``check_alike``.
        progress: called with the bytes of each tensor that has been read.
    """

    def __init__(self, store: Store, members: Sequence[Member], progress: Callable[[int], None]) -> None:
        self._store, self._progress = store, progress
        self._elements = elements(members[0])

    def mean(self, name: str, members: Sequence[Member]) -> torch.Tensor:
        """The mean of one stored tensor over some members, in its stored type and shape.

        Summed in double precision, in the order of the members, and rounded once. What is not averaged is that of the
        first member.

        Raises:
            ConfigError: a value that is not finite, with tensor and member.
            CorruptError: a tensor is damaged.
        """
        dtype = self._elements[name]
        first = members[0]
        if len({one.records[name][1].digest for one in members}) == 1:
            members = members[:1]
        if dtype is None:
            return self._read(first, name)
        total = self._wide(first, name, dtype)
        for one in members[1:]:
            total += self._wide(one, name, dtype)
        mean = total.div_(len(members))
        if not torch.isfinite(mean).all():  # sums of the largest numbers there are
            mean = total.zero_()
            for one in members:
                mean += self._wide(one, name, dtype) / len(members)
        stored = self._read(first, name) if first.records[name][1].dtype == "U8" else None
        values = rounded(mean, dtype)
        if stored is None:
            return values.view(first.records[name][1].shape)
        octets = values.view(torch.uint8)
        stored[: len(octets)] = octets
        return stored

    def _read(self, one: Member, name: str) -> torch.Tensor:
        file, record = one.records[name]
        data = reader.read_tensor(self._store, one.manifest, file, record)
        alone = FileRecord(
            name=file.name, size=len(data), digest="", tensors=(record._replace(begin=0, end=len(data)),)
        )
        tensor = tensors_of(alone, memoryview(data))[name]
        self._progress(len(data))
        return tensor

    def _wide(self, one: Member, name: str, dtype: torch.dtype) -> torch.Tensor:
        """All elements in a row, in double precision.

        Raises:
            ConfigError: one of them is not finite.
        """
        flat = self._read(one, name).reshape(-1)
        if flat.dtype != dtype:
            flat = flat[: len(flat) // dtype.itemsize * dtype.itemsize].view(dtype)
        wide = flat.to(torch.complex128 if dtype.is_complex else torch.float64)
        del flat
        finite = torch.isfinite(wide)
        if not finite.all():
            count = int((~finite).sum())
            raise ConfigError(
                f"tensor {name!r} of {one} has {count} of {len(wide)} values that are NaN or infinite: "
                "leave this checkpoint out"
            )
        return wide
