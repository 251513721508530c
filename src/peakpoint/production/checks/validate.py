"""Validating in this process, with functions that are at hand."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from peakpoint.errors import ConfigError
from peakpoint.production.checks.candidate import Candidate, Exam
from peakpoint.production.checks.runner import examine
from peakpoint.production.validation import Collected, ask, conclude
from peakpoint.repository.root import Repository
from peakpoint.repository.validations import Progress, Validation, ValidationSpec
from peakpoint.state.functions import load_function
from peakpoint.state.json_scalars import kind_of
from peakpoint.state.saved import Loaded
from peakpoint.store import Store, open_store

Function = Callable[..., Any] | str


def validate(
    ref: str,
    *,
    root: str | os.PathLike[str] | Store,
    evaluate: Callable[[Loaded], Any] | str | None = None,
    model: Callable[[], Any] | str | None = None,
    part: str = "model",
    metrics: Sequence[str] = (),
    tolerance: float = 1e-3,
    golden: str | os.PathLike[str] | None = None,
    agreement: float = 0.0,
    budgets: Mapping[str, float] | None = None,
    checks: Sequence[Callable[[Candidate], Any] | str] = (),
    signature: Mapping[str, str] | None = None,
    sparsity: str = "sparsity",
    against: str = "champion",
    progress: Progress = lambda _: None,
) -> Validation:
    """Validate a checkpoint in this process, and record what was found.

    The checks are those of ``peakpoint validate``, which runs them in a process apart. Here an exception is a failed
    check as well, but what ends a process ends this one, and then nothing is recorded.

    Args:
        ref: which checkpoint.
        root: the repository.
        evaluate: gets what ``peakpoint.load`` returns, and gives metrics by name, or an ``Evaluated``.
        model: makes the model; may return the model and an example of its inputs.
        part: the part of the checkpoint that is the model.
        metrics: which metrics must be confirmed; by default all that are both recorded and evaluated.
        tolerance: how far an evaluated metric may be from the recorded one, in its unit.
        golden: a safetensors file with ``inputs`` [n, ...], and maybe ``labels`` [n].
        agreement: the share of golden predictions that must be the champion's, 0 to 1.
        budgets: upper limits of ``latency_ms``, ``memory_mb``, ``size_mb`` and ``parameters``.
        checks: further functions of one ``Candidate``: what they raise fails them.
        signature: element types and shapes that outputs must have, such as ``{"output": "F32[*, 10]"}``.
        sparsity: the metric that holds the sparsity.
        against: the alias whose holder is the champion.
        progress: called with the name of each check before it begins.

    Returns:
        The record; ``passed`` says whether the checkpoint passed, ``failures`` why not.

    Raises:
        NotFoundError: no such checkpoint, part or file.
        ConfigError: what is asked cannot be.
        StoreError: the record cannot be written.

    Example:
        >>> import tempfile, torch, peakpoint as pp
        >>> root = tempfile.mkdtemp()
        >>> with pp.Checkpointer(root, run="r", state={"model": torch.nn.Linear(2, 1)}, keep=[pp.Last(1)]) as ckpt:
        ...     _ = ckpt.report(step=1, loss=0.5)
        >>> found = pp.validate("r@latest", root=root, evaluate=lambda state: {"loss": 0.7})
        >>> found.passed, found.failures[0].said
        (False, 'loss is 0.7 now and was recorded as 0.5: 0.2 apart')
    """
    for name, given in (("metrics", metrics), ("checks", checks)):
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise ConfigError(f"{name}={given!r:.80} is one thing: give a list of them")
    wanted = ValidationSpec(
        evaluate=_name(evaluate),
        model=_name(model),
        part=part,
        metrics=tuple(metrics),
        tolerance=tolerance,
        golden=None if golden is None else os.fspath(golden),
        agreement=agreement,
        budgets=dict(budgets or {}),
        checks=tuple(str(_name(check)) for check in checks),
        signature=dict(signature or {}),
        sparsity=sparsity,
    )
    asked = ask(Repository(open_store(root)), ref, wanted, against)
    try:
        collected = Collected(asked, progress)
        exam = Exam(
            repository=asked.repository,
            manifest=asked.manifest,
            wanted=asked.wanted,
            alias=asked.alias,
            champion=asked.champion,
            without=asked.without,
            evaluate=None if evaluate is None else _finder(evaluate),
            make=None if model is None else _finder(model),
            further=[_finder(check) for check in checks],
        )
        for event in examine(exam):
            collected.take(event)
        return conclude(collected)
    finally:
        asked.release()


def _name(function: Function | None) -> str | None:
    if function is None or isinstance(function, str):
        return function
    if not callable(function):
        raise ConfigError(f"{function!r:.80} is a {kind_of(function)}; give a function, or module:function")
    of = function if hasattr(function, "__qualname__") else type(function)
    return f"{of.__module__}:{of.__qualname__}"


def _finder(function: Function) -> Callable[[], Callable[..., Any]]:
    return (lambda: load_function(function)) if isinstance(function, str) else (lambda: function)
