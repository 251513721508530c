"""From the files of a checkpoint back to live objects.

Everything that can be compared is compared before anything is changed, and what was restored is said part by part.
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
from peakpoint.format.manifest import Manifest
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
        what: one sentence: how much of what.
    """

    part: str
    what: str


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did.

    Attributes:
        ref: the checkpoint, as a ref that names no other.
        step: optimizer steps completed at the checkpoint.
        epoch: the epoch's index, None outside epochs.
        restored: part by part.
        missing: one sentence for each thing that was not restored, empty after a strict load.
        skipped: one sentence for each newer checkpoint that was passed over, and why.
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
        lines += [f"  passed over: {line}" for line in self.skipped]
        width = max((len(part.part) for part in self.restored), default=0)
        lines += [f"  {part.part:<{width}}  {part.what}" for part in self.restored]
        lines += [f"  NOT restored: {line}" for line in self.missing]
        return "\n".join(lines)


# --- does it fit? -------------------------------------------------------------------------------------------------


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


_EXTRA_STATE = "_extra_state"  # what a module's get_extra_state gave: its set_extra_state takes any shape


def module_differences(part: str, live: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """What keeps a saved state dict from fitting a module: names, shapes and dtypes."""
    missing = [name for name in live if name not in saved]
    unknown = [name for name in saved if name not in live]
    different = [
        name
        for name in saved
        if name in live and not str(name).endswith(_EXTRA_STATE) and not _fits(live[name], saved[name])
    ]
    return [
        *(f"{part}: the checkpoint has no {name!r} ({_describe(live[name])})" for name in missing),
        *(f"{part}: the checkpoint has {name!r} ({_describe(saved[name])}), the model has not" for name in unknown),
        *(
            f"{part}: {name!r} is {_describe(saved[name])} in the checkpoint, {_describe(live[name])} in the model"
            for name in different
        ),
    ]


_MOMENTS = frozenset(
    {
        "acc_delta",
        "exp_avg",
        "exp_avg_sq",
        "exp_inf",
        "grad_avg",
        "max_exp_avg_sq",
        "momentum_buffer",
        "square_avg",
        "sum",
    }
)


def optimizer_differences(part: str, live: torch.optim.Optimizer, saved: Any) -> list[str]:
    """What keeps a saved state from fitting an optimizer: groups, numbers of parameters, shapes of moments."""
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        return [f"{part}: what was saved under this name is no optimizer state"]
    theirs, ours = saved["param_groups"], live.param_groups
    if len(theirs) != len(ours):
        return [f"{part}: {len(theirs)} parameter groups in the checkpoint and {len(ours)} in the optimizer"]
    lines = []
    parameters: dict[Any, torch.Tensor] = {}
    for number, (group, mine) in enumerate(zip(theirs, ours, strict=True)):
        if len(group["params"]) != len(mine["params"]):
            lines.append(
                f"{part}: group {number} has {len(group['params'])} parameters in the checkpoint "
                f"and {len(mine['params'])} in the optimizer"
            )
        parameters |= dict(zip(group["params"], mine["params"], strict=False))
    for index, moments in saved["state"].items():
        parameter = parameters.get(index)
        if parameter is None or not isinstance(moments, Mapping):
            continue
        for name, value in moments.items():
            wrong = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape != parameter.shape
            if wrong and name in _MOMENTS:
                lines.append(
                    f"{part}: {name} of parameter {index} is {_describe(value)} in the checkpoint "
                    f"for a parameter of {list(parameter.shape)}"
                )
    return lines


def _differences(part: str, live: Any, saved: Any) -> list[str]:
    try:
        return _compare(part, live, saved)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        return [f"{part}: what was saved under this name is no state of a {kind_of(live)}: {error!r}"]


def _compare(part: str, live: Any, saved: Any) -> list[str]:
    if isinstance(live, torch.nn.Module):
        if not isinstance(saved, Mapping):
            return [f"{part}: what was saved under this name is a {kind_of(saved)}, not the state of a module"]
        return module_differences(part, live.state_dict(), saved)
    if isinstance(live, torch.optim.Optimizer):
        return optimizer_differences(part, live, saved)
    if isinstance(live, torch.Tensor) and not _fits(live, saved):
        return [f"{part}: {_describe(saved)} in the checkpoint and {_describe(live)} in the state"]
    if isinstance(live, np.ndarray):
        same = isinstance(saved, np.ndarray) and (saved.shape, saved.dtype) == (live.shape, live.dtype)
        return [] if same else [f"{part}: the saved array differs in shape or dtype from the one in the state"]
    if isinstance(live, argparse.Namespace) and not isinstance(saved, dict):
        return [f"{part}: what was saved under this name is a {kind_of(saved)}, not a namespace"]
    return []


# --- putting it back ----------------------------------------------------------------------------------------------


def _load_module(module: torch.nn.Module, saved: Mapping[str, Any], differences: Sequence[str]) -> str:
    live = module.state_dict()
    fitting = {
        name: value
        for name, value in saved.items()
        if name in live and (str(name).endswith(_EXTRA_STATE) or _fits(live[name], value))
    }
    sent = send([(live[name], value) for name, value in fitting.items()])
    if sent:  # they are where they belong; load_state_dict gets them from there
        arrived = {name: live[name] for name, value in fitting.items() if id(value) in sent}
        fitting |= arrived
        saved = _replaced(saved, arrived)
    if differences:
        module.load_state_dict(fitting, strict=False)
    else:
        module.load_state_dict(saved, strict=True)
    count = sum(isinstance(value, torch.Tensor) for value in live.values())
    done = sum(isinstance(value, torch.Tensor) for value in fitting.values())
    return f"{done} of {count} tensors"


def _replaced(saved: Mapping[str, Any], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict with other values, and the versions of modules that came with it."""
    replaced: OrderedDict[str, Any] = OrderedDict({**saved, **values})
    metadata = getattr(saved, "_metadata", None)
    if metadata is not None:
        replaced._metadata = metadata  # type: ignore[attr-defined] # noqa: SLF001
    return replaced


def _moved(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state whose tensors have memory of their own, on the device of their parameters.

    Steps stay where they are: torch decides where it wants them.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    devices = {index: parameter.device for index, parameter in zip(indices, parameters, strict=True)}
    moved: dict[Any, Any] = {}
    pairs = []
    for index, moments in saved["state"].items():
        moved[index] = moments
        if not isinstance(moments, Mapping):
            continue
        moved[index] = dict(moments)
        for name, value in moments.items():
            if isinstance(value, torch.Tensor):
                device = devices.get(index, value.device) if name != "step" else value.device
                moved[index][name] = torch.empty_like(value, device=device)
                pairs.append((moved[index][name], value))
    sent = send(pairs)
    for target, value in pairs:
        if id(value) not in sent:
            target.copy_(value)
    return {**saved, "state": moved}


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> str:
    optimizer.load_state_dict(dict(saved))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    having = 0
    for index, parameter in zip(indices, parameters, strict=True):
        wanted = saved["state"].get(index)
        if not wanted:
            continue
        having += 1
        live = optimizer.state[parameter]
        for name, value in wanted.items():
            # torch casts state to the parameter's dtype on load: float32 moments of bfloat16 weights would be rounded
            if isinstance(value, torch.Tensor) and live[name].dtype != value.dtype:
                live[name] = value.to(parameter.device)
    if not having:
        return f"{len(saved['param_groups'])} groups; no moments, none had been saved"
    return f"{len(saved['param_groups'])} groups, moments of {having} of {len(parameters)} parameters"


def _update(live: Any, saved: Any) -> tuple[Any, str]:
    """Put a plain value back in place where it can be changed; otherwise the new value replaces it."""
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
    if isinstance(live, enum.Enum):
        return type(live)(saved), f"a {kind_of(live)}; read it from the checkpointer's state"
    if isinstance(live, dict) and isinstance(saved, dict):
        live.clear()
        live.update(saved)
        return live, "dict, in place"
    if isinstance(live, list) and isinstance(saved, list):
        live[:] = saved
        return live, "list, in place"
    return saved, f"a {kind_of(saved)}; read it from the checkpointer's state"


def _put_back(name: str, live: Any, saved: SavedState, differences: Sequence[str]) -> tuple[Any, str]:
    """Restore one part; returns the value that is now the part, and what was done."""
    if isinstance(live, torch.nn.Module):
        return live, _load_module(live, saved.value(name), differences)
    if isinstance(live, torch.optim.Optimizer):
        on_gpu = any(parameter.is_cuda for group in live.param_groups for parameter in group["params"])
        return live, _load_optimizer(live, _moved(saved.value(name), live) if on_gpu else saved.value(name, own=True))
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


def restore_into(
    saved: SavedState, live: dict[str, Any], *, strict: bool = True, exhaustive: bool = True
) -> tuple[tuple[RestoredPart, ...], tuple[str, ...]]:
    """Put a checkpoint back into live objects.

    Nothing is changed before everything that can be compared fits.

    Args:
        saved: the checkpoint's content.
        live: part name to object; plain values that cannot be changed in place are replaced in this dict.
        strict: raise when something does not fit, otherwise load what fits.
        exhaustive: also compare which parts there are: one that is saved and not given is a difference.

    Returns:
        What was restored, part by part, and one sentence for each thing that was not.

    Raises:
        MismatchError: ``strict``, and something does not fit; lists all differences.
        FormatError: the checkpoint holds types that this release does not read.
    """
    by_part: dict[str, list[str]] = {}
    for name, value in live.items():
        if name not in saved.trees:
            by_part[name] = [f"{name}: the checkpoint has no part of this name; it has {', '.join(saved.trees)}"]
        else:
            by_part[name] = _differences(name, value, saved.value(name))
    if exhaustive:
        for name in [name for name in saved.trees if name not in live and name not in saved.optional]:
            by_part[name] = [f"{name}: it is in the checkpoint, but state= names no part {name!r} to restore it into"]
    differences = tuple(line for lines in by_part.values() for line in lines)
    if differences and strict:
        pruned = [weight for name in live if name in saved.trees for weight in _pruned(live[name], saved.value(name))]
        raise mismatch(saved.manifest, differences, pruned)
    restored = []
    wait_for_copies()
    for name, value in list(live.items()):
        lines = by_part[name]
        if name not in saved.trees or (lines and not isinstance(value, torch.nn.Module)):
            continue
        try:
            live[name], what = _put_back(name, value, saved, lines)
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise mismatch(saved.manifest, (f"{name}: {type(value).__name__} refused its state: {error}",)) from error
        restored.append(RestoredPart(name, what))
    return tuple(restored), differences


def mismatch(manifest: Manifest, differences: tuple[str, ...], pruned: Sequence[str] = ()) -> MismatchError:
    """The error that lists how a checkpoint and the live state differ.

    Args:
        manifest: of the checkpoint.
        differences: one line for each.
        pruned: names of weights that have a mask in the checkpoint, and none in the model.
    """
    shown = "\n  ".join(differences[:30])
    more = f"\n  ... and {len(differences) - 30} more" if len(differences) > 30 else ""
    advice = "make the state as it was when this was saved, or pass strict=False to load what fits"
    if pruned:
        advice = (
            f"{', '.join(pruned[:5])}{' and others' if len(pruned) > 5 else ''} had been pruned with "
            "torch.nn.utils.prune when this was saved: after making the optimizer, call "
            'torch.nn.utils.prune.identity(layer, "weight") for each, and the masks are restored with the weights '
            "(strict=False would leave these weights as they are)"
        )
    return MismatchError(
        f"checkpoint {manifest.run}/{manifest.name} does not fit the state:\n  {shown}{more}\n{advice}", differences
    )


def _pruned(live: Any, saved: Any) -> list[str]:
    """The weights that have a mask of ``torch.nn.utils.prune`` in a saved state dict, and none in the live module."""
    if not isinstance(live, torch.nn.Module) or not isinstance(saved, Mapping):
        return []
    masks = masks_of({name: tuple(value.shape) for name, value in saved.items() if isinstance(value, torch.Tensor)})
    return [name for name in live.state_dict() if name not in saved and f"{name}{ORIGINAL}" in masks]


def make_model(function: Callable[[], Any], name: str) -> tuple[Any, Any]:
    """Call a function of the user that makes a model; returns the model, and an example of its inputs or None.

    Args:
        function: returns the model, or the model and an example of its inputs.
        name: the function for errors.

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
