"""The content of a checkpoint as far as one rank of a training needs it: its own shards of tensors that are divided."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from peakpoint.format.manifest import FileRecord, Manifest
from peakpoint.format.shards import stored_tensors
from peakpoint.repository import reader
from peakpoint.state.divided import Offsets, as_divided, has_divided, is_divided, own_boxes, own_shard
from peakpoint.state.origin import param_groups, parameter_names, plain_name
from peakpoint.state.parts import Stateful, state_of
from peakpoint.state.saved import SavedState, StateTrees, read_state, read_tensors, read_trees, tensor_nodes
from peakpoint.state.shards import dtype_of, read_box, read_tensor
from peakpoint.state.tensor_files import tensors_of
from peakpoint.store import Store


def read_local(store: Store, manifest: Manifest, live: Mapping[str, Any]) -> SavedState:
    """Read a checkpoint for the live objects of one rank, whatever number of ranks has saved it.

    Where a live tensor is divided, the rank's shard alone is read, and the tensor in the result is divided alike. Every
    file that has some of it is compared with its digests: all ranks together have compared all files.

    Raises:
        CorruptError: a file is missing or damaged.
        FormatError: a newer release wrote it.
    """
    if not has_divided(live):
        return read_state(store, manifest)
    trees = read_trees(store, manifest)
    tensors = {}
    for part in manifest.parts:
        targets = _targets(part, live, trees)
        tensors[part] = _read_part(store, manifest, part, targets) if targets else read_tensors(store, manifest, part)
    return SavedState(manifest, trees, tensors)


def _read_part(
    store: Store, manifest: Manifest, part: str, targets: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    boxes = own_boxes(targets)
    stored = stored_tensors(manifest, part)
    fitting = {name for name, target in targets.items() if name in stored and target.shape == stored[name].shape}
    tensors: dict[str, torch.Tensor] = {}
    for file in map(manifest.file, manifest.parts[part]):
        if _is_own(file, {name: boxes[name] for name in fitting & boxes.keys()}, targets):
            tensors |= tensors_of(file, reader.read(store, manifest, file))
    for name in stored.keys() - tensors.keys():
        if name not in fitting:
            tensors[name] = read_tensor(store, manifest, stored[name])
            continue
        tensors[name] = torch.empty(own_shard(targets[name].detach()).shape, dtype=dtype_of(stored[name]))
        if name in boxes:
            read_box(store, manifest, stored[name], *boxes[name], target=tensors[name])
    return {name: as_divided(tensor, targets[name]) if name in fitting else tensor for name, tensor in tensors.items()}


def _is_own(
    file: FileRecord, boxes: Mapping[str, tuple[Offsets, Offsets]], targets: Mapping[str, torch.Tensor]
) -> bool:
    """Return whether a file has nothing but what this rank needs as it is there: then it is read at one go."""
    if not file.offsets:
        return not any(record.name in targets for record in file.tensors)
    places = zip(file.tensors, file.offsets, strict=True)
    return all(boxes.get(record.name) == (offsets, record.shape) for record, offsets in places)


def _targets(part: str, live: Mapping[str, Any], trees: StateTrees) -> dict[str, torch.Tensor]:
    """Return the live tensors that are divided, by the names of the stored ones that are to become theirs."""
    value, tree = live.get(part), trees.parts.get(part)
    nodes = [(path, node) for path, node in tensor_nodes(tree) if "view" not in node]
    if isinstance(value, torch.nn.Module):
        tensors = {plain_name(name): tensor for name, tensor in value.state_dict().items() if is_divided(tensor)}
        return {node["name"]: tensors[name] for path, node in nodes if (name := plain_name(path)) in tensors}
    if not isinstance(value, torch.optim.Optimizer):
        elsewhere = dict(
            _divided_in(state_of(value) if isinstance(value, Stateful) and not isinstance(value, Iterable) else value)
        )
        return {node["name"]: elsewhere[path] for path, node in nodes if path in elsewhere}
    if not isinstance(tree, dict):
        return {}
    parameters = _parameters(value, tree.get("param_groups"), trees.origin(part).names, live)
    owners = [(node["name"], parameters.get(path.split(".")[1])) for path, node in nodes if path.startswith("state.")]
    return {name: parameter.detach() for name, parameter in owners if parameter is not None and is_divided(parameter)}


def _divided_in(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over the divided tensors in containers, with the keys that lead to them; see ``tensor_nodes``."""
    if is_divided(value):
        yield ".".join(path), value.detach()
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from _divided_in(child, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for number, child in enumerate(value):
            yield from _divided_in(child, (*path, str(number)))


def _parameters(
    optimizer: torch.optim.Optimizer, groups: Any, names: list[list[str]], live: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the live parameters by the numbers that they have in a saved state: by name, or else by position."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return {}
    numbers = [str(number) for group in groups for number in group.get("params", ())]
    parameters = [parameter for group in param_groups(optimizer) for parameter in group["params"]]
    name_of, saved_names = parameter_names(live), [*itertools.chain.from_iterable(names)]
    by_name = {name_of[id(parameter)]: parameter for parameter in parameters if id(parameter) in name_of}
    if len(saved_names) == len(numbers):
        return {number: by_name[name] for number, name in zip(numbers, saved_names, strict=True) if name in by_name}
    return dict(zip(numbers, parameters, strict=False))
