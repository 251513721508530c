"""From the files of a checkpoint back to live objects.

Everything that can be compared is compared before anything is changed. A report says part by part what was restored.
"""

import argparse
import enum
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from peakpoint.errors import ConfigError, MismatchError
from peakpoint.format.masks import ORIGINAL, masks_of
from peakpoint.state import rng
from peakpoint.state.capture import Stateful
from peakpoint.state.device_copy import send
from peakpoint.state.json_scalars import kind_of
from peakpoint.state.saved import SavedState
from peakpoint.state.step_guard import wait_for_copies


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
        skipped: one sentence for each newer checkpoint that was skipped, and why.
    """

    ref: str
    step: int
    epoch: int | None
    restored: tuple[RestoredPart, ...]
    missing: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"step {self.step}" if self.epoch is None else f"step {self.step}, epoch {self.epoch}"
        lines = [f"from {self.ref} ({where})"]
        lines += [f"  skipped: {line}" for line in self.skipped]
        width = max((len(part.part) for part in self.restored), default=0)
        lines += [f"  {part.part:<{width}}  {part.what}" for part in self.restored]
        lines += [f"  NOT restored: {line}" for line in self.missing]
        return "\n".join(lines)


# --- comparing ----------------------------------------------------------------------------------------------------


def _describe(value: Any) -> str:
    if is_lazy(value):
        return "not initialized yet"
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return kind_of(value)


def _fits(live: Any, saved: Any) -> bool:
    if is_lazy(live):
        return isinstance(saved, torch.Tensor)  # it takes the shape of what is loaded
    if isinstance(live, torch.Tensor) and isinstance(saved, torch.Tensor):
        return live.shape == saved.shape and live.dtype == saved.dtype
    return not isinstance(live, torch.Tensor) and not isinstance(saved, torch.Tensor)


def _entry_fits(name: Any, live: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Return whether an entry of both state dicts fits. A module's ``set_extra_state`` takes any shape."""
    return str(name).endswith("_extra_state") or _fits(live[name], saved[name])


