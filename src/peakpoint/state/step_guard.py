"""The guard of a copy under way: Peakpoint writes to no memory that is being copied before the copy is complete."""

import functools
import os
import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from peakpoint.state.divided import own_shards
from peakpoint.state.host_copy import NO_STORAGE, Storage, storage_of


class StateCopy(Protocol):
    """A capture under way: ``HostCopy`` into a buffer for everything, or ``StreamedCopy`` through a small one."""

    waited_seconds: float

    def run(self) -> None:
        """Copy the rest, in a thread of its own."""

    def abandon(self) -> None:
        """Handle the failure of the save."""

    def wait(self) -> None:
        """Return when everything is copied."""

    def settle(self) -> None:
        """Return when the copy is known to be right."""

    def hold_step(self) -> None:
        """Return when the optimizer, which is about to step, may do so."""


def stepping(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    """Return the optimizer whose hooks run at a step: the one inside, where a wrapper never ran ``Optimizer.__init__``.

    Returns:
        None when there is no such optimizer inside, or several.
    """
    current: torch.optim.Optimizer | None = optimizer
    while current is not None and "_optimizer_step_pre_hooks" not in vars(current):
        current = inner_optimizer(current)
    return current


def inner_optimizer(value: Any) -> torch.optim.Optimizer | None:
    """Return the optimizer among an object's attributes; None when there is none, or more than one."""
    inner = [child for child in getattr(value, "__dict__", {}).values() if isinstance(child, torch.optim.Optimizer)]
    return inner[0] if len(inner) == 1 else None


_guards: weakref.WeakSet["StepGuard"] = weakref.WeakSet()


def wait_for_copies() -> None:
    """Return when no copy reads live memory any more: to be called before Peakpoint writes to it."""
    for guard in list(_guards):
        guard.wait()


def _forget_copies() -> None:
    """Forget the copies of the parent: a forked child has its own memory, and no thread that copies it."""
    for guard in list(_guards):
        guard.forget()


os.register_at_fork(after_in_child=_forget_copies)


class StepGuard:
    """Hooks that hold every optimizer step until the copy under way is complete.

    Args:
        state: the parts of the state, looked at anew for each save: optimizers may be exchanged.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state
        self._copying: StateCopy | None = None
        self._last: StateCopy | None = None
        self._optimizers: list[torch.optim.Optimizer] = []
        self.steps: Counter[int] = Counter()  # by the identity of the optimizer
        self._hooks: list[RemovableHandle] = []
        self._places: list[int] = []
        self._owned = NO_STORAGE
        self._attach()
        _guards.add(self)

    def _attach(self) -> None:
        optimizers = [value for value in self._state.values() if isinstance(value, torch.optim.Optimizer)]
        if list(map(id, optimizers)) != list(map(id, self._optimizers)):
            self.stop()
            self._optimizers = optimizers
            for optimizer in optimizers:
                hook = functools.partial(self._before_step, id(optimizer))
                if (inner := stepping(optimizer)) is not None:
                    self._hooks.append(inner.register_step_pre_hook(hook))

    def owned(self) -> frozenset[Storage]:
        """Return the memory that only ``step()`` of these optimizers changes: their parameters and moments.

        It is the same object as before when no tensor has moved. What an optimizer without hooks changes is not in it:
        its step cannot be held.
        """
        self._attach()
        tensors = []
        for optimizer in filter(None, map(stepping, self._optimizers)):
            for group in optimizer.param_groups:
                tensors += [parameter for parameter in group["params"] if not is_lazy(parameter)]
            for moments in optimizer.state.values():
                tensors += [moment for moment in moments.values() if isinstance(moment, torch.Tensor)]
        tensors = own_shards(tensors)
        places = [tensor.data_ptr() for tensor in tensors]
        if places != self._places:
            self._places, self._owned = places, frozenset(map(storage_of, tensors))
        return self._owned

    def _before_step(self, optimizer: int, *_: object) -> None:
        self.steps[optimizer] += 1
        self.wait()

    def wait(self) -> None:
        """Return when the copy under way is complete, if there is one."""
        copying, self._copying = self._copying, None
        if copying is not None:
            copying.hold_step()

    def forget(self) -> None:
        """Forget the copy under way."""
        self._copying = None

    def watch(self, copying: StateCopy) -> None:
        """Hold the next step until ``copying`` is complete."""
        self._copying = self._last = copying

    @property
    def waited_seconds(self) -> float:
        """Seconds that optimizers have waited for the copy that was watched last."""
        return 0.0 if self._last is None else self._last.waited_seconds

    def stop(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._optimizers = [], []
