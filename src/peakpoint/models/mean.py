"""Means of checkpoints that can be tried: as models, with statistics that belong to them; and which of them to take."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from peakpoint.errors import ConfigError, MismatchError
from peakpoint.format.metrics import read_metrics
from peakpoint.models.average import COUNTER, STATISTICS, Averaging, Member, blanks, without_tensors
from peakpoint.state.json_scalars import kind_of
from peakpoint.state.restore import make_model, module_differences
from peakpoint.state.saved import tensor_nodes
from peakpoint.state.shared_storage import TORCH_DTYPES
from peakpoint.state.step_guard import wait_for_copies
from peakpoint.state.typed_json import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasted:
    """One checkpoint that a greedy soup has tried.

    Attributes:
        ref: which.
        alone: its own score.
        together: the score of the soup with it; of the first, its own.
        taken: whether it is in the soup.
    """

    ref: str
    alone: float
    together: float
    taken: bool


class Kitchen:
    """Means that can be tried; see ``peakpoint.soup`` for the arguments.

    Attributes:
        estimates: whether there are statistics of BatchNorm that are measured anew.
        averages_statistics: whether there are statistics of BatchNorm that are averaged.
        measured: statistics that were measured with the mean that was made last, by stored name.
    """

    def __init__(
        self,
        averaging: Averaging,
        like: Member,
        build_model: Callable[[], Any] | None,
        data: Iterable[Any] | Callable[[], Iterable[Any]] | None,
        batchnorm: str,
        device: torch.device | str | None,
    ) -> None:
        self._averaging, self._like, self._data = averaging, like, data
        self._nodes: dict[str, list[tuple[str, Any]]] = {name: [] for name in like.records}
        for path, node in tensor_nodes(like.tree):
            self._nodes[node["name"]].append((path, node))
        paths = [path for path, _ in tensor_nodes(like.tree)]
        self._statistics = [path for path in paths if path.rpartition(".")[2] in STATISTICS]
        self.averages_statistics = bool(self._statistics) and batchnorm == "average"
        self.estimates = bool(self._statistics) and batchnorm == "estimate"
        if self.estimates and (build_model is None or data is None):
            raise ConfigError(
                f"{like} has statistics of BatchNorm, such as {self._statistics[0]!r}, which do not fit averaged "
                "weights: give build_model= and data= to measure them anew (--model and --data at the command line), "
                'or batchnorm="average" to average them all the same'
            )
        self._model = None if build_model is None else model_of(build_model, device)
        self._device = None if device is None or self._model is None else torch.device(device)
        self._plain = {} if self._model is None else self._check_model(self._model)
        self.measured: dict[str, torch.Tensor] = {}

    def _check_model(self, model: torch.nn.Module) -> dict[str, Any]:
        """Whether the members fit the model; returns their values that are no tensors."""
        plain = Decoder({}).decode(without_tensors(self._like.tree))
        if not isinstance(plain, Mapping):
            raise MismatchError(f"{self._like}: what was saved is a {kind_of(plain)}, not the state of a model")
        tensors = blanks(self._like)
        saved = {name: tensors.get(str(name), value) for name, value in plain.items()}
        lines = tuple(module_differences(str(self._like), model.state_dict(), saved))
        if lines:
            raise MismatchError("the model of build_model() does not fit:\n  " + "\n  ".join(lines[:30]), lines)
        known = {
            f"{prefix}.{name}".removeprefix(".")
            for prefix, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, _BatchNorm)
            for name in STATISTICS
        }
        unknown = [path for path in self._statistics if path not in known]
        if self.estimates and unknown:
            raise ConfigError(
                f"{unknown[0]!r} is no statistic of a BatchNorm of torch's, so nothing here can measure it anew; "
                'batchnorm="average" averages it'
            )
        return {name: value for name, value in saved.items() if not isinstance(value, torch.Tensor)}

    def make(self, members: Sequence[Member]) -> Any:
        """The mean of these: the model with statistics that belong to it, or the state when there is no model."""
        if self._model is None:
            tensors = {name: self._averaging.mean(name, members) for name in self._like.records}
            return Decoder(tensors).decode(self._like.tree)
        live = self._model.state_dict()
        wait_for_copies()
        with torch.no_grad():
            for name, nodes in self._nodes.items():
                decoder = Decoder({name: self._averaging.mean(name, members)})
                for path, node in nodes:
                    live[path].copy_(decoder.decode(node))
            live |= self._plain
            self._model.load_state_dict(live)  # values that are no tensors, and tensors that were copies
        self.measured = {}
        if self.estimates and len(members) > 1:
            self._measure(self._model)
        return self._model.eval()

    def _measure(self, model: torch.nn.Module) -> None:
        data = self._data() if callable(self._data) else self._data
        assert data is not None
        count = 0

        def counted() -> Iterator[Any]:
            nonlocal count
            for batch in data:
                count += 1
                yield batch

        update_bn(counted(), model, self._device)
        if not count:
            raise ConfigError("data= is empty: BatchNorm's statistics need at least one batch")
        live = model.state_dict()
        for name, nodes in self._nodes.items():
            path = nodes[0][0] if nodes else ""
            if path.rpartition(".")[2] in (*STATISTICS, COUNTER):
                dtype = TORCH_DTYPES[self._like.records[name][1].dtype]
                self.measured[name] = live[path].detach().to("cpu", dtype, copy=True).contiguous()

    def check(self, members: Sequence[Member]) -> None:
        """Whether there is a mean of these; nothing of it stays in memory."""
        for name in self._like.records:
            self._averaging.mean(name, members)

    def score(self, evaluate: Callable[[Any], Any], members: Sequence[Member]) -> float:
        """What ``evaluate`` says of the mean of these.

        Raises:
            ConfigError: no finite number.
        """
        score = read_metrics({"score": evaluate(self.make(members))})["score"]
        if not math.isfinite(score):
            raise ConfigError(f"evaluate gave {score} for {' with '.join(map(str, members))}; it must be a number")
        return score


def model_of(build_model: Callable[[], Any], device: torch.device | str | None) -> torch.nn.Module:
    """What ``build_model`` makes, on ``device``.

    Raises:
        ConfigError: it cannot be called, or makes no module; or there is no such device.
    """
    if not callable(build_model):
        raise ConfigError(f"build_model= takes a function that makes a model, not a {kind_of(build_model)}")
    model, _ = make_model(build_model, "build_model()")
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"build_model() returned a {kind_of(model)}, not a torch.nn.Module")
    if device is None:
        return model
    try:
        return model.to(device)
    except (
        AssertionError,
        RuntimeError,
        TypeError,
    ) as error:  # builds of torch without a device assert that it is there
        raise ConfigError(f"device={str(device)!r}: torch cannot put the model there: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Cooked:
    """What came of trying.

    Attributes:
        chosen: the members of the soup.
        score: of their mean.
        measured: statistics that were measured with it, by stored name.
        tasted: how they were found.
    """

    chosen: Sequence[Member]
    score: float | None = None
    measured: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tasted: tuple[Tasted, ...] = ()


def uniform(kitchen: Kitchen, members: Sequence[Member], evaluate: Callable[[Any], Any] | None) -> Cooked:
    """All of them, read once at least, so that what has no mean is found before anything is written."""
    if evaluate is not None:
        score = kitchen.score(evaluate, members)
        return Cooked(chosen=members, score=score, measured=kitchen.measured)
    if kitchen.estimates:
        kitchen.make(members)
    else:
        kitchen.check(members)
    return Cooked(chosen=members, measured=kitchen.measured)


def greedy(kitchen: Kitchen, members: Sequence[Member], evaluate: Callable[[Any], Any], sign: int) -> Cooked:
    """Recipe 1 of the source: candidates in the order of their own scores, each taken if the score does not fall."""
    alone = [kitchen.score(evaluate, [one]) for one in members]
    order = sorted(range(len(members)), key=lambda number: -sign * alone[number])  # stable: ties as they were given
    best = order[0]
    chosen, score = [members[best]], alone[best]
    measured: Mapping[str, torch.Tensor] = {}
    tasted = [Tasted(ref=str(members[best]), alone=score, together=score, taken=True)]
    for number in order[1:]:
        together = kitchen.score(evaluate, [*chosen, members[number]])
        taken = sign * together >= sign * score
        if taken:
            chosen, score, measured = [*chosen, members[number]], together, kitchen.measured
        tasted.append(Tasted(ref=str(members[number]), alone=alone[number], together=together, taken=taken))
    return Cooked(chosen=chosen, score=score, measured=measured, tasted=tuple(tasted))
