"""The mean of the tensors of several checkpoints, one tensor in memory at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peakpoint.errors import ConfigError, FormatError, MismatchError
from peakpoint.format.manifest import Manifest
from peakpoint.format.shards import StoredTensor, stored_tensors
from peakpoint.repository.root import Repository
from peakpoint.state.json_scalars import TAG, TENSOR_TAGS
from peakpoint.state.saved import check_part_of, read_trees, tensor_nodes
from peakpoint.state.shards import read_tensor
from peakpoint.state.shared_storage import TORCH_DTYPES
from peakpoint.store import Store

COUNTER = "num_batches_tracked"
STATISTICS = ("running_mean", "running_var")

_DIFFERENCES_SHOWN = 30
_GEOMETRY = ("name", "view")  # of a tensor's node: everything else may differ from member to member


@dataclass(frozen=True, slots=True, kw_only=True)
class SoupMember:
    """One part of one checkpoint, without its bytes.

    Attributes:
        tensors: every stored tensor by name, in file order.
    """

    manifest: Manifest
    tree: Any
    tensors: Mapping[str, StoredTensor]

    @property
    def ref(self) -> str:
        """The ref by id, which stays that of this checkpoint."""
        return f"{self.manifest.run}/{self.manifest.id}"

    def __str__(self) -> str:
        return f"{self.manifest.run}/{self.manifest.name}"


def find_all(repository: Repository, refs: Sequence[str], minimum: int) -> list[Manifest]:
    """Return the checkpoints that ``refs`` name, in this order.

    Raises:
        ConfigError: fewer than ``minimum``, a text instead of a list, not a ref, or one checkpoint twice.
        NotFoundError: no such run or checkpoint.
    """
    value: object = refs
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"refs= takes a list of refs, not {value!r}")
    refs = list(refs)
    if len(refs) < minimum:
        raise ConfigError(f"{len(refs)} {'ref is' if len(refs) == 1 else 'refs are'} too few: name at least {minimum}")
    ref_by_id: dict[str, str] = {}
    manifests = []
    for ref in refs:
        if not isinstance(ref, str):
            raise ConfigError(f"{ref!r} is not a ref: give texts, such as a checkpoint's .ref")
        manifest = repository.find_manifest(ref)
        if manifest.id in ref_by_id:
            raise ConfigError(
                f"{ref_by_id[manifest.id]!r} and {ref!r} name the same checkpoint, {manifest.run}/{manifest.name}: "
                "it would count twice; name each once"
            )
        ref_by_id[manifest.id] = ref
        manifests.append(manifest)
    return manifests


def member(store: Store, manifest: Manifest, part: str) -> SoupMember:
    """Read one part of a checkpoint, but for its tensors.

    Raises:
        NotFoundError: it has no such part.
        CorruptError: it is damaged.
    """
    check_part_of(manifest, part)
    tree = read_trees(store, manifest).parts[part]
    return SoupMember(manifest=manifest, tree=tree, tensors=stored_tensors(manifest, part))


# --- comparing members --------------------------------------------------------------------------------------------


def _layouts(member: SoupMember) -> dict[str, tuple[str, tuple[int, ...], Any]]:
    """Map each path to element type, shape, and place in a stored tensor."""
    layouts = {}
    for path, node in tensor_nodes(member.tree):
        stored = member.tensors[node["name"]]
        dtype, shape = stored.dtype, stored.shape
        view = node.get("view")
        if view is not None:
            dtype, shape = view["dtype"], tuple(view["shape"])
        layouts[path] = (dtype, shape, {key: node.get(key) for key in _GEOMETRY})
    return layouts


def empty_tensors(member: SoupMember) -> dict[str, torch.Tensor]:
    """Map each path to a tensor of its element type and shape that takes no memory."""
    return {
        path: torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta")
        for path, (dtype, shape, _) in _layouts(member).items()
    }


def without_tensors(tree: Any) -> Any:
    """Return a tree with null in the place of each tensor."""
    if isinstance(tree, list):
        return [without_tensors(child) for child in tree]
    if not isinstance(tree, dict):
        return tree
    return None if tree.get(TAG) in TENSOR_TAGS else {key: without_tensors(child) for key, child in tree.items()}


def _differences(first: SoupMember, second: SoupMember) -> Iterator[str]:
    of_first, of_second = _layouts(first), _layouts(second)
    for path in of_first.keys() - of_second.keys():
        yield f"{path!r} is in {first}, and not in {second}"
    for path in of_second.keys() - of_first.keys():
        yield f"{path!r} is in {second}, and not in {first}"
    for path in of_first.keys() & of_second.keys():
        (dtype, shape, place), (dtype_2, shape_2, place_2) = of_first[path], of_second[path]
        if (dtype, shape) != (dtype_2, shape_2):
            yield f"{path!r} is {dtype}{list(shape)} in {first}, and {dtype_2}{list(shape_2)} in {second}"
        elif place != place_2:
            yield f"{path!r} shares memory with other tensors in only one of {first} and {second}"


def check_alike(members: Sequence[SoupMember], part: str) -> None:
    """Refuse members that have no mean.

    Raises:
        MismatchError: names, shapes, dtypes, ties, plain values or integers differ; lists all.
        ConfigError: the part holds no tensors.
    """
    first = members[0]
    if not first.tensors:
        raise ConfigError(f"part {part!r} of {first} holds no tensors, so it has no mean")
    lines: list[str] = []
    for member in members[1:]:
        differences = sorted(_differences(first, member))
        # once all tensors are at the same paths; devices, gradients and strides of tensors may differ
        if not differences and without_tensors(first.tree) != without_tensors(member.tree):
            differences = [f"plain values in part {part!r} differ between {first} and {member}"]
        lines += differences or sorted(_integer_differences(first, member))
    if lines:
        listed = "\n  ".join(lines[:_DIFFERENCES_SHOWN])
        hidden = len(lines) - _DIFFERENCES_SHOWN
        more = f"\n  ... and {hidden} more" if hidden > 0 else ""
        raise MismatchError(f"these checkpoints have no mean:\n  {listed}{more}", tuple(lines))


def _integer_differences(first: SoupMember, second: SoupMember) -> Iterator[str]:
    """Integers and booleans have no mean, so they must be the same; their digests tell."""
    for name, dtype in elements(first).items():
        if dtype is None and name.rpartition(".")[2] != COUNTER:
            stored = first.tensors[name]
            if second.tensors[name].digest != stored.digest:
                yield f"{name!r} holds {stored.dtype}, which is not averaged, and differs between {first} and {second}"


def elements(member: SoupMember) -> dict[str, torch.dtype | None]:
    """Map each stored tensor to the element type that it is averaged in; None for those that are not averaged.

    Raises:
        ConfigError: tensors of several element types share its bytes.
        FormatError: the element type needs a newer release.
    """
    kinds: dict[str, set[str]] = {name: set() for name in member.tensors}
    for _, node in tensor_nodes(member.tree):
        name = node["name"]
        kinds[name].add(node["view"]["dtype"] if "view" in node else member.tensors[name].dtype)
    dtypes = {}
    for name, of_name in kinds.items():
        if len(of_name) > 1:
            names = ", ".join(sorted(of_name))
            raise ConfigError(f"tensors of {names} share the memory of {name!r} in {member}: it has no mean")
        kind = of_name.pop() if of_name else member.tensors[name].dtype
        if kind not in TORCH_DTYPES:
            raise FormatError(f"tensor {name!r} of {member} has elements {kind!r}: update Peakpoint")
        dtype = TORCH_DTYPES[kind]
        dtypes[name] = dtype if dtype.is_floating_point or dtype.is_complex else None
    return dtypes


# --- the mean -----------------------------------------------------------------------------------------------------


def rounded(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert double precision to a narrower type, rounded once, to nearest and ties to even.

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


class TensorMeans:
    """The means of the tensors of members that are alike.

    Takes the memory of less than four copies of one tensor in double precision, whatever the number of members: the
    sum, one member, and the look whether all of it is finite.

    Args:
        members: see ``check_alike``.
        progress: called with the bytes of each tensor that has been read.
    """

    def __init__(self, store: Store, members: Sequence[SoupMember], progress: Callable[[int], None]) -> None:
        self._store, self._progress = store, progress
        self._elements = elements(members[0])

    def mean(self, name: str, members: Sequence[SoupMember]) -> torch.Tensor:
        """Return the mean of one stored tensor over some members, in its stored type and shape.

        Summed in double precision, in the order of the members, and rounded once. Tensors that are not averaged come
        from the first member.

        Raises:
            ConfigError: a value is not finite; names tensor and member.
            CorruptError: a tensor is damaged.
        """
        dtype = self._elements[name]
        first = members[0]
        if len({member.tensors[name].digest for member in members}) == 1:
            members = members[:1]
        if dtype is None:
            return self._read(first, name)
        total = self._wide(first, name, dtype)
        for member in members[1:]:
            total += self._wide(member, name, dtype)
        mean = total.div_(len(members))
        if not torch.isfinite(mean).all():  # the sum of the largest numbers overflows
            mean = total.zero_()
            for member in members:
                mean += self._wide(member, name, dtype) / len(members)
        stored = self._read(first, name) if first.tensors[name].dtype == "U8" else None
        values = rounded(mean, dtype)
        if stored is None:
            return values.view(first.tensors[name].shape)
        octets = values.view(torch.uint8)
        stored[: len(octets)] = octets
        return stored

    def _read(self, member: SoupMember, name: str) -> torch.Tensor:
        tensor = read_tensor(self._store, member.manifest, member.tensors[name])
        self._progress(tensor.nbytes)
        return tensor

    def _wide(self, member: SoupMember, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return all elements in a row, in double precision.

        Raises:
            ConfigError: one of them is not finite.
        """
        flat = self._read(member, name).reshape(-1)
        if flat.dtype != dtype:
            flat = flat[: len(flat) // dtype.itemsize * dtype.itemsize].view(dtype)
        wide = flat.to(torch.complex128 if dtype.is_complex else torch.float64)
        del flat
        finite = torch.isfinite(wide)
        if not finite.all():
            count = int((~finite).sum())
            raise ConfigError(
                f"tensor {name!r} of {member} has {count} of {len(wide)} values that are NaN or infinite: "
                "leave this checkpoint out"
            )
        return wide
