"""The size of an optimizer's state, before there is any.

Most optimizers make their state at the first step. Which tensors they will hold follows from the class, its options and
the shapes of the parameters. tests/reports/test_plan.py compares it with the state of torch's optimizers.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peakpoint.errors import ConfigError
from peakpoint.format.names import did_you_mean

Shape = tuple[int, ...]
STEP = 4  # bytes: torch counts steps in a float32 of each parameter

DTYPES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """The size of an optimizer's state.

    Attributes:
        elements: in all, in the element type of its moments.
        tensors: how many tensors these are.
        scalars: how many numbers of four bytes there are besides, such as the count of steps.
    """

    elements: int
    tensors: int
    scalars: int


StateOf = Callable[[Shape, Mapping[str, Any]], OptimizerState]
"""Returns the state for a parameter of a shape, with the options of its group."""


def _per_element(count: int, scalars: int = 1, *flags: str) -> StateOf:
    """So many tensors of the parameter's shape, and one more for each option that is set."""

    def state(shape: Shape, options: Mapping[str, Any]) -> OptimizerState:
        tensors = count + sum(bool(options.get(flag)) for flag in flags)
        return OptimizerState(tensors * math.prod(shape), tensors, scalars)

    return state


def _factored(shape: Shape, _: Mapping[str, Any]) -> OptimizerState:
    """One number for each row and each column. Source: Shazeer and Stern, "Adafactor", ICML 2018."""
    if len(shape) < 2:
        return OptimizerState(math.prod(shape), 1, 1)
    *leading, rows, columns = shape
    return OptimizerState(math.prod(leading) * (rows + columns), 2, 1)


# By the lower-case name of the class; the options are those of torch.optim.
_KNOWN: dict[str, StateOf] = {
    "none": _per_element(0, 0),
    "sgd": _per_element(0, 0, "momentum"),
    "adam": _per_element(2, 1, "amsgrad"),
    "adamw": _per_element(2, 1, "amsgrad"),
    "nadam": _per_element(2, 2),
    "radam": _per_element(2),
    "adamax": _per_element(2),
    "adadelta": _per_element(2),
    "adagrad": _per_element(1),
    "rmsprop": _per_element(1, 1, "momentum", "centered"),
    "adafactor": _factored,
    "lion": _per_element(1, 0),  # Source: Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023
    "muon": _per_element(1, 0),
}
_ALIASES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "sgd+momentum": ("sgd", {"momentum": 0.9}),
    "amsgrad": ("adam", {"amsgrad": True}),
}

NAMES = tuple(sorted({*_KNOWN, *_ALIASES}))


def optimizer_state(
    optimizer: str, shapes: Iterable[Shape], options: Mapping[str, Any] | None = None
) -> OptimizerState:
    """Calculate the state that an optimizer will hold for all its parameters together.

    Args:
        optimizer: the name of its class, in upper or lower case, or one of ``NAMES``.
        shapes: of the parameters that it trains.
        options: those of its parameter group, such as ``{"momentum": 0.9}``.

    Raises:
        ConfigError: an unknown optimizer.

    Example:
        >>> optimizer_state("AdamW", [(3, 4), (4,)])
        OptimizerState(elements=32, tensors=4, scalars=2)
        >>> optimizer_state("adafactor", [(300, 400)]).elements
        700
    """
    name, options = _ALIASES.get(optimizer.lower(), (optimizer.lower(), options or {}))
    if name not in _KNOWN:
        raise ConfigError(
            f"optimizer {optimizer!r} is not known to the planner{did_you_mean(optimizer.lower(), NAMES)}; known are "
            f"{', '.join(NAMES)}. For any other, plan from the live state after its first step"
        )
    states = [_KNOWN[name](shape, options) for shape in shapes]
    return OptimizerState(
        elements=sum(state.elements for state in states),
        tensors=sum(state.tensors for state in states),
        scalars=sum(state.scalars for state in states),
    )


def needs_shapes(optimizer: str) -> bool:
    """Return whether the state depends on more than the number of parameters."""
    return _KNOWN.get(optimizer.lower()) is _factored


def bytes_of(dtype: str) -> int:
    """Return the bytes of an element.

    Raises:
        ConfigError: an unknown element type.
    """
    if dtype not in DTYPES:
        near = did_you_mean(dtype, list(DTYPES))
        raise ConfigError(f"dtype {dtype!r} is not known{near}; known are {', '.join(DTYPES)}")
    return DTYPES[dtype]
