"""From the files of a checkpoint back to live objects.

Everything that can be compared is compared before anything is changed. A report says part by part what was restored.
"""

import argparse
import enum
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler

from peakpoint.errors import ConfigError, MismatchError
from peakpoint.state import rng
from peakpoint.state.json_scalars import kind_of
from peakpoint.state.live_backup import LiveBackup
from peakpoint.state.modules import advice, describe, fits, load_module, loading_differences
from peakpoint.state.optimizers import (
    is_optimizer_state,
    load_optimizer,
    optimizer_differences,
    scheduler_differences,
)
from peakpoint.state.origin import NO_ORIGIN, PartOrigin, param_groups, parameter_names, unwrapped
from peakpoint.state.parts import Stateful
from peakpoint.state.saved import SavedState
from peakpoint.state.step_guard import inner_optimizer, wait_for_copies


@dataclass(frozen=True, slots=True)
class RestoredPart:
    """One part that was restored.

    Attributes:
        part: its name.
        what: one phrase: how much of what, or how.
    """

    part: str
    what: str


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The result of loading a checkpoint into live objects.

    Attributes:
        ref: the checkpoint, as a ref that names no other.
        step: optimizer steps completed at the checkpoint.
        epoch: the epoch's index, None outside epochs.
        restored: part by part.
        missing: one sentence for each thing that was not restored, empty after a strict load.
        overruled: one phrase for each optimizer and scheduler whose settings in the script differ from those that were
            restored, with both values; of a resume only.
        skipped: one sentence for each newer checkpoint that was skipped, and why.
    """

    ref: str
    step: int
    epoch: int | None
    restored: tuple[RestoredPart, ...]
    missing: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    overruled: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"step {self.step}" if self.epoch is None else f"step {self.step}, epoch {self.epoch}"
        lines = [f"from {self.ref} ({where})"]
        lines += [f"  skipped: {line}" for line in self.skipped]
        width = max((len(part.part) for part in self.restored), default=0)
        lines += [f"  {part.part:<{width}}  {part.what}" for part in self.restored]
        lines += [f"  settings as saved, not as in the script: {line}" for line in self.overruled]
        lines += [f"  NOT restored: {line}" for line in self.missing]
        return "\n".join(lines)


# --- comparing ----------------------------------------------------------------------------------------------------


_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _differences(part: str, live: Any, saved: Any, origin: PartOrigin, names: Mapping[int, str]) -> list[str]:
    try:
        if isinstance(live, torch.optim.Optimizer):
            return optimizer_differences(part, live, saved, origin, names)
        inner = None if isinstance(live, torch.nn.Module) else inner_optimizer(live)
        if inner is not None and is_optimizer_state(saved):  # a wrapper that is no optimizer itself
            return optimizer_differences(part, inner, saved, NO_ORIGIN, names)
        return _compare(part, live, saved, origin)
    except _REFUSALS as error:
        return [f"{part}: the checkpoint's value under this name does not fit a {kind_of(live)}: {error!r}"]


def _compare(part: str, live: Any, saved: Any, origin: PartOrigin) -> list[str]:
    if isinstance(live, torch.nn.Module):
        if not isinstance(saved, Mapping):
            return [f"{part}: the checkpoint has a {kind_of(saved)} under this name, not the state of a module"]
        return loading_differences(part, live.state_dict(), saved)
    if isinstance(unwrapped(live), LRScheduler):
        return scheduler_differences(part, live, saved, origin)
    if isinstance(live, torch.Tensor) and not fits(live, saved):
        return [f"{part}: {describe(saved)} in the checkpoint and {describe(live)} in the state"]
    if isinstance(live, np.ndarray):
        fitting = isinstance(saved, np.ndarray) and (saved.shape, saved.dtype) == (live.shape, live.dtype)
        return [] if fitting else [f"{part}: the saved array differs in shape or dtype from the one in the state"]
    if isinstance(live, argparse.Namespace) and not isinstance(saved, dict):
        return [f"{part}: the checkpoint has a {kind_of(saved)} under this name, not a namespace"]
    return []


# --- restoring ----------------------------------------------------------------------------------------------------


def _update(live: Any, saved: Any) -> tuple[Any, str]:
    """Restore a plain value in place where it can be changed; otherwise the new value replaces it."""
    if isinstance(live, torch.Tensor):
        with torch.no_grad():
            live.copy_(saved)
        return live, "tensor, in place"
    if isinstance(live, np.ndarray):
        live[...] = saved
        return live, "array, in place"
    if isinstance(live, argparse.Namespace):
        vars(live).clear()
        vars(live).update(saved)
        return live, "namespace, in place"
    if isinstance(live, dict) and isinstance(saved, dict):
        live.clear()
        live.update(saved)
        return live, "dict, in place"
    if isinstance(live, list) and isinstance(saved, list):
        live[:] = saved
        return live, "list, in place"
    value = type(live)(saved) if isinstance(live, enum.Enum) else saved
    return value, f"a {kind_of(value)}; read it from the checkpointer's state"


def _restore_part(name: str, live: Any, saved: SavedState, plan: "_Plan") -> tuple[Any, str]:
    """Restore one part; returns the value that is now the part, and a phrase that says what was done."""
    if isinstance(live, torch.nn.Module):
        return live, load_module(live, saved.value(name), plan.differences[name])
    if isinstance(live, torch.optim.Optimizer):
        on_gpu = any(parameter.is_cuda for group in param_groups(live) for parameter in group["params"])
        state = saved.value(name, own=not on_gpu)
        return live, load_optimizer(live, state, saved.trees.origin(name), plan.names, on_gpu=on_gpu)
    value = saved.value(name, devices=True, own=True)
    if isinstance(live, Stateful) and not isinstance(live, type):
        live.load_state_dict(value)
        return live, f"{type(live).__name__}, by its load_state_dict"
    if isinstance(live, torch.Generator):
        live.set_state(value["generator"].cpu())
    elif isinstance(live, np.random.Generator):
        rng.check_numpy(value)
        live.bit_generator.state = value
    elif isinstance(live, np.random.RandomState):
        rng.check_numpy(value)
        live.set_state(value)
    elif type(live) is random.Random:
        live.setstate(value)
    else:
        return _update(live, value)
    return live, "generator, in place"


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is known of a restore before it begins.

    Attributes:
        differences: by part.
        names: of the parameters of the live modules, by identity.
    """

    differences: Mapping[str, list[str]]
    names: Mapping[int, str]


