"""What moves after a report in the same turn of a loop: it is in no checkpoint of that report."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from peakpoint.state import rng
from peakpoint.state.capture import Stateful, is_generator, state_of
from peakpoint.state.samples import SMALL, Samples, can_sample
from peakpoint.state.typed_json import Encoder

_MOST = 64  # tensors of a module that are looked at: who writes to weights writes to many
_GENERATORS = {"python": "Python's", "numpy": "NumPy's", "torch": "torch's", "cuda": "CUDA's", "mps": "MPS's"}


@dataclass(frozen=True, slots=True)
class Look:
    """What the state is at one moment, as far as a later look is to be compared with it.

    Attributes:
        steps: of each optimizer, by part.
        small: what is neither weights nor moments nor the place of a loader: by part, comparable.
        weights: samples of each module.
        generators: the states of random generators, by name.
    """

    steps: Mapping[str, int]
    small: Mapping[str, object]
    weights: Mapping[str, object]
    generators: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Moves:
    """What differs between two looks: names of parts, and of generators."""

    stepped: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    generators: tuple[str, ...] = ()

    @property
    def wrong(self) -> tuple[str, ...]:
        """What makes a checkpoint of the first look wrong: a training that continues from it would differ."""
        return self.stepped or self.small

    def __bool__(self) -> bool:
        return any(self._fields())

    def __add__(self, other: "Moves") -> "Moves":
        pairs = zip(self._fields(), other._fields(), strict=True)
        return Moves(*(tuple(dict.fromkeys((*mine, *theirs))) for mine, theirs in pairs))

    def __sub__(self, other: "Moves") -> "Moves":
        pairs = zip(self._fields(), other._fields(), strict=True)
        return Moves(*(tuple(name for name in mine if name not in theirs) for mine, theirs in pairs))

    def _fields(self) -> tuple[tuple[str, ...], ...]:
        return self.stepped, self.small, self.weights, self.generators


@torch.no_grad()
def look(state: Mapping[str, Any], steps: Mapping[int, int]) -> Look:
    """Look at a state.

    Args:
        state: part name to live object or plain value.
        steps: how often each optimizer has stepped, by identity.
    """
    optimizers = {name: value for name, value in state.items() if isinstance(value, torch.optim.Optimizer)}
    modules = {name: value for name, value in state.items() if isinstance(value, torch.nn.Module)}
    rest = {name: value for name, value in state.items() if name not in optimizers and name not in modules}
    generators = {f'state["{name}"]': _comparable(name, value) for name, value in rest.items() if is_generator(value)}
    rest = {name: value for name, value in rest.items() if not is_generator(value) and not _is_loader(value)}
    return Look(
        {name: steps.get(id(value), 0) for name, value in optimizers.items()},
        {
            **{name: _comparable(name, _settings(value)) for name, value in optimizers.items()},
            **{name: _comparable(name, value) for name, value in rest.items()},
        },
        {name: _sampled(_some(value)) for name, value in modules.items()},
        generators | _global_generators(),
    )


def moves(before: Look, now: Look) -> Moves:
    """What differs between two looks at the same state."""
    pairs = (
        (before.steps, now.steps),
        (before.small, now.small),
        ({} if before.steps != now.steps else before.weights, now.weights),  # optimizers move them rightly
        (before.generators, now.generators),
    )
    return Moves(
        *(tuple(name for name in then if name in later and later[name] != then[name]) for then, later in pairs)
    )


def _is_loader(value: Any) -> bool:
    """Whether it has a place of its own, which may run ahead of the loop."""
    return isinstance(value, Stateful) and isinstance(value, Iterable)


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def _global_generators() -> dict[str, object]:
    if torch.cuda.is_available() and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}  # asking would make a context on every GPU
    return {_GENERATORS[name]: state for name, state in rng.take().items()}


def _comparable(name: str, value: Any) -> object:
    encoder = Encoder()
    tree = encoder.encode(state_of(value), f'state["{name}"]')
    return msgspec.json.encode(tree), _sampled(list(encoder.tensors.values()))


def _some(module: torch.nn.Module) -> list[torch.Tensor]:
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[:: len(tensors) // _MOST + 1]


def _sampled(tensors: Sequence[torch.Tensor]) -> object:
    """Elements of each tensor, of small ones all."""
    plain = [
        tensor if can_sample(tensor) else tensor.resolve_conj().resolve_neg().contiguous()
        for tensor in tensors
        if type(tensor) in (torch.Tensor, torch.nn.Parameter)  # and no subclass that has no memory of its own
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and tensor.numel()
    ]
    return [taken.cpu().numpy().tobytes() for taken in Samples(plain, SMALL).take(plain)]
