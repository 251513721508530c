"""The parts of a live state: what each may be, and what it says of itself."""

import random
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from peakpoint.errors import ConfigError
from peakpoint.format.names import check_part
from peakpoint.state.functions import RAISED_BY_PROGRAMS
from peakpoint.state.json_scalars import TAG, kind_of
from peakpoint.state.typed_json import StateCheck


@runtime_checkable
class Stateful(Protocol):
    """Anything that gives and takes its state: modules, optimizers, schedulers, data loaders, objects of yours."""

    def state_dict(self) -> Any:
        """Return the state."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take over a state."""


def check_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state as a dict of parts.

    Raises:
        ConfigError: it is not a mapping, it is empty, a part cannot have its name, or something in it cannot be kept
            exactly; the message says where it is.
    """
    if not isinstance(state, Mapping):
        raise ConfigError(
            f'state= takes a mapping such as {{"model": model, "optimizer": optimizer}}, not a {kind_of(state)}'
        )
    if not state:
        raise ConfigError('state= is empty: name at least one part, such as {"model": model}')
    parts = {check_part(name): _without_parallel(value) for name, value in state.items()}
    for name, value in parts.items():
        _check_part_state(value, f'state["{name}"]')
    return parts


def _without_parallel(value: Any) -> Any:
    """Return the module inside ``DistributedDataParallel``: its tensors have the names that the model gives them."""
    compiled = getattr(value, "_orig_mod", value)  # by torch.compile
    return compiled.module if isinstance(compiled, torch.nn.parallel.DistributedDataParallel) else value


def _check_part_state(value: Any, path: str) -> None:
    """Refuse what every later save would refuse, before a training has lost time."""
    if isinstance(value, Stateful) and isinstance(value, Iterable) and not isinstance(value, torch.nn.Module):
        return  # a loader that is asked for its place begins to iterate
    layers = value.modules() if isinstance(value, torch.nn.Module) else ()
    if any(type(layer).__name__ == "FullyShardedDataParallel" for layer in layers):
        raise ConfigError(
            f"{path} is a FullyShardedDataParallel, whose state_dict() talks to all ranks and would hang where rank 0 "
            "alone saves: divide the model with fully_shard() of torch.distributed.fsdp"
        )
    try:
        content = state_of(value)
    except RAISED_BY_PROGRAMS:
        return  # it has no state before it is used; the first save asks again
    StateCheck().encode(content, path, attributes=content is not value)


def is_generator(value: Any) -> bool:
    """Return whether it draws random numbers."""
    return isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random)


def state_of(value: Any) -> Any:
    """Return the state of one part as a tree of tensors and plain values."""
    if isinstance(value, type):
        return value  # a class is not an object; the encoder refuses it with its place
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


def saves_nothing(value: Any, tree: Any) -> bool:
    """Return whether an object that has something to save gives an empty state.

    Args:
        tree: its state, as ``StateEncoder.encode`` encodes it.
    """
    content = tree.get("v", tree) if isinstance(tree, dict) and TAG in tree else tree
    if content or not isinstance(value, Stateful) or content == 0:
        return False
    if isinstance(value, torch.nn.Module):  # a loss has nothing to save; a metric has tensors that are no buffers
        return any(isinstance(child, torch.Tensor) for layer in value.modules() for child in vars(layer).values())
    return not isinstance(value, torch.amp.GradScaler)  # which is disabled
