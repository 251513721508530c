"""State that changes after a report in the same iteration of a loop: no checkpoint of that report has the change."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from peakpoint.state import rng
from peakpoint.state.divided import has_divided, is_divided, own_boxes, own_shard
from peakpoint.state.origin import param_groups
from peakpoint.state.parts import Stateful, is_generator, state_of
from peakpoint.state.samples import SMALL, Samples, can_sample
from peakpoint.state.typed_json import Encoder

_SAMPLED_TENSORS = 64  # of a module: code that writes to weights writes to many of them
_GENERATOR_WORDS = {"python": "Python's", "numpy": "NumPy's", "torch": "torch's", "cuda": "CUDA's", "mps": "MPS's"}


@dataclass(frozen=True, slots=True)
class StateSample:
    """The state at one moment, as far as a later sample is compared with it.

    Attributes:
        steps: of each optimizer, by part.
        small: everything but weights, moments and the places of loaders: by part, comparable.
        weights: some elements of each module.
        generators: the states of random generators, by name.
    """

    steps: Mapping[str, int]
    small: Mapping[str, object]
    weights: Mapping[str, object]
    generators: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class StateChanges:
    """The differences of two samples: names of parts, and of generators."""

    stepped: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    generators: tuple[str, ...] = ()

    @property
    def wrong(self) -> tuple[str, ...]:
        """The parts that make a checkpoint of the first sample wrong: a training that continues from it differs."""
        return self.stepped or self.small

    def __bool__(self) -> bool:
        return any(self._fields())

    def __add__(self, right: "StateChanges") -> "StateChanges":
        pairs = zip(self._fields(), right._fields(), strict=True)
        return StateChanges(*(tuple(dict.fromkeys((*names, *added))) for names, added in pairs))

    def __sub__(self, right: "StateChanges") -> "StateChanges":
        pairs = zip(self._fields(), right._fields(), strict=True)
        return StateChanges(*(tuple(name for name in names if name not in removed) for names, removed in pairs))

    def _fields(self) -> tuple[tuple[str, ...], ...]:
        return self.stepped, self.small, self.weights, self.generators


@torch.no_grad()
def replicated_elements(state: Mapping[str, Any]) -> dict[str, object]:
    """Return some elements of what ranks that train one model have alike, by part: its parameters.

    Of a model that is divided among ranks these are the buffers; ``DistributedDataParallel`` sends those of rank 0.
    """
    modules = {name: value for name, value in state.items() if isinstance(value, torch.nn.Module)}
    tensors = {
        name: [*module.buffers()] if has_divided({name: module}) else [*module.parameters()]
        for name, module in modules.items()
    }
    return {name: _elements(_subset(replicated)) for name, replicated in tensors.items()}


@torch.no_grad()
def same_shards(state: Mapping[str, Any], size: int) -> dict[str, object]:
    """Return some elements of the shards of this rank that others may have, too, by tensor and place.

    These are the shards of tensors that are divided among some of the ranks only: what is in the same place of a tensor
    of the same name elsewhere is taken for the same.

    Args:
        size: the number of ranks.
    """
    elements: dict[str, object] = {}
    for part, module in state.items():
        if isinstance(module, torch.nn.Module):
            parameters = {
                name: parameter.detach()
                for name, parameter in module.named_parameters()
                if is_divided(parameter) and parameter.device_mesh.size() < size
            }
            for name, (offsets, _) in (own_boxes(parameters) if parameters else {}).items():
                elements[f"{part}.{name} at {list(offsets)}"] = _elements([own_shard(parameters[name])])
    return elements


@torch.no_grad()
def sample(state: Mapping[str, Any], steps: Mapping[int, int]) -> StateSample:
    """Take a sample of a state.

    Args:
        state: part name to live object or plain value.
        steps: how often each optimizer has stepped, by identity.
    """
    optimizers = {name: value for name, value in state.items() if isinstance(value, torch.optim.Optimizer)}
    modules = {name: value for name, value in state.items() if isinstance(value, torch.nn.Module)}
    plain = {name: value for name, value in state.items() if name not in optimizers and name not in modules}
    generators = {f'state["{name}"]': _comparable(name, value) for name, value in plain.items() if is_generator(value)}
    plain = {name: value for name, value in plain.items() if not is_generator(value) and not _is_loader(value)}
    return StateSample(
        {name: steps.get(id(value), 0) for name, value in optimizers.items()},
        {
            **{name: _comparable(name, _settings(value)) for name, value in optimizers.items()},
            **{name: _comparable(name, value) for name, value in plain.items()},
        },
        {name: _elements(_subset([*value.parameters(), *value.buffers()])) for name, value in modules.items()},
        generators | _global_generators(),
    )


def changes(first: StateSample, second: StateSample) -> StateChanges:
    """Compare two samples of the same state."""
    by_step = first.steps != second.steps  # optimizers change weights rightly
    pairs = (
        (first.steps, second.steps),
        (first.small, second.small),
        ({} if by_step else first.weights, second.weights),
        (first.generators, second.generators),
    )
    return StateChanges(*(tuple(name for name in old if name in new and new[name] != old[name]) for old, new in pairs))


def _is_loader(value: Any) -> bool:
    """Whether it has a place of its own, which may run ahead of the loop."""
    return isinstance(value, Stateful) and isinstance(value, Iterable)


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in param_groups(optimizer)]


def _global_generators() -> dict[str, object]:
    if torch.cuda.is_available() and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}  # reading them would make a context on every GPU
    return {_GENERATOR_WORDS[name]: state for name, state in rng.take().items()}


def _comparable(name: str, value: Any) -> object:
    encoder = Encoder()
    tree = encoder.encode(state_of(value), f'state["{name}"]')
    return msgspec.json.encode(tree), _elements(list(encoder.tensors.values()))


def _subset(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return tensors[:: len(tensors) // _SAMPLED_TENSORS + 1]


def _elements(tensors: Sequence[torch.Tensor]) -> object:
    """Return elements of each tensor, of small ones all."""
    plain = [
        tensor if can_sample(tensor) else tensor.resolve_conj().resolve_neg().contiguous()
        for tensor in tensors
        if type(tensor) in (torch.Tensor, torch.nn.Parameter)  # a subclass may have no memory of its own
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and tensor.numel()
    ]
    return [elements.cpu().numpy().tobytes() for elements in Samples(plain, SMALL).take(plain)]