def module_differences(part: str, live: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """List what keeps a saved state dict from fitting a module: names, shapes and dtypes."""
    missing = [name for name in live if name not in saved]
    unknown = [name for name in saved if name not in live]
    different = [name for name in saved if name in live and not _entry_fits(name, live, saved)]
    return [
        *(f"{part}: the checkpoint has no {name!r} ({_describe(live[name])})" for name in missing),
        *(f"{part}: the checkpoint has {name!r} ({_describe(saved[name])}), the model does not" for name in unknown),
        *(
            f"{part}: {name!r} is {_describe(saved[name])} in the checkpoint, {_describe(live[name])} in the model"
            for name in different
        ),
    ]


_MOMENTS = {"acc_delta", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq"}
_MOMENTS |= {"momentum_buffer", "square_avg", "sum"}


def _optimizer_differences(part: str, live: torch.optim.Optimizer, saved: Any) -> list[str]:
    """List what keeps a saved state from fitting an optimizer: groups, numbers of parameters, shapes of moments."""
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        return [f"{part}: the checkpoint has no optimizer state under this name"]
    groups = saved["param_groups"]
    if len(groups) != len(live.param_groups):
        return [
            f"{part}: {len(groups)} parameter groups in the checkpoint and {len(live.param_groups)} in the optimizer"
        ]
    lines = [
        f"{part}: group {number} has {len(saved_group['params'])} parameters in the checkpoint "
        f"and {len(group['params'])} in the optimizer"
        for number, (saved_group, group) in enumerate(zip(groups, live.param_groups, strict=True))
        if len(saved_group["params"]) != len(group["params"])
    ]
    for index, parameter in _parameters_by_index(live, saved).items():
        moments = saved["state"].get(index)
        for name, value in moments.items() if isinstance(moments, Mapping) else ():
            wrong = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape != parameter.shape
            if wrong and name in _MOMENTS:
                lines.append(
                    f"{part}: {name} of parameter {index} is {_describe(value)} in the checkpoint "
                    f"for a parameter of {list(parameter.shape)}"
                )
    return lines


def _parameters_by_index(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> dict[Any, torch.Tensor]:
    """Return an optimizer's parameters by the index that a saved state gives them."""
    groups = zip(saved["param_groups"], optimizer.param_groups, strict=True)
    return {
        index: parameter
        for saved_group, group in groups
        for index, parameter in zip(saved_group["params"], group["params"], strict=False)
    }


def _differences(part: str, live: Any, saved: Any) -> list[str]:
    try:
        return _compare(part, live, saved)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        return [f"{part}: the checkpoint's value under this name does not fit a {kind_of(live)}: {error!r}"]


def _compare(part: str, live: Any, saved: Any) -> list[str]:
    if isinstance(live, torch.nn.Module):
        if not isinstance(saved, Mapping):
            return [f"{part}: the checkpoint has a {kind_of(saved)} under this name, not the state of a module"]
        return module_differences(part, live.state_dict(), saved)
    if isinstance(live, torch.optim.Optimizer):
        return _optimizer_differences(part, live, saved)
    if isinstance(live, torch.Tensor) and not _fits(live, saved):
        return [f"{part}: {_describe(saved)} in the checkpoint and {_describe(live)} in the state"]
    if isinstance(live, np.ndarray):
        fits = isinstance(saved, np.ndarray) and (saved.shape, saved.dtype) == (live.shape, live.dtype)
        return [] if fits else [f"{part}: the saved array differs in shape or dtype from the one in the state"]
    if isinstance(live, argparse.Namespace) and not isinstance(saved, dict):
        return [f"{part}: the checkpoint has a {kind_of(saved)} under this name, not a namespace"]
    return []


# --- restoring ----------------------------------------------------------------------------------------------------


def _load_module(module: torch.nn.Module, saved: Mapping[str, Any], differences: Sequence[str]) -> str:
    live = module.state_dict()
    fitting = {name: value for name, value in saved.items() if name in live and _entry_fits(name, live, saved)}
    sent = send([(live[name], value) for name, value in fitting.items()])
    if sent:  # they are where they belong; load_state_dict gets them from there
        on_gpu = {name: live[name] for name, value in fitting.items() if id(value) in sent}
        fitting |= on_gpu
        metadata = getattr(saved, "_metadata", None)  # the versions of modules
        saved = OrderedDict({**saved, **on_gpu})
        if metadata is not None:
            saved._metadata = metadata  # type: ignore[attr-defined] # noqa: SLF001
    if differences:
        module.load_state_dict(fitting, strict=False)
    else:
        module.load_state_dict(saved, strict=True)
    total, loaded = (sum(isinstance(value, torch.Tensor) for value in values.values()) for values in (live, fitting))
    return f"{loaded} of {total} tensors"


def _on_their_devices(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state whose tensors have memory of their own, on the device of their parameters.

    Steps stay where they are: torch decides on their device.
    """
    parameters = _parameters_by_index(optimizer, saved)
    state: dict[Any, Any] = {}
    pairs = []
    for index, moments in saved["state"].items():
        state[index] = dict(moments) if isinstance(moments, Mapping) else moments
        for name, value in moments.items() if isinstance(moments, Mapping) else ():
            if isinstance(value, torch.Tensor):
                device = parameters[index].device if index in parameters and name != "step" else value.device
                state[index][name] = torch.empty_like(value, device=device)
                pairs.append((state[index][name], value))
    sent = send(pairs)
    for target, value in pairs:
        if id(value) not in sent:
            target.copy_(value)
    return {**saved, "state": state}


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> str:
    optimizer.load_state_dict(dict(saved))
    parameters = _parameters_by_index(optimizer, saved)
    with_moments = {index: moments for index in parameters if (moments := saved["state"].get(index))}
    for index, moments in with_moments.items():
        live = optimizer.state[parameters[index]]
        for name, value in moments.items():
            # torch casts state to the parameter's dtype on load: float32 moments of bfloat16 weights would be rounded
            if isinstance(value, torch.Tensor) and live[name].dtype != value.dtype:
                live[name] = value.to(parameters[index].device)
    groups = f"{len(saved['param_groups'])} groups"
    if not with_moments:
        return f"{groups}; the checkpoint has no moments"
    return f"{groups}, moments of {len(with_moments)} of {len(parameters)} parameters"


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


def _restore_part(name: str, live: Any, saved: SavedState, differences: Sequence[str]) -> tuple[Any, str]:
    """Restore one part; returns the value that is now the part, and a phrase that says what was done."""
    if isinstance(live, torch.nn.Module):
        return live, _load_module(live, saved.value(name), differences)
    if isinstance(live, torch.optim.Optimizer):
        on_gpu = any(parameter.is_cuda for group in live.param_groups for parameter in group["params"])
        state = _on_their_devices(saved.value(name), live) if on_gpu else saved.value(name, own=True)
        return live, _load_optimizer(live, state)
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


_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def restore_into(
    saved: SavedState, live: dict[str, Any], *, strict: bool = True, exhaustive: bool = True
) -> LoadReport:
    """Put a checkpoint back into live objects.

    Nothing is changed before everything that can be compared fits.

    Args:
        live: part name to object; plain values that cannot be changed in place are replaced in this dict.
        strict: raise when something does not fit, otherwise load what fits.
        exhaustive: also compare which parts there are: one that is saved and not in ``live`` is a difference.

    Raises:
        MismatchError: ``strict``, and something does not fit; lists all differences.
        FormatError: the checkpoint holds types that this release does not read.
    """
    trees, manifest = saved.trees.parts, saved.manifest
    by_part: dict[str, list[str]] = {}
    for name, value in live.items():
        if name not in trees:
            by_part[name] = [f"{name}: the checkpoint has no part of this name; it has {', '.join(trees)}"]
        else:
            by_part[name] = _differences(name, value, saved.value(name))
    if exhaustive:
        for name in [name for name in trees if name not in live and name not in saved.trees.optional]:
            by_part[name] = [f"{name}: it is in the checkpoint, but state= names no part {name!r} to restore it into"]
    differences = tuple(line for lines in by_part.values() for line in lines)
    if differences and strict:
        raise _mismatch(saved, live, differences)
    restored = []
    wait_for_copies()
    for name, value in list(live.items()):
        if name in trees and (not by_part[name] or isinstance(value, torch.nn.Module)):
            try:
                live[name], what = _restore_part(name, value, saved, by_part[name])
            except _REFUSALS as error:
                refusal = f"{name}: {type(value).__name__} refused its state: {error}"
                raise _mismatch(saved, {}, (refusal,)) from error
            restored.append(RestoredPart(name, what))
    ref = f"{manifest.run}/{manifest.name}"
    return LoadReport(ref, manifest.step, manifest.epoch, tuple(restored), differences)


def _mismatch(saved: SavedState, live: Mapping[str, Any], differences: tuple[str, ...]) -> MismatchError:
    """Make the error that lists how a checkpoint and the live state differ."""
    lines = "\n  ".join(differences[:30])
    more = f"\n  ... and {len(differences) - 30} more" if len(differences) > 30 else ""
    advice = "build the state as it was when this was saved, or pass strict=False to load what fits"
    pruned = [weight for name in live if name in saved.trees.parts for weight in _pruned(live[name], saved.value(name))]
    if pruned:
        advice = (
            f"{', '.join(pruned[:5])}{' and others' if len(pruned) > 5 else ''} had been pruned with "
            "torch.nn.utils.prune when this was saved: after making the optimizer, call "
            'torch.nn.utils.prune.identity(layer, "weight") for each, and the masks are restored with the weights '
            "(strict=False would leave these weights as they are)"
        )
    ref = f"{saved.manifest.run}/{saved.manifest.name}"
    return MismatchError(f"checkpoint {ref} does not fit the state:\n  {lines}{more}\n{advice}", differences)


def _pruned(live: Any, saved: Any) -> list[str]:
    """Return the weights that have a mask of ``torch.nn.utils.prune`` in a saved state dict, and none in the module."""
    if not isinstance(live, torch.nn.Module) or not isinstance(saved, Mapping):
        return []
    masks = masks_of({name: tuple(value.shape) for name, value in saved.items() if isinstance(value, torch.Tensor)})
    return [name for name in live.state_dict() if name not in saved and f"{name}{ORIGINAL}" in masks]


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
