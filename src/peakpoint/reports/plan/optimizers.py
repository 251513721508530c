"""What the state of an optimizer takes, before there is any.

Most optimizers make their state at the first step. Which tensors they will hold follows from the class, its options and
the shapes of the parameters. tests/reports/test_plan.py compares it with what torch's optimizers really hold.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """What an optimizer holds for one parameter.

    Attributes:
        elements: in all, in the element type of its moments.
        tensors: how many tensors that are.
        scalars: how many numbers of four bytes besides, such as the count of steps.
    """

    elements: int
    tensors: int
    scalars: int


Rule = Callable[[Shape, Mapping[str, Any]], OptimizerState]


def _whole(count: int, scalars: int = 1, *flags: str) -> Rule:
    """So many tensors of the parameter's shape, and one more for each option that is set."""

    def held(shape: Shape, options: Mapping[str, Any]) -> OptimizerState:
        tensors = count + sum(bool(options.get(flag)) for flag in flags)
        return OptimizerState(tensors * math.prod(shape), tensors, scalars)

    return held


def _factored(shape: Shape, _: Mapping[str, Any]) -> OptimizerState:
    """One number for each row and each column. Source: Shazeer and Stern, "Adafactor", ICML 2018."""
    if len(shape) < 2:
        return OptimizerState(math.prod(shape), 1, 1)
    *many, rows, columns = shape
    return OptimizerState(math.prod(many) * (rows + columns), 2, 1)


# By the lower-case name of the class; the options are those of torch.optim.
_KNOWN: dict[str, Rule] = {
    "none": _whole(0, 0),
    "sgd": _whole(0, 0, "momentum"),
    "adam": _whole(2, 1, "amsgrad"),
    "adamw": _whole(2, 1, "amsgrad"),
    "nadam": _whole(2, 2),
    "radam": _whole(2),
    "adamax": _whole(2),
    "adadelta": _whole(2),
    "adagrad": _whole(1),
    "rmsprop": _whole(1, 1, "momentum", "centered"),
    "adafactor": _factored,
    "lion": _whole(1, 0),  # Source: Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023
    "muon": _whole(1, 0),
}
_ALIASES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "sgd+momentum": ("sgd", {"momentum": 0.9}),
    "amsgrad": ("adam", {"amsgrad": True}),
}

NAMES = tuple(sorted({*_KNOWN, *_ALIASES}))


def optimizer_state(
    optimizer: str, shapes: Iterable[Shape], options: Mapping[str, Any] | None = None
) -> OptimizerState:
    """What an optimizer will hold, all parameters together.

    Args:
        optimizer: the name of its class, in upper or lower case, or one of ``NAMES``.
        shapes: of the parameters that it trains.
        options: those of its parameter group, such as ``{"momentum": 0.9}``.

    Raises:
        ConfigError: an optimizer that is not known here; names near ones.

    Example:
        >>> optimizer_state("AdamW", [(3, 4), (4,)])
        OptimizerState(elements=32, tensors=4, scalars=2)
        >>> optimizer_state("adafactor", [(300, 400)]).elements
        700
    """
    name, given = _ALIASES.get(optimizer.lower(), (optimizer.lower(), options or {}))
    if name not in _KNOWN:
        raise ConfigError(
            f"optimizer {optimizer!r} is not known to the planner{did_you_mean(optimizer.lower(), NAMES)}; it knows "
            f"{', '.join(NAMES)}. Of any other, plan from the live state after its first step"
        )
    each = [_KNOWN[name](shape, given) for shape in shapes]
    return OptimizerState(
        sum(one.elements for one in each), sum(one.tensors for one in each), sum(one.scalars for one in each)
    )


def needs_shapes(optimizer: str) -> bool:
    """Whether the number of parameters alone does not tell."""
    return _KNOWN.get(optimizer.lower()) is _factored


def bytes_of(dtype: str) -> int:
    """Bytes of an element.

    Raises:
        ConfigError: an element type that is not known.
    """
    if dtype not in DTYPES:
        names: Sequence[str] = list(DTYPES)
        raise ConfigError(f"dtype {dtype!r} is not known{did_you_mean(dtype, names)}; known are {', '.join(names)}")
    return DTYPES[dtype]
