"""Means of checkpoints as models that can be evaluated, and the choice of members for a soup."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from peakpoint.errors import ConfigError, MismatchError
from peakpoint.format.metrics import read_metrics
from peakpoint.models.average import COUNTER, STATISTICS, SoupMember, TensorMeans, empty_tensors, without_tensors
from peakpoint.state.json_scalars import kind_of
from peakpoint.state.modules import module_differences
from peakpoint.state.restore import make_model
from peakpoint.state.saved import tensor_nodes
from peakpoint.state.shared_storage import TORCH_DTYPES
from peakpoint.state.step_guard import wait_for_copies
from peakpoint.state.typed_json import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class SoupTrial:
    """One checkpoint that a greedy soup has tried.

    Attributes:
        alone: its own score.
        together: the score of the soup with it; for the first, its own.
        taken: whether it is in the soup.
    """

    ref: str
    alone: float
    together: float
    taken: bool


class MeanModel:
    """A mean that can be evaluated; see ``peakpoint.soup`` for the arguments.

    Attributes:
        estimates: whether statistics of BatchNorm are measured anew.
        averages_statistics: whether statistics of BatchNorm are averaged.
        measured: the statistics measured with the last mean, by stored name.
    """

    def __init__(
        self,
        means: TensorMeans,
        first: SoupMember,
        build_model: Callable[[], Any] | None,
        data: Iterable[Any] | Callable[[], Iterable[Any]] | None,
        batchnorm: str,
        device: torch.device | str | None,
    ) -> None:
        self._means, self._first, self._data = means, first, data
        self._nodes: dict[str, list[tuple[str, Any]]] = {name: [] for name in first.tensors}
        for path, node in tensor_nodes(first.tree):
            self._nodes[node["name"]].append((path, node))
        paths = [path for path, _ in tensor_nodes(first.tree)]
        self._statistics = [path for path in paths if path.rpartition(".")[2] in STATISTICS]
        self.averages_statistics = bool(self._statistics) and batchnorm == "average"
        self.estimates = bool(self._statistics) and batchnorm == "estimate"
        if self.estimates and (build_model is None or data is None):
            raise ConfigError(
                f"{first} has statistics of BatchNorm, such as {self._statistics[0]!r}, which do not fit averaged "
                "weights: give build_model= and data= to measure them anew (--model and --data at the command line), "
                'or batchnorm="average" to average them all the same'
            )
        self._model = None if build_model is None else model_of(build_model, device)
        self._device = None if device is None or self._model is None else torch.device(device)
        self._plain = {} if self._model is None else self._check_model(self._model)
        self.measured: dict[str, torch.Tensor] = {}

    def _check_model(self, model: torch.nn.Module) -> dict[str, Any]:
        """Refuse members that do not fit the model; returns their plain values."""
        plain = Decoder({}).decode(without_tensors(self._first.tree))
        if not isinstance(plain, Mapping):
            raise MismatchError(f"{self._first}: the part is a {kind_of(plain)}, not the state of a model")
        tensors = empty_tensors(self._first)
        saved = {name: tensors.get(str(name), value) for name, value in plain.items()}
        lines = tuple(module_differences(str(self._first), model.state_dict(), saved))
        if lines:
            raise MismatchError("the model of build_model() does not fit:\n  " + "\n  ".join(lines[:30]), lines)
        of_torch = {
            f"{prefix}.{name}".removeprefix(".")
            for prefix, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, _BatchNorm)
            for name in STATISTICS
        }
        foreign = [path for path in self._statistics if path not in of_torch]
        if self.estimates and foreign:
            raise ConfigError(
                f"{foreign[0]!r} is not a statistic of torch's BatchNorm, so it cannot be measured anew; "
                'batchnorm="average" averages it'
            )
        return {name: value for name, value in saved.items() if not isinstance(value, torch.Tensor)}

    def make(self, members: Sequence[SoupMember]) -> Any:
        """Return the mean: the model with its own statistics, or the state when there is no model."""
        if self._model is None:
            tensors = {name: self._means.mean(name, members) for name in self._first.tensors}
            return Decoder(tensors).decode(self._first.tree)
        live = self._model.state_dict()
        wait_for_copies()
        with torch.no_grad():
            for name, nodes in self._nodes.items():
                decoder = Decoder({name: self._means.mean(name, members)})
                for path, node in nodes:
                    live[path].copy_(decoder.decode(node))
            live |= self._plain
            self._model.load_state_dict(live)  # plain values, and tensors that were copies
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
                dtype = TORCH_DTYPES[self._first.tensors[name].dtype]
                self.measured[name] = live[path].detach().to("cpu", dtype, copy=True).contiguous()

    def check(self, members: Sequence[SoupMember]) -> None:
        """Refuse members without a mean; nothing of it stays in memory."""
        for name in self._first.tensors:
            self._means.mean(name, members)

    def score(self, evaluate: Callable[[Any], Any], members: Sequence[SoupMember]) -> float:
        """Return what ``evaluate`` returns for the mean.

        Raises:
            ConfigError: it is not a finite number.
        """
        score = read_metrics({"score": evaluate(self.make(members))})["score"]
        if not math.isfinite(score):
            raise ConfigError(f"evaluate gave {score} for {' with '.join(map(str, members))}; it must be a number")
        return score


def model_of(build_model: Callable[[], Any], device: torch.device | str | None) -> torch.nn.Module:
    """Call ``build_model``, and put the module on ``device``.

    Raises:
        ConfigError: it cannot be called, or returns no module; or torch cannot use the device.
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
class SoupChoice:
    """The members of a soup.

    Attributes:
        score: of their mean.
        measured: the statistics measured with it, by stored name.
        trials: the candidates of a greedy soup, in the order in which they were tried.
    """

    members: Sequence[SoupMember]
    score: float | None = None
    measured: Mapping[str, torch.Tensor] = field(default_factory=dict)
    trials: tuple[SoupTrial, ...] = ()


def uniform(mean: MeanModel, members: Sequence[SoupMember], evaluate: Callable[[Any], Any] | None) -> SoupChoice:
    """Choose all; each is read at least once, so that one without a mean is refused before anything is written."""
    if evaluate is not None:
        score = mean.score(evaluate, members)
        return SoupChoice(members=members, score=score, measured=mean.measured)
    if mean.estimates:
        mean.make(members)
    else:
        mean.check(members)
    return SoupChoice(members=members, measured=mean.measured)


def greedy(mean: MeanModel, candidates: Sequence[SoupMember], evaluate: Callable[[Any], Any], sign: int) -> SoupChoice:
    """Choose by Recipe 1 of the source: candidates by their own scores, each taken if the score does not fall."""
    alone = [mean.score(evaluate, [candidate]) for candidate in candidates]
    order = sorted(range(len(candidates)), key=lambda number: -sign * alone[number])  # stable: ties in their order
    best = order[0]
    members, score = [candidates[best]], alone[best]
    measured: Mapping[str, torch.Tensor] = {}
    trials = [SoupTrial(ref=str(candidates[best]), alone=score, together=score, taken=True)]
    for number in order[1:]:
        together = mean.score(evaluate, [*members, candidates[number]])
        better = sign * together >= sign * score
        if better:
            members, score, measured = [*members, candidates[number]], together, mean.measured
        trials.append(SoupTrial(ref=str(candidates[number]), alone=alone[number], together=together, taken=better))
    return SoupChoice(members=members, score=score, measured=measured, trials=tuple(trials))
