"""The states of random generators as other tools save them, known by their form."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from peakpoint.state import rng

_PYTHON_WORDS, _NUMPY_WORDS, _TORCH_BYTES = 625, 624, 5056
_GLOBAL = re.compile(r"rng|random|seed", re.IGNORECASE)  # in the names that scripts and tools give to them
_OF_AN_OBJECT = re.compile(r"loader|sampler|generator|env", re.IGNORECASE)  # not those of the process


def generators_in(content: Mapping[str, Any], but: Collection[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Find the states of the process's generators at the top of a dict, or one level deeper.

    Args:
        but: names to be left alone.

    Returns:
        The states as ``rng.pack`` returns them, empty when there are none; and what else is under the names that were
        taken, empty values left out.
    """
    states: dict[str, Any] = {}
    leftovers: dict[str, Any] = {}
    for name, value in content.items():
        if name in but or not _GLOBAL.search(name) or _OF_AN_OBJECT.search(name):
            continue
        if _take(name, value, states):
            leftovers[name] = None
            continue
        per_rank = isinstance(value, list) and bool(value)
        of_rank = value[0] if per_rank else value
        if isinstance(of_rank, dict):
            used = [key for key, state in of_rank.items() if _take(str(key), state, states)]
            if used:
                rest_of_rank = {key: state for key, state in of_rank.items() if key not in used}
                leftovers[name] = value if per_rank and len(value) > 1 else rest_of_rank or None
    if not states:
        return {}, {}
    return rng.pack(states.get("python"), states.get("numpy"), states.get("cpu"), states.get("cuda", ())), leftovers


def _take(name: str, value: Any, states: dict[str, Any]) -> bool:
    """Put a generator's state into ``states``, unless it is none or there is one of its kind; whether it was put."""
    kind, state = _state(name, value)
    if kind is None or kind in states:
        return False
    states[kind] = state
    return True


def _state(name: str, value: Any) -> tuple[str | None, Any]:
    """Return the kind of generator and its state as its library takes it; None for everything else."""
    if isinstance(value, tuple | list) and len(value) == 3 and _is_sequence(value[1], _PYTHON_WORDS):
        return "python", (value[0], tuple(value[1]), value[2])
    if isinstance(value, dict) and value.get("bit_generator") == "MT19937" and isinstance(value.get("state"), dict):
        integers = value["state"]
        value = (
            "MT19937",
            integers.get("key"),
            integers.get("pos"),
            value.get("has_gauss", 0),
            value.get("gauss", 0.0),
        )
    if isinstance(value, tuple | list) and len(value) == 5 and isinstance(value[1], np.ndarray):
        algorithm, integers, *numbers = value
        fits = algorithm == "MT19937" and integers.shape == (_NUMPY_WORDS,) and integers.dtype.kind in "iu"
        fits = fits and all(type(number) in (int, float) for number in numbers)
        return ("numpy", tuple(value)) if fits else (None, None)
    if "cuda" in name.lower():
        devices = value if isinstance(value, list) else [value]
        return ("cuda", devices) if devices and all(map(_is_bytes, devices)) else (None, None)
    return ("cpu", value) if _is_bytes(value) and value.numel() == _TORCH_BYTES else (None, None)


def _is_sequence(value: Any, length: int) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == length
        and all(type(word) is int and 0 <= word < 2**32 for word in value)
    )


def _is_bytes(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.dim() == 1
