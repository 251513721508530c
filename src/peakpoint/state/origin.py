"""What a checkpoint notes of the objects that a part was saved from: class, names of parameters, settings.

None of it is restored. It tells a later resume whether a state belongs to the live object, and which settings of the
script are overruled.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import torch
from torch.optim.lr_scheduler import LRScheduler

from peakpoint.state.step_guard import stepping
from peakpoint.state.typed_json import Decoder, Encoder

_BASES = {"LRScheduler", "Module", "Optimizer", "_LRScheduler", "Generic", "object"}  # they say nothing about a state
_WRAPPERS = {"_orig_mod", "module"}  # names under which torch.compile and DataParallel hold a module
_NO_SETTINGS = {"base_lrs", "initial_lr", "param_names", "params"}
_NO_SETTINGS |= {"last_epoch", "T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter"}  # they move
_LONGEST = 16  # settings that are lists; longer ones are data
_REPARAMETRIZED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original(\d*)$")


class PartOrigin(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a part was saved from.

    Attributes:
        classes: its class and the bases of it, by full name.
        names: of an optimizer: the names of its parameters by group, where the state has the modules that own them.
        settings: of optimizers and schedulers: as the script has made them, by path, a tree of typed JSON each.
    """

    classes: list[str] = []
    names: list[list[str]] = []
    settings: dict[str, Any] = {}


NO_ORIGIN = PartOrigin()


def origins_of(state: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, PartOrigin]:
    """Return what every part with a state dict is saved from.

    Args:
        settings: by part.
    """
    names = parameter_names(state)
    return {
        part: PartOrigin(
            classes=class_names(value),
            names=names_by_group(value, names) if isinstance(value, torch.optim.Optimizer) else [],
            settings={path: Encoder().encode(setting, path) for path, setting in settings.get(part, {}).items()},
        )
        for part, value in state.items()
        if hasattr(value, "state_dict") and not isinstance(value, type)
    }


def param_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return an optimizer's groups; a wrapper may have none of its own."""
    groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", None) or getattr(
        unwrapped(optimizer), "param_groups", []
    )
    return groups


def unwrapped(value: Any) -> Any:
    """Return the optimizer or scheduler inside a wrapper such as Accelerate's; otherwise the value itself."""
    if isinstance(value, torch.optim.Optimizer):
        return stepping(value) or value
    inner = None if isinstance(value, LRScheduler | torch.nn.Module) else getattr(value, "scheduler", None)
    return inner if isinstance(inner, LRScheduler) else value


def class_names(value: Any) -> list[str]:
    """Return the full names of a value's class and its bases, but those that every object of its kind has."""
    kind = type(unwrapped(value))
    bases = [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__ if base.__name__ not in _BASES]
    return bases[:1] if issubclass(kind, torch.nn.Module) else bases


# --- names of parameters --------------------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """Return a name in a module without what wrappers put into it.

    Example:
        >>> plain_name("module.encoder._orig_mod.weight")
        'encoder.weight'
    """
    return ".".join(piece for piece in name.split(".") if piece not in _WRAPPERS)


def parameter_names(state: Mapping[str, Any]) -> dict[int, str]:
    """Return the names of all parameters of the modules in a state, by identity; those of a mask by their weight."""
    names: dict[int, str] = {}
    for part, value in state.items():
        if not isinstance(value, torch.nn.Module):
            continue
        buffers = {name for name, _ in value.named_buffers()}
        for name, parameter in value.named_parameters():
            stem = name.removesuffix("_orig")
            weight = stem if f"{stem}_mask" in buffers else _REPARAMETRIZED.sub(r"\1\2\3", name)
            names.setdefault(id(parameter), f"{part}.{plain_name(weight)}")
    return names


def reparametrized(live: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Return the weights that ``torch.nn.utils.parametrize`` computes in the one state dict only."""
    weights = {
        plain_name(_REPARAMETRIZED.sub(r"\1\2", name)) for name in map(str, saved) if _REPARAMETRIZED.search(name)
    }
    return [name for name in live if name not in saved and plain_name(str(name)) in weights]


def names_by_group(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[list[str]]:
    """Return the names of an optimizer's parameters by group; empty unless all are known."""
    groups = [[names.get(id(parameter), "") for parameter in group["params"]] for group in param_groups(optimizer)]
    return groups if all(all(group) for group in groups) else []


# --- settings -------------------------------------------------------------------------------------------------------


def script_settings(value: Any) -> dict[str, Any]:
    """Return the settings of an optimizer or a scheduler by path, such as ``"0.lr"`` of group 0; empty for others."""
    value = unwrapped(value)
    if isinstance(value, torch.optim.Optimizer):
        # a scheduler moves lr away from initial_lr
        groups = [{**group, "lr": group.get("initial_lr", group.get("lr"))} for group in param_groups(value)]
        return dict(_flat(groups))
    if isinstance(value, LRScheduler):
        return dict(_flat(value.state_dict()))
    return {}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        yield path, value
    elif isinstance(value, list | tuple) and all(isinstance(child, bool | int | float | str) for child in value):
        if len(value) <= _LONGEST:
            yield path, list(value)
    elif isinstance(value, list | tuple | dict):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            name = str(key)
            if name not in _NO_SETTINGS and (not name.startswith("_") or name == "_schedulers"):
                yield from _flat(child, f"{path}.{name}".removeprefix("."))


def noted_settings(origin: PartOrigin, live: Any, restored: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings that the script had made which began this.

    Without a note in the checkpoint, those of an optimizer are the ``restored`` ones; of a scheduler, nothing tells the
    settings from what has moved.
    """
    if origin.settings:
        return {path: Decoder({}).decode(tree) for path, tree in origin.settings.items()}
    return restored if isinstance(live, torch.optim.Optimizer) else {}


def overruled_settings(
    part: str, script: Mapping[str, Any], restored: Mapping[str, Any], first: Mapping[str, Any]
) -> str:
    """Say which settings of a script are overruled by those that were restored; empty when none are.

    Scripts are compared with scripts: what training has moved since, such as a learning rate, is no difference.

    Args:
        script: the settings before the restore.
        first: see ``noted_settings``.
    """
    texts = [
        f"{path.rpartition('.')[2]} {first[path]!r}, not {value!r}"
        for path, value in script.items()
        if path in first and value not in (first[path], restored.get(path))
    ]
    return f"{part}: {'; '.join(dict.fromkeys(texts))}" if texts else ""
