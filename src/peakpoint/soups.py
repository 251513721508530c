"""Soups: the mean of the weights of several checkpoints, saved as a checkpoint of its own.

Source: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time", ICML 2022.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from peakpoint.adding import Made, MadeImage, add, check_run_for
from peakpoint.averaging import (
    COUNTER,
    STATISTICS,
    Averaging,
    Member,
    blanks,
    check_alike,
    find_all,
    held,
    member,
    without_tensors,
)
from peakpoint.checkpoint import Checkpoint
from peakpoint.clock import Clock, utc_now
from peakpoint.errors import ConfigError, MismatchError
from peakpoint.manifest import Manifest
from peakpoint.names import check_metric, check_run, check_text
from peakpoint.report import read_metrics
from peakpoint.repository import Repository, open_repository
from peakpoint.restore import module_differences
from peakpoint.rules import Mode, mode_of
from peakpoint.sharing import TORCH_DTYPES
from peakpoint.store import Store
from peakpoint.stored import tensor_nodes
from peakpoint.tensors import lay_out
from peakpoint.tree import Decoder, kind_of

Kind = Literal["uniform", "greedy"]
BatchNorm = Literal["estimate", "average"]

_NAMED = 5  # members that the reason names; the manifest names all


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Soup:
    """What ``peakpoint.soup`` has made.

    Attributes:
        checkpoint: the soup.
        kind: ``"uniform"`` or ``"greedy"``.
        members: what it is the mean of, as refs.
        score: of ``evaluate``; None without one.
        tasted: of a greedy soup, every candidate in the order in which they were tried, best first.
    """

    checkpoint: Checkpoint
    kind: Kind
    members: tuple[str, ...]
    score: float | None
    tasted: tuple[Tasted, ...] = ()


def soup(
    refs: Sequence[str],
    *,
    root: str | os.PathLike[str] | Store,
    kind: Kind = "uniform",
    evaluate: Callable[[Any], Any] | None = None,
    metric: str | None = None,
    mode: Mode | None = None,
    build_model: Callable[[], torch.nn.Module] | None = None,
    data: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    batchnorm: BatchNorm = "estimate",
    device: torch.device | str | None = None,
    part: str = "model",
    run: str | None = None,
    why: str = "a soup was asked for",
    progress: Callable[[int], None] = lambda _: None,
    clock: Clock = utc_now,
) -> Soup:
    """Average the weights of checkpoints, and save the mean as a checkpoint of a run of its own.

    ``"uniform"`` is the mean of all. ``"greedy"`` (Recipe 1 of the source) tries them in the order of their own scores,
    best first, and takes each that does not make the score of the mean worse; so on the data of ``evaluate`` the soup
    is at least as good as its best member, provided that ``evaluate`` gives the same for the same weights.

    Sums are in double precision, and rounded once to the stored type. Integers and booleans are not averaged and must
    be the same. Tied weights stay tied. Running statistics of BatchNorm belong to the weights that they were measured
    with; they are measured anew, by one pass over ``data`` in training mode, unless a soup has one member only.

    Memory, whatever the number of members: less than four copies of the largest tensor in double precision; with
    ``build_model`` that model besides, with ``evaluate`` alone one state. Every tensor is read once to be checked,
    before anything is written, and once to be written; a greedy soup of n candidates reads up to n(n + 3)/2
    checkpoints before that.

    Args:
        refs: at least two; for a greedy soup, the candidates.
        root: the repository; the soup goes there, too.
        kind: ``"uniform"`` or ``"greedy"``.
        evaluate: takes the model, in evaluation mode, or without ``build_model`` the state, and returns its score.
        metric: the name of that score; the soup carries it as a metric.
        mode: ``"max"`` or ``"min"``: which scores are better. A greedy soup needs it.
        build_model: makes a model of the right shape; its values do not matter.
        data: inputs for BatchNorm's statistics: batches, or tuples whose first element is the batch; a collection
            that can be gone through again, or a function that returns one.
        batchnorm: ``"estimate"`` measures the statistics anew; ``"average"`` averages them like weights, which is
            wrong in general, and is noted in the reason.
        device: where the model is put, and batches of ``data`` with it.
        part: the part to be averaged; the soup has no other.
        run: the run that the soup goes to, the run of the first ref with ``-soup`` by default. It may hold soups only.
        why: why it was made; this protects it from rules.
        progress: called with the bytes of each tensor that has been read.
        clock: tells the time.

    Raises:
        NotFoundError: no such run, checkpoint or part.
        MismatchError: members, or members and model, do not fit one another; lists names, shapes and dtypes.
        ConfigError: arguments that cannot be; a value that is not finite, with tensor and checkpoint; a score that is
            no number.
        ConflictError: the run holds other checkpoints than soups.
        CorruptError: a checkpoint is damaged; the message names the tensor.
        StoreError: the repository cannot be written.

    Example:
        >>> import tempfile, torch, peakpoint as pp
        >>> root, weight = tempfile.mkdtemp(), torch.tensor([3.0, 4.0])
        >>> with pp.Checkpointer(root, run="r", state={"model": {"w": weight}}, keep=[pp.Last(2)]) as ckpt:
        ...     for epoch in ckpt.epochs(2):
        ...         _ = weight.add_(1)
        ...         _ = ckpt.report()
        >>> made = pp.soup(["r:epoch=0", "r:epoch=1"], root=root)
        >>> made.checkpoint.run, pp.load(made.checkpoint.ref, root=root)["model"]["w"]
        ('r-soup', tensor([4.5000, 5.5000]))
    """
    _check(kind, batchnorm, evaluate, metric, mode, build_model, data)
    check_text("why", why)
    repository = open_repository(root)
    manifests = find_all(repository, refs, 2)
    target = check_run(run or f"{manifests[0].run}-soup")
    with held(repository.store, manifests):
        check_run_for(repository.store, target)
        members = [member(repository.store, one, part) for one in manifests]
        check_alike(members, part)
        averaging = Averaging(repository.store, members, progress)
        kitchen = _Kitchen(averaging, members[0], build_model, data, batchnorm, device)
        if kind == "greedy":
            assert evaluate is not None
            cooked = _greedy(kitchen, members, evaluate, -1 if mode == "min" else 1)
        else:
            cooked = _uniform(kitchen, members, evaluate)
        chosen, score = cooked.chosen, cooked.score
        made = Made(
            part=part,
            tree=members[0].tree,
            image=_image(averaging, part, chosen, cooked.measured),
            step=max(one.manifest.step for one in chosen),
            metrics={} if metric is None or score is None else {metric: score},
            reason=_reason(kind, chosen, members, kitchen.averages_statistics),
            asked=why,
            members=tuple(one.ref for one in chosen),
        )
        manifest = add(repository.store, target, made, clock)
    return Soup(
        checkpoint=_found(repository, manifest),
        kind=kind,
        members=tuple(map(str, chosen)),
        score=score,
        tasted=cooked.tasted,
    )


def _found(repository: Repository, manifest: Manifest) -> Checkpoint:
    return repository.run(manifest.run).find(f"{manifest.run}/{manifest.id}")


def _check(
    kind: str, batchnorm: str, evaluate: Any, metric: str | None, mode: str | None, build_model: Any, data: Any
) -> None:
    for name, given, known in (("kind", kind, get_args(Kind)), ("batchnorm", batchnorm, get_args(BatchNorm))):
        if given not in known:
            raise ConfigError(f"{name}={given!r}: give {' or '.join(map(repr, known))}")
    for name, given in (("evaluate", evaluate), ("build_model", build_model)):
        if given is not None and not callable(given):
            raise ConfigError(f"{name}= takes a function, not a {kind_of(given)}")
    _check_score(kind, evaluate, metric, mode)
    if data is not None and build_model is None:
        raise ConfigError("data= is for BatchNorm's statistics, and these need build_model=")
    if isinstance(data, Iterator):
        raise ConfigError(
            "data= can be gone through only once; give a list, a DataLoader, or a function that makes one"
        )


def _check_score(kind: str, evaluate: Any, metric: str | None, mode: str | None) -> None:
    if kind == "greedy" and evaluate is None:
        raise ConfigError("a greedy soup needs evaluate=, a function that scores a model (--with at the command line)")
    if kind == "greedy" and mode is None:
        raise ConfigError(
            'a greedy soup needs mode="max" or "min" (--metric NAME:max at the command line): which scores are better '
            "is never guessed"
        )
    if mode is not None:
        mode_of(mode)
    if metric is not None:
        check_metric(metric)
        if evaluate is None:
            raise ConfigError(f"metric={metric!r} names the score of evaluate=, and there is none")


def _reason(kind: str, chosen: Sequence[Member], members: Sequence[Member], averaged: bool) -> str:  # noqa: FBT001
    count = f"{len(chosen)} of {len(members)}" if kind == "greedy" else str(len(chosen))
    more = f" and {len(chosen) - _NAMED} more" if len(chosen) > _NAMED else ""
    told = f"{kind} soup of {count}: {', '.join(map(str, chosen[:_NAMED]))}{more}"
    return told + ("; the statistics of BatchNorm are averaged, not measured" if averaged else "")


def _image(
    averaging: Averaging, part: str, chosen: Sequence[Member], measured: Mapping[str, torch.Tensor]
) -> MadeImage:
    stored = {
        name: torch.empty(record.shape, dtype=TORCH_DTYPES[record.dtype], device="meta")
        for name, (_, record) in chosen[0].records.items()
    }

    def make(name: str) -> torch.Tensor:
        return measured[name] if name in measured else averaging.mean(name, chosen)

    return MadeImage(lay_out(f"{part}.safetensors", stored), make)


# --- making and tasting -------------------------------------------------------------------------------------------


class _Kitchen:
    """Means that can be tried; see ``soup`` for the arguments.

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
    model: object = build_model()
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"build_model() makes a {kind_of(model)}, and no torch.nn.Module")
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
class _Cooked:
    """Which members, what their mean scores, the statistics that were measured with it, and how it was found."""

    chosen: Sequence[Member]
    score: float | None = None
    measured: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tasted: tuple[Tasted, ...] = ()


def _uniform(kitchen: _Kitchen, members: Sequence[Member], evaluate: Callable[[Any], Any] | None) -> _Cooked:
    if evaluate is not None:
        score = kitchen.score(evaluate, members)
        return _Cooked(chosen=members, score=score, measured=kitchen.measured)
    if kitchen.estimates:
        kitchen.make(members)
    else:
        kitchen.check(members)
    return _Cooked(chosen=members, measured=kitchen.measured)


def _greedy(kitchen: _Kitchen, members: Sequence[Member], evaluate: Callable[[Any], Any], sign: int) -> _Cooked:
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
    return _Cooked(chosen=chosen, score=score, measured=measured, tasted=tuple(tasted))
