"""Soups: the mean of the weights of several checkpoints, saved as a checkpoint of its own.

Source: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time", ICML 2022.

``average.check_alike`` compares the trees and records of the members. ``TensorMeans.mean`` makes one tensor at a time,
for the model that is tried, and again for the file, whose blocks are made while they are written. The tree is that of
the first member, so that what shares memory still does.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from peakpoint.errors import ConfigError
from peakpoint.format.manifest import Checkpoint
from peakpoint.format.names import check_metric, check_run, check_text, listing
from peakpoint.models.average import SoupMember, TensorMeans, check_alike, find_all, member
from peakpoint.models.mean import MeanModel, SoupChoice, SoupTrial, greedy, uniform
from peakpoint.repository.commit import BLOCK, FileImage
from peakpoint.repository.provenance import Clock, utc_now
from peakpoint.repository.reader import hold_all
from peakpoint.repository.root import open_repository
from peakpoint.rules import Mode, mode_of
from peakpoint.state.json_scalars import kind_of
from peakpoint.state.shared_storage import TORCH_DTYPES
from peakpoint.state.tensor_files import lay_out
from peakpoint.store import Store
from peakpoint.training.external import ExternalCheckpoint, add, check_run_for

Kind = Literal["uniform", "greedy"]
BatchNorm = Literal["estimate", "average"]

_REASON_MEMBERS = 5  # named in the reason; the manifest names all


@dataclass(frozen=True, slots=True, kw_only=True)
class Soup:
    """A soup that ``peakpoint.soup`` has made.

    Attributes:
        members: the averaged checkpoints, as refs.
        score: of ``evaluate``; None without one.
        trials: the candidates of a greedy soup, in the order in which they were tried, best first.
    """

    checkpoint: Checkpoint
    kind: Kind
    members: tuple[str, ...]
    score: float | None
    trials: tuple[SoupTrial, ...] = ()


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
        evaluate: takes the model, in evaluation mode, or without ``build_model`` the state, and returns its score: a
            number, or metrics by name (also an ``Evaluated``), of which ``metric`` says which.
        metric: the name of that score; the soup carries it as a metric.
        mode: which scores are better. A greedy soup needs it.
        build_model: makes a model of the right shape; its values do not matter.
        data: inputs for BatchNorm's statistics: batches, or tuples whose first element is the batch; a collection
            that can be gone through again, or a function that returns one.
        batchnorm: ``"estimate"`` measures the statistics anew; ``"average"`` averages them like weights, which is
            wrong in general, and is noted in the reason.
        device: where the model is put, and batches of ``data`` with it.
        part: the part to average; the soup has no other.
        run: the run that the soup goes to, the run of the first ref with ``-soup`` by default. It may hold soups only.
        why: the reason; it protects the soup from rules.
        progress: called with the bytes of each tensor that has been read.

    Raises:
        NotFoundError: no such run, checkpoint or part.
        MismatchError: members, or members and model, do not fit one another; lists names, shapes and dtypes.
        ConfigError: an argument is wrong; a value is not finite (names tensor and checkpoint); a score is not a number.
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
    with hold_all(repository.store, manifests):
        check_run_for(repository.store, target)
        members = [member(repository.store, manifest, part) for manifest in manifests]
        check_alike(members, part)
        means = TensorMeans(repository.store, members, progress)
        mean = MeanModel(means, members[0], build_model, data, batchnorm, device)
        scored = None if evaluate is None else _scored(evaluate, metric)
        if kind == "greedy" and scored is not None:
            choice = greedy(mean, members, scored, -1 if mode == "min" else 1)
        else:
            choice = uniform(mean, members, scored)
        averaged = mean.averages_statistics and len(choice.members) > 1
        checkpoint = ExternalCheckpoint(
            part=part,
            tree=members[0].tree,
            image=_image(means, part, choice),
            step=max(soup_member.manifest.step for soup_member in choice.members),
            metrics={} if metric is None or choice.score is None else {metric: choice.score},
            reason=_reason(kind, choice.members, len(members)) + (_AVERAGED if averaged else ""),
            asked=why,
            members=tuple(soup_member.ref for soup_member in choice.members),
        )
        manifest = add(repository.store, target, checkpoint, clock)
    return Soup(
        checkpoint=repository.run(manifest.run).find(f"{manifest.run}/{manifest.id}"),
        kind=kind,
        members=tuple(map(str, choice.members)),
        score=choice.score,
        trials=choice.trials,
    )


def _scored(evaluate: Callable[[Any], Any], metric: str | None) -> Callable[[Any], Any]:
    """Return a function that takes the score out of what ``evaluate`` returns."""

    def score(model: Any) -> Any:
        answer = evaluate(model)
        metrics = getattr(answer, "metrics", answer)
        if not isinstance(metrics, Mapping):
            return answer
        if metric not in metrics:
            names = listing(list(map(str, metrics))) or "nothing"
            raise ConfigError(
                f"the function that scores returned {names}: name the one that is the score (metric=, at the command "
                "line --metric NAME:max or NAME:min)"
            )
        return metrics[metric]

    return score


def _check(
    kind: str, batchnorm: str, evaluate: Any, metric: str | None, mode: str | None, build_model: Any, data: Any
) -> None:
    for name, value, choices in (("kind", kind, get_args(Kind)), ("batchnorm", batchnorm, get_args(BatchNorm))):
        if value not in choices:
            raise ConfigError(f"{name}={value!r}: give {' or '.join(map(repr, choices))}")
    for name, value in (("evaluate", evaluate), ("build_model", build_model)):
        if value is not None and not callable(value):
            raise ConfigError(f"{name}= takes a function, not a {kind_of(value)}")
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
            'a greedy soup needs mode="max" or "min" (--metric NAME:max at the command line): '
            "this cannot be guessed from the name"
        )
    if mode is not None:
        mode_of(mode)
    if metric is not None:
        check_metric(metric)
        if evaluate is None:
            raise ConfigError(f"metric={metric!r} names the score of evaluate=, which is missing")


_AVERAGED = "; the statistics of BatchNorm are averaged, not measured"


def _reason(kind: str, members: Sequence[SoupMember], candidates: int) -> str:
    count = f"{len(members)} of {candidates}" if kind == "greedy" else str(len(members))
    more = f" and {len(members) - _REASON_MEMBERS} more" if len(members) > _REASON_MEMBERS else ""
    return f"{kind} soup of {count}: {', '.join(map(str, members[:_REASON_MEMBERS]))}{more}"


def _image(means: TensorMeans, part: str, choice: SoupChoice) -> FileImage:
    """Return the file of the mean; its tensors are made when they are written, one after the other."""
    stored = {
        name: torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype], device="meta")
        for name, tensor in choice.members[0].tensors.items()
    }
    layout = lay_out(f"{part}.safetensors", stored)

    def blocks() -> Iterator[memoryview]:
        yield memoryview(layout.header)
        for span in layout.spans:
            if span.end > span.begin:
                measured = choice.measured.get(span.name)
                tensor = means.mean(span.name, choice.members) if measured is None else measured
                data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type] # is a buffer
                for begin in range(0, len(data), BLOCK):
                    yield data[begin : begin + BLOCK]

    # transient, so that no more than one tensor waits to be hashed
    return FileImage(layout.name, layout.size, blocks, len(layout.header), layout.spans, transient=True)
