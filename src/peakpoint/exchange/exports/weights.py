"""The weights of an export: without the names of wrappers, and with masks folded in."""

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import torch

from peakpoint.errors import ConfigError, PeakpointWarning
from peakpoint.format.manifest import Manifest, TensorRecord
from peakpoint.format.masks import ORIGINAL, masks_of
from peakpoint.state.json_scalars import TAG, kind_of
from peakpoint.state.origin import PartOrigin
from peakpoint.state.saved import StateTrees, is_tensor_node, read_state, tensor_reader
from peakpoint.store import Store

_COMPILED = "_orig_mod"  # no other code names a layer so
_PARALLEL = {"torch.nn.parallel.data_parallel.DataParallel", "torch.nn.parallel.distributed.DistributedDataParallel"}


@dataclass(frozen=True, slots=True)
class WeightOptions:
    """How weights are written.

    Attributes:
        strip_prefix: removed from the names that begin with it.
        fold_masks: write weights that ``torch.nn.utils.prune`` has masked as the product of original and mask.
    """

    strip_prefix: str = ""
    fold_masks: bool = False


AS_SAVED = WeightOptions()


@dataclass(frozen=True, slots=True)
class WeightStream:
    """Weights on their way to a file, one of them in memory at a time; a masked one together with its mask.

    Attributes:
        kinds: of each by its name in the file, a tensor of its element type and shape, whose values do not count.
        read: gives its values.
    """

    kinds: Mapping[str, torch.Tensor]
    read: Callable[[str], torch.Tensor]

    def write(self, file: BinaryIO, header: bytes, spans: Iterable[TensorRecord]) -> None:
        """Write a header, and the tensors that it describes."""
        file.write(header)
        for span in spans:
            if span.end > span.begin:
                octets = self.read(span.name).detach().contiguous().reshape(-1).view(torch.uint8)
                file.write(memoryview(octets.numpy()))  # type: ignore[arg-type] # is a buffer


def weight_stream(
    store: Store, manifest: Manifest, trees: StateTrees, part: str, options: WeightOptions
) -> WeightStream:
    """Return the weights of a part as they are written; see ``exported``.

    Raises:
        ConfigError: the part is not a dict of tensors, or see ``exported``.
        CorruptError: the checkpoint is damaged.
    """
    tree, origin = trees.parts[part], trees.origin(part)
    children = tree.get("v") if isinstance(tree, dict) and TAG in tree else tree
    if not isinstance(children, dict) or any(not is_tensor_node(child) for child in children.values()):
        value = exported(part, read_state(store, manifest, [part]).value(part), origin, options)
        check_weights(part, value)
        return WeightStream(value, value.__getitem__)
    tensors = tensor_reader(store, manifest, tree, part)
    saved = {path: tensors.outline(path) for path in tensors.nodes}
    paths = {id(tensor): path for path, tensor in saved.items()}
    plain = exported(part, saved, origin, replace(options, fold_masks=False))
    check_weights(part, plain)
    kinds = _folded(part, plain) if options.fold_masks else plain
    masks = masks_of({name: tuple(tensor.shape) for name, tensor in plain.items()})

    def read(name: str) -> torch.Tensor:
        if id(kinds[name]) in paths:
            return tensors.read(paths[id(kinds[name])])
        weight, mask = plain[name + ORIGINAL], plain[masks[name + ORIGINAL]]
        return _masked(tensors.read(paths[id(weight)]), tensors.read(paths[id(mask)]))

    return WeightStream(kinds, read)


def exported(part: str, value: Any, origin: PartOrigin, options: WeightOptions) -> Any:
    """Return a part as it is written; what is not a dict of tensors stays as it is.

    What ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` put into the names is left out, which a
    warning says: other tools know the names of the model.

    Raises:
        ConfigError: no name begins with the prefix, two names would become one, or there are no masks to fold.
    """
    if not isinstance(value, dict) or not any(isinstance(tensor, torch.Tensor) for tensor in value.values()):
        return value
    if options.strip_prefix:
        if not any(str(name).startswith(options.strip_prefix) for name in value):
            raise ConfigError(
                f"no name in part {part!r} begins with {options.strip_prefix!r}: its first is {next(iter(value))!r}"
            )
        value = _renamed(part, value, lambda name: name.removeprefix(options.strip_prefix))
    parallel = bool(_PARALLEL & {*origin.classes})
    plain = _renamed(part, value, lambda name: _without_wrappers(name, parallel=parallel))
    if plain.keys() != value.keys():
        warnings.warn(
            f"part {part!r} was saved from a wrapped model: its names are written without "
            f"{'the module. of the wrapper' if parallel else '_orig_mod. of torch.compile'}",
            PeakpointWarning,
            stacklevel=3,
        )
    return _folded(part, plain) if options.fold_masks else plain


def _without_wrappers(name: str, *, parallel: bool) -> str:
    plain = ".".join(piece for piece in name.split(".") if piece != _COMPILED)
    return plain.removeprefix("module.") if parallel else plain


def _renamed(part: str, value: dict[Any, Any], rename: Callable[[str], str]) -> dict[Any, Any]:
    names = {name: rename(name) if isinstance(name, str) else name for name in value}
    if all(name == renamed for name, renamed in names.items()):
        return value
    repeated = [name for name, uses in Counter(names.values()).items() if uses > 1]
    if repeated:
        raise ConfigError(
            f"two tensors of part {part!r} would be written as {repeated[0]!r}; export it to .pth as it is"
        )
    result = OrderedDict((names[name], tensor) for name, tensor in value.items())
    versions = getattr(value, "_metadata", None)
    if versions is not None:
        paths = {path: rename(f"{path}.").removesuffix(".") for path in versions}
        result._metadata = OrderedDict((paths[path], versions[path]) for path in versions)  # type: ignore[attr-defined] # noqa: SLF001
    return result


def _folded(part: str, value: dict[Any, Any]) -> dict[Any, Any]:
    masks = masks_of({name: tuple(tensor.shape) for name, tensor in value.items() if isinstance(tensor, torch.Tensor)})
    if not masks:
        raise ConfigError(f"part {part!r} has no masks of torch.nn.utils.prune: leave --fold-masks out")
    folded = OrderedDict(
        (name.removesuffix(ORIGINAL), _masked(tensor, value[masks[name]])) if name in masks else (name, tensor)
        for name, tensor in value.items()
        if name not in masks.values()
    )
    if len(folded) != len(value) - len(masks):
        raise ConfigError(f"part {part!r} has a masked weight and another one of the same name; its masks stay")
    versions = getattr(value, "_metadata", None)
    if versions is not None:
        folded._metadata = versions  # type: ignore[attr-defined] # noqa: SLF001
    return folded


def _masked(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return weight * mask.to(weight.dtype)


def check_weights(part: str, value: Any) -> None:
    """Refuse a part that is not a dict of tensors.

    Raises:
        ConfigError: the message says where, and what to do.
    """
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"part {part!r} is a {kind_of(value)} and not a dict of tensors; export it to .pth")
    for key, tensor in value.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"part {part!r} holds {key!r}, a {kind_of(tensor)}: export it to .pth instead")