def _plan(saved: SavedState, live: Mapping[str, Any], *, exhaustive: bool) -> _Plan:
    """Compare everything that can be compared."""
    trees = saved.trees
    names = parameter_names(live)
    differences: dict[str, list[str]] = {}
    for name, value in live.items():
        if name not in trees.parts:
            differences[name] = [f"{name}: the checkpoint has no part of this name; it has {', '.join(trees.parts)}"]
        else:
            differences[name] = _differences(name, value, saved.value(name), trees.origin(name), names)
    if exhaustive:
        for name in [name for name in trees.parts if name not in live and name not in trees.optional]:
            differences[name] = [
                f"{name}: it is in the checkpoint, but state= names no part {name!r} to restore it into"
            ]
    return _Plan(differences, names)


def restore_into(
    saved: SavedState, live: dict[str, Any], *, strict: bool = True, exhaustive: bool = True
) -> LoadReport:
    """Put a checkpoint back into live objects.

    Nothing is changed before everything that can be compared fits; when an object refuses its state after that, all are
    made what they were.

    Args:
        live: part name to object; plain values that cannot be changed in place are replaced in this dict.
        strict: raise when something does not fit; otherwise load what fits, and leave a part that refuses its state.
        exhaustive: also compare which parts there are: one that is saved and not in ``live`` is a difference.

    Raises:
        MismatchError: ``strict``, and something does not fit; lists all differences.
        FormatError: the checkpoint holds types that this release does not read.
    """
    manifest, plan = saved.manifest, _plan(saved, live, exhaustive=exhaustive)
    differences = tuple(line for lines in plan.differences.values() for line in lines)
    if differences and strict:
        raise _mismatch(saved, live, differences)
    wait_for_copies()
    fitting = {
        name: value
        for name, value in live.items()
        if name in saved.trees.parts and (not plan.differences[name] or isinstance(value, torch.nn.Module))
    }
    phrases: dict[str, str] = {}
    backup = LiveBackup(fitting)
    try:
        for name in _order(fitting):
            try:
                fitting[name], phrases[name] = _restore_one(name, fitting[name], saved, plan)
            except MismatchError as error:
                if strict:
                    raise
                _put_back(backup, [name], error)
                differences += error.differences
    except BaseException as error:
        _put_back(backup, list(fitting), error)
        raise
    live |= fitting
    ref = f"{manifest.run}/{manifest.name}"
    restored = tuple(RestoredPart(name, phrases[name]) for name in fitting if name in phrases)
    return LoadReport(ref, manifest.step, manifest.epoch, restored, differences)


def _put_back(backup: LiveBackup, names: list[str], error: BaseException) -> None:
    for name in backup.put_back(names):
        error.add_note(f"peakpoint: {name} refused its own earlier state, too: make it anew before you go on")


def _order(live: Mapping[str, Any]) -> list[str]:
    """Return the parts in the order to restore them in: modules first where a parameter gets its shape from them."""
    modules = {name: value for name, value in live.items() if isinstance(value, torch.nn.Module)}
    lazy = any(is_lazy(parameter) for module in modules.values() for parameter in module.parameters())
    return list(modules | dict(live)) if lazy else list(live)


def _restore_one(name: str, value: Any, saved: SavedState, plan: _Plan) -> tuple[Any, str]:
    try:
        return _restore_part(name, value, saved, plan)
    except _REFUSALS as error:
        refusal = f"{name}: {type(value).__name__} refused its state: {error}"
        raise _mismatch(saved, {}, (refusal,)) from error


def _mismatch(saved: SavedState, live: Mapping[str, Any], differences: tuple[str, ...]) -> MismatchError:
    """Make the error that lists how a checkpoint and the live state differ."""
    lines = "\n  ".join(differences[:30])
    more = f"\n  ... and {len(differences) - 30} more" if len(differences) > 30 else ""
    differing = {line.partition(":")[0] for line in differences}
    modules = [
        (name, value.state_dict(), state)
        for name, value in live.items()
        if isinstance(value, torch.nn.Module) and name in differing and name in saved.trees.parts
        if isinstance(state := saved.value(name), Mapping)
    ]
    ref = f"{saved.manifest.run}/{saved.manifest.name}"
    return MismatchError(f"checkpoint {ref} does not fit the state:\n  {lines}{more}\n{advice(modules)}", differences)


def make_model(function: Callable[[], Any], name: str) -> tuple[Any, Any]:
    """Call a function of the user that makes a model, or a model and an example of its inputs.

    Args:
        name: the function for errors.

    Returns:
        The model, and the example or None.

    Raises:
        ConfigError: it returned something else.
    """
    result = function()
    model, example = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if isinstance(model, type) or not callable(model) or not hasattr(model, "load_state_dict"):
        raise ConfigError(
            f"{name} returned a {kind_of(model)}; return the model, which has load_state_dict() and can be called, or "
            "the model and an example of its inputs"
        )
    return model, example
