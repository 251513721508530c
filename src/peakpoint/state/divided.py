"""Tensors that are divided among the ranks of a training: the ``DTensor`` of FSDP2 and of tensor parallelism.

Which rank writes which shard, and which of several replicas is written, is decided by the planner of
``torch.distributed.checkpoint``.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from peakpoint.errors import ConfigError

if TYPE_CHECKING:  # half a second, for those whose tensors are divided
    from torch.distributed.checkpoint.planner import SavePlan

Offsets = tuple[int, ...]


def is_divided(value: Any) -> TypeGuard[Any]:
    """Return whether a tensor is divided among ranks, or a replica that a device mesh knows of."""
    return hasattr(value, "device_mesh")


def has_divided(state: Mapping[str, Any]) -> bool:
    """Return whether a module or an optimizer in a state has parameters that are divided."""
    parameters: list[torch.Tensor] = []
    for value in state.values():
        if isinstance(value, torch.nn.Module):
            parameters += value.parameters()
        elif isinstance(value, torch.optim.Optimizer):
            parameters += [parameter for group in getattr(value, "param_groups", ()) for parameter in group["params"]]
    return any(map(is_divided, parameters))


def own_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank has of a tensor that is divided, in the same memory; any other tensor itself."""
    if not is_divided(tensor):
        return tensor
    shard: torch.Tensor = tensor.to_local()
    return shard.contiguous()


def own_shards(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return what this rank has of tensors; see ``own_shard``."""
    with torch.no_grad():  # which spares each a step of the gradient
        return [*map(own_shard, tensors)]


def layout_of(tensors: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return what a plan depends on; equal where the plan is still good."""
    return [(name, tensor.shape, tensor.placements, tensor.device_mesh) for name, tensor in tensors.items()]


def shards_plan(tensors: Mapping[str, Any]) -> "SavePlan":
    """Return which shards this rank has of tensors that are divided."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner  # noqa: PLC0415 - takes half a second

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=False)
    return planner.create_local_plan()


def shards_to_write(plans: Sequence["SavePlan"], rank: int) -> dict[str, Offsets]:
    """Return which shards a rank writes, by the names of their tensors, and where each begins in the whole tensor.

    Args:
        plans: of all ranks, see ``shards_plan``.
        rank: whose shards.

    Raises:
        ConfigError: a rank has no shard of a tensor that others have.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner  # noqa: PLC0415 - takes half a second

    names = [{item.index.fqn for item in plan.items} for plan in plans]
    for number, of_rank in enumerate(names):
        if of_rank != names[0]:
            name = min(of_rank ^ names[0])
            has, lacks = (number, 0) if name in of_rank else (0, number)
            raise ConfigError(f"rank {has} has a shard of {name}, and rank {lacks} has none: it cannot be saved whole")
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({}, is_coordinator=True)
    plans_of_all, _ = planner.create_global_plan(list(plans))
    chunks = {item.index.fqn: item.tensor_data.chunk for item in plans_of_all[rank].items if item.tensor_data}
    return {name: tuple(chunk.offsets) for name, chunk in chunks.items() if all(chunk.sizes)}


def own_boxes(tensors: Mapping[str, Any]) -> dict[str, tuple[Offsets, Offsets]]:
    """Return where this rank's shard of each tensor begins in the whole, and its sizes; nothing of empty shards."""
    chunks = {item.index.fqn: item.tensor_data.chunk for item in shards_plan(tensors).items if item.tensor_data}
    return {name: (tuple(chunk.offsets), tuple(chunk.sizes)) for name, chunk in chunks.items() if all(chunk.sizes)}


def as_divided(shard: torch.Tensor, tensor: Any) -> torch.Tensor:
    """Return a tensor that is divided as ``tensor`` is, of which this rank has ``shard``."""
    kind: Any = type(tensor.detach())
    divided: torch.Tensor = kind.from_local(
        shard, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return divided
