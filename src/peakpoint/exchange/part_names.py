"""Which entries of a dict that a script has saved are which parts."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from peakpoint.errors import FormatError
from peakpoint.format.names import EXTRA, RESERVED_PARTS

_NOT_IN_PART_NAMES = re.compile(r"^[^A-Za-z0-9_]+|[^A-Za-z0-9_.-]+")
_DEEPEST = 4  # levels of a dict that are searched
_USUAL_NAMES = {  # in small letters; the first that the dict has, with a fitting value, counts
    "model": (
        *("model_state_dict", "state_dict", "model_state", "model", "net", "network", "weights", "network_weights"),
        *("module", "model_dict", "model_weights", "net_state_dict", "params"),
    ),
    "optimizer": ("optimizer_state_dict", "optimizer_state", "optimizer", "optim", "optim_state_dict", "opt"),
    "scheduler": (
        *("scheduler_state_dict", "lr_scheduler_state_dict", "scheduler", "lr_scheduler", "scheduler_state"),
        *("lr_scheduler_state", "sched"),
    ),
    "scaler": (
        *("scaler_state_dict", "grad_scaler_state_dict", "grad_scaler", "gradscaler", "scaler", "scaler_state"),
        *("amp", "native_amp", "amp_scaler", "amp_state_dict", "loss_scaler", "native_amp_scaler", "mixedprecision"),
        "native_amp_scaling_state",
    ),
    "ema": (
        *("ema_state_dict", "model_ema", "state_dict_ema", "ema", "ema_model", "model_ema_state_dict"),
        *("ema_model_state_dict", "ema_weights", "ema_state", "averaged_model", "averaged_model_state_dict"),
        *("average_model", "avg_model", "swa_state_dict", "swa_model", "swa_model_state_dict", "model_swa", "swa"),
        "params_ema",
    ),
}
Place = tuple[str, ...]  # the keys that lead to an entry


def is_weights(value: Any) -> bool:
    """Whether a value is a dict of tensors, with nothing else but what modules add by ``get_extra_state``."""
    if not isinstance(value, dict):
        return False
    children = [child for key, child in value.items() if not str(key).endswith("_extra_state")]
    return bool(children) and all(isinstance(child, torch.Tensor) for child in children)


def is_optimizer(value: Any) -> bool:
    """Whether a value is the state of an optimizer."""
    return isinstance(value, dict) and {"state", "param_groups"} <= value.keys()


def part_name(key: str) -> str:
    """Return a name in the file as the name of a part."""
    name = _NOT_IN_PART_NAMES.sub("_", key)[:60].rstrip(".") or "part"
    return f"my_{name}" if name in {EXTRA, *RESERVED_PARTS} else name


def _fits(part: str, value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    if part == "model":
        return any(isinstance(child, torch.Tensor) for child in value.values())
    if part == "ema":
        children = [inner for child in value.values() for inner in (child if isinstance(child, list) else [child])]
        return any(isinstance(child, torch.Tensor) for child in children)
    if part == "scaler":
        return not value or "scale" in value
    return is_optimizer(value) if part == "optimizer" else True


def _is_model(value: Any) -> bool:
    """Whether a value may be the state of a model by itself: numbers are metrics."""
    return is_weights(value) and any(isinstance(child, torch.Tensor) and child.dim() for child in value.values())


def find_parts(
    content: Mapping[str, Any], user_names: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Return the parts, the names in the file with the parts that they became, and what remains.

    State dicts deeper in the dict are looked for when there is no model at its top.

    Args:
        user_names: names in the file to parts; ``EXTRA`` for what is no part. A dot leads one level deeper.

    Raises:
        FormatError: a name is not in the file, or what it names cannot be that part.
    """
    twice = [part for part in user_names.values() if part != EXTRA and list(user_names.values()).count(part) > 1]
    if twice:
        raise FormatError(f"two names become the part {twice[0]}: {', '.join(user_names)}; name both with --part")
    by_user = {_place(content, name, part): part for name, part in user_names.items()}
    part_of = {place: part for place, part in by_user.items() if part != EXTRA}
    for place, part in part_of.items():
        _check_fits(content, place, part)
    alone = not any(_is_model(_entry_at(content, place)) for place in part_of)
    top: dict[Place, Any] = {(key,): value for key, value in content.items() if (key,) not in by_user}
    _choose(top, part_of, alone=alone)
    if "model" not in part_of.values() and not any(_is_model(_entry_at(content, place)) for place in part_of):
        decided = {*by_user, *part_of}
        deeper = {
            place: value
            for place, value in _entries(content)
            if len(place) > 1 and not any(place[: len(above)] == above for above in decided)
        }
        if any(map(_is_model, deeper.values())):
            _choose(deeper, part_of, alone=alone)
    parts = {part: _with_numbers(part, _entry_at(content, place)) for place, part in part_of.items()}
    remaining: Any = dict(content)
    for place in part_of:
        remaining = _without(remaining, place)
    return parts, {".".join(place): part for place, part in part_of.items()}, remaining


