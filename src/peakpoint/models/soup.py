"""Soups: the mean of the weights of several checkpoints, saved as a checkpoint of its own.

Source: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time", ICML 2022.

``average.check_alike`` compares the trees and records of the members. ``Averaging.mean`` makes one tensor at a time,
for the model that is tried, and again for the file, whose blocks are made while they are written. The tree is that of
the first member, so that what shares memory still does.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from peakpoint.errors import ConfigError
from peakpoint.format.manifest import Checkpoint, Manifest
from peakpoint.format.names import check_metric, check_run, check_text
from peakpoint.models.average import Averaging, Member, check_alike, find_all, held, member
from peakpoint.models.mean import Kitchen, Tasted, greedy, uniform
from peakpoint.repository.commit import StreamedImage
from peakpoint.repository.provenance import Clock, utc_now
from peakpoint.repository.root import Repository, open_repository
from peakpoint.rules import Mode, mode_of
from peakpoint.state.json_scalars import kind_of
from peakpoint.state.shared_storage import TORCH_DTYPES
from peakpoint.state.tensor_files import lay_out
from peakpoint.store import Store
from peakpoint.training.external import ExternalCheckpoint, add, check_run_for, streamed_image

Kind = Literal["uniform", "greedy"]
BatchNorm = Literal["estimate", "average"]

_NAMED = 5  # members that the reason names; the manifest names all


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
        evaluate: takes the model, in evaluation mode, or without ``build_model`` the state, and returns its score: a
            number, or metrics by name (also an ``Evaluated``), of which ``metric`` says which.
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
        kitchen = Kitchen(averaging, members[0], build_model, data, batchnorm, device)
        scored = None if evaluate is None else _scored(evaluate, metric)
        if kind == "greedy":
            assert scored is not None
            cooked = greedy(kitchen, members, scored, -1 if mode == "min" else 1)
        else:
            cooked = uniform(kitchen, members, scored)
        chosen, score = cooked.chosen, cooked.score
        made = ExternalCheckpoint(
            part=part,
            tree=members[0].tree,
            image=_image(averaging, part, chosen, cooked.measured),
            step=max(one.manifest.step for one in chosen),
            metrics={} if metric is None or score is None else {metric: score},
            reason=_reason(kind, chosen, members, kitchen.averages_statistics and len(chosen) > 1),
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


def _scored(evaluate: Callable[[Any], Any], metric: str | None) -> Callable[[Any], Any]:
    """The score in what an evaluation returns."""

    def score(given: Any) -> Any:
        answer = evaluate(given)
        metrics = getattr(answer, "metrics", answer)
        return metrics[metric] if isinstance(metrics, Mapping) and metric in metrics else answer

    return score


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
) -> StreamedImage:
    stored = {
        name: torch.empty(record.shape, dtype=TORCH_DTYPES[record.dtype], device="meta")
        for name, (_, record) in chosen[0].records.items()
    }

    def make(name: str) -> torch.Tensor:
        return measured[name] if name in measured else averaging.mean(name, chosen)

    return streamed_image(lay_out(f"{part}.safetensors", stored), make)
