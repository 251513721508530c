"""Live objects as they were before a restore: a refusal half way leaves nothing changed."""

import argparse
import copy
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from peakpoint.errors import ConfigError
from peakpoint.state.functions import RAISED_BY_PROGRAMS
from peakpoint.state.parts import Stateful, state_of
from peakpoint.state.typed_json import Decoder, Encoder

PutBack = Callable[[], object]
_CONTAINERS = (dict, OrderedDict, defaultdict, list)


class LiveBackup:
    """The parts of a state as they are when this is made.

    Tensors of modules are copied to the host. Of an optimizer it is enough to keep what torch replaces as a whole.
    """

    def __init__(self, live: Mapping[str, Any]) -> None:
        self._steps = {name: _steps(value) for name, value in live.items()}

    def put_back(self, names: Iterable[str]) -> list[str]:
        """Make parts what they were; returns the names of those that refuse their own state, too."""
        refusing = []
        for name in names:
            steps = self._steps[name]
            try:
                for step in steps:
                    step()
            except RAISED_BY_PROGRAMS:
                refusing.append(name)
                for step in steps[:-1]:
                    step()
        return refusing


def _steps(value: Any) -> list[PutBack]:
    """Return what puts one part back, in order; the last may run code of the user."""
    if isinstance(value, torch.nn.Module):
        return _module(value)
    if isinstance(value, torch.optim.Optimizer):
        return _optimizer(value)
    if isinstance(value, torch.Tensor):
        return [_tensor(value)]
    if isinstance(value, np.ndarray):
        return [_array(value)]
    if isinstance(value, argparse.Namespace):
        return _attributes(value)
    if isinstance(value, dict | list):
        return [_content(value)]
    if isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
        return [_generator(value)]
    if isinstance(value, Stateful) and not isinstance(value, type):
        # a loader that is asked for its place begins to iterate
        return [*_attributes(value), *([] if isinstance(value, Iterable) else _own_state(value))]
    return []


def _module(module: torch.nn.Module) -> list[PutBack]:
    attributes = [step for layer in module.modules() for step in _attributes(layer)]
    tensors = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    extra = {
        name.rpartition(".")[0]: make_copy
        for name, value in module.state_dict().items()
        if name.endswith("_extra_state") and (make_copy := _copies(value)) is not None
    }

    def set_extra_states() -> None:
        for name, make_copy in extra.items():
            module.get_submodule(name).set_extra_state(make_copy())

    return [*attributes, *map(_tensor, tensors.values()), set_extra_states]


def _optimizer(optimizer: torch.optim.Optimizer) -> list[PutBack]:
    steps = _attributes(optimizer)
    for value in vars(optimizer).values():
        if isinstance(value, torch.optim.Optimizer):  # which a wrapper steps
            steps += _optimizer(value)
    groups, moments = vars(optimizer).get("param_groups", []), vars(optimizer).get("state", {})
    steps += [_content(values) for values in [*groups, *moments.values()] if isinstance(values, dict)]
    replaces = type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict
    return steps if replaces else [*steps, *_own_state(optimizer)]


def _tensor(tensor: torch.Tensor) -> PutBack:
    kind, lazy = type(tensor), is_lazy(tensor)
    values = tensor.data if lazy or tensor.is_meta else tensor.detach().to("cpu", copy=True)

    @torch.no_grad()
    def write() -> None:
        if not lazy:
            tensor.copy_(values)
        elif not is_lazy(tensor):  # loading has given it a class and memory
            tensor.data, tensor.__class__ = values, kind

    return write


def _array(array: np.ndarray[Any, Any]) -> PutBack:
    values = array.copy()
    return lambda: np.copyto(array, values)


def _generator(value: Any) -> PutBack:
    state: Any = copy.deepcopy(value.get_state() if isinstance(value, torch.Generator) else state_of(value))
    if isinstance(value, np.random.Generator):
        return lambda: setattr(value.bit_generator, "state", state)
    return lambda: (value.setstate if isinstance(value, random.Random) else value.set_state)(state)


def _content(container: Any) -> PutBack:
    before = copy.copy(container)

    def write() -> None:
        container.clear()
        (container.update if isinstance(container, dict) else container.extend)(before)

    return write


def _attributes(value: Any) -> list[PutBack]:
    """Return what sets the attributes of an object again, and the content of those that are dicts and lists."""
    attributes = getattr(value, "__dict__", {})
    return [_content(child) for child in [attributes, *attributes.values()] if type(child) in _CONTAINERS]


def _own_state(value: Any) -> list[PutBack]:
    """Return what loads a copy of an object's own state; nothing where it cannot be copied: attributes are put back."""
    try:
        make_copy = _copies(value.state_dict())
    except RAISED_BY_PROGRAMS:
        return []
    return [] if make_copy is None else [lambda: value.load_state_dict(make_copy())]


def _copies(content: Any) -> Callable[[], Any] | None:
    """Return what makes a copy of a state as it is now; None when it cannot be kept."""
    encoder = Encoder()
    try:
        tree = encoder.encode(content, "")
    except ConfigError:
        return None
    tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in encoder.tensors.items()}
    return lambda: Decoder(tensors, devices=True).decode(tree)