def _choose(entries: Mapping[Place, Any], part_of: dict[Place, str], *, alone: bool) -> None:
    """Add the entries that are parts: by a usual name, as the only one of its kind, or under their own names.

    Args:
        alone: whether the only state dict is the model; not where the user has named others.
    """
    for part, usual in _USUAL_NAMES.items():
        ranked = [(usual.index(place[-1].lower()), place) for place in entries if place[-1].lower() in usual]
        fitting = sorted(
            (rank, place) for rank, place in ranked if _fits(part, entries[place]) and place not in part_of
        )
        if fitting and part not in part_of.values() and (len(fitting) == 1 or len(fitting[0][1]) == 1):
            part_of[fitting[0][1]] = part
    for part, is_kind in (("model", _is_model), ("optimizer", is_optimizer)):
        only = [place for place, value in entries.items() if place not in part_of and is_kind(value)]
        if len(only) == 1 and part not in part_of.values() and (alone or part != "model"):
            part_of[only[0]] = part
    for place, value in entries.items():
        if place not in part_of and (is_weights(value) or is_optimizer(value)):
            name = part_name(".".join(place))
            while name in part_of.values():
                name = f"my_{name}"
            part_of[place] = name


def _entries(content: Mapping[str, Any], above: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield what is in a dict and in the dicts below, but not what is in state dicts."""
    for key, value in content.items():
        place = (*above, str(key))
        yield place, value
        inner = isinstance(value, dict) and not is_weights(value) and not is_optimizer(value)
        if inner and len(place) < _DEEPEST and all(isinstance(name, str) for name in value):
            yield from _entries(value, place)


def _entry_at(content: Any, place: Place) -> Any:
    for key in place:
        content = content[key]
    return content


def _without(content: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Return a dict without an entry, and without the dicts that it leaves empty."""
    first, *deeper = place
    remaining = dict(content)
    inner = _without(remaining[first], tuple(deeper)) if deeper else {}
    if inner:
        remaining[first] = inner
    else:
        del remaining[first]
    return remaining


def _place(content: Mapping[str, Any], name: str, part: str) -> Place:
    """Return the keys that lead to what a user names, where a dot may be part of a key or lead one level deeper."""
    if name in content:
        return (name,)
    for key, value in content.items():
        if name.startswith(f"{key}.") and isinstance(value, dict):
            try:
                return (key, *_place(value, name.removeprefix(f"{key}."), part))
            except FormatError:
                continue
    raise FormatError(f"--part {name}={part}: the file has no {name!r}; it has {', '.join(map(str, content))}")


def _check_fits(content: Mapping[str, Any], place: Place, part: str) -> None:
    value, name = _entry_at(content, place), ".".join(place)
    if part not in {"model", "optimizer"} or _fits(part, value):
        return
    kind = "the state of an optimizer" if part == "optimizer" else "a state dict of tensors"
    below = _entries(value, place) if isinstance(value, dict) else ()
    inner = [".".join(deeper) for deeper, entry in below if _fits(part, entry)]
    advice = f"; deeper in it are {', '.join(inner)}: --part {inner[0]}={part}" if inner else ""
    raise FormatError(f"--part {name}={part}: {name!r} in the file is not {kind}{advice}")


def _with_numbers(part: str, value: Any) -> Any:
    """Return an optimizer's state with parameters by number: torch.distributed.checkpoint makes the numbers text."""
    state = value["state"] if part == "optimizer" and is_optimizer(value) else None
    if not isinstance(state, dict) or not state or not all(str(key).isdecimal() for key in state):
        return value
    by_number = {int(key): moments for key, moments in state.items()}
    return {**value, "state": by_number} if len(by_number) == len(state) else value
