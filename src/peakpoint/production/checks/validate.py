"""Validate in this process, with functions that are at hand."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from peakpoint.errors import ConfigError
from peakpoint.production.checks.candidate import Candidate, Function
from peakpoint.production.checks.runner import run_checks
from peakpoint.production.validation import FindingCollector, conclude, validation_request
from peakpoint.repository.root import Repository
from peakpoint.repository.validations import Progress, Validation, ValidationSpec
from peakpoint.state.json_scalars import kind_of
from peakpoint.state.saved import Loaded
from peakpoint.store import Store, open_store


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
        >>> validation = pp.validate("r@latest", root=root, evaluate=lambda state: {"loss": 0.7})
        >>> validation.passed, validation.failures[0].said
        (False, 'loss is 0.7 now and was recorded as 0.5: 0.2 apart')
    """
    for name, values in (("metrics", metrics), ("checks", checks)):
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise ConfigError(f"{name}={values!r:.80}: give a list")
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
    with validation_request(Repository(open_store(root)), ref, wanted, against) as request:
        collector = FindingCollector(request, progress)
        candidate = Candidate(**vars(request), evaluate=evaluate, build_model=model, checks=checks)
        for event in run_checks(candidate):
            collector.take(event)
        return conclude(collector)


def _name(function: Function | None) -> str | None:
    if function is None or isinstance(function, str):
        return function
    if not callable(function):
        raise ConfigError(f"{function!r:.80} is a {kind_of(function)}; give a function, or module:function")
    owner = function if hasattr(function, "__qualname__") else type(function)
    return f"{owner.__module__}:{owner.__qualname__}"
