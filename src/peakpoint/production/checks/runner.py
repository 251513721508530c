"""Run the checks of a validation one after the other: whatever a check raises fails it, and stops nothing.

In a process of its own ``main`` is called; see ``peakpoint.production.subprocess_runner``.
"""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import msgspec
import numpy as np
import torch

from peakpoint.errors import ConfigError, Error
from peakpoint.production.checks import budgets, metrics, model, weights
from peakpoint.production.checks.candidate import Candidate, Function, failed, function_of, passed, skipped
from peakpoint.production.subprocess_runner import Ends
from peakpoint.production.validation import check_names, decode_job
from peakpoint.repository.validations import Finding, Outcome
from peakpoint.state.json_scalars import kind_of

Check = Callable[[Candidate], Finding]
ValidationEvent = dict[str, Any]
_SAID = 1000  # characters of a sentence
_EVIDENCE = 100_000  # bytes of a check's evidence
_OURS = "peakpoint."
_TRACE = 2000  # characters of a traceback


def main(ends: list[Any]) -> None:
    """Run the checks of the job that is given, and send each event as a line of JSON."""
    pipes = Ends(ends)
    request = decode_job(pipes.job())
    wanted = request.wanted
    candidate = Candidate(**vars(request), evaluate=wanted.evaluate, build_model=wanted.model, checks=wanted.checks)
    for event in run_checks(candidate):
        pipes.send(msgspec.json.encode(event))


def run_checks(candidate: Candidate) -> Iterator[ValidationEvent]:
    """Run all checks, in their order.

    Yields:
        ``facts`` of the environment; for each check ``begin``, the ``facts`` that it has found out, and ``finding``;
        ``done``. Only ``refused`` when a function of the user cannot be called. See ``validation.FindingCollector``.
    """
    yield {"begin": "the import of functions"}
    try:
        candidate.check_functions()
    except ConfigError as error:
        yield {"refused": _text(str(error))}
        return
    yield {"facts": {"environment": _environment()}}
    intact = True
    for name, check in zip(check_names(candidate.wanted), _checks(candidate), strict=True):
        yield {"begin": name}
        began = time.perf_counter()
        finding = _run(check, candidate) if intact else skipped("not reached: the bytes are not those that were saved")
        seconds = round(time.perf_counter() - began, 6)
        summary = finding.said if len(finding.said) <= _SAID else f"{finding.said[:_SAID]} ..."
        finding = replace(finding, check=name, said=summary, seconds=seconds)
        facts, candidate.facts = candidate.facts, {}
        if facts:
            yield {"facts": facts}
        yield {"finding": finding}
        intact = intact and not (name == "integrity" and finding.outcome == "failed")
    yield {"done": True}


def _checks(candidate: Candidate) -> list[Check]:
    always = [weights.integrity, weights.finite, weights.sparsity, model.loads, model.signature]
    always += [metrics.metrics, model.golden]
    limits = [budgets.BUDGET_CHECKS[name] for name in candidate.wanted.budgets] or [budgets.no_budgets]
    return [*always, *limits, *(partial(_user_check, function) for function in candidate.checks)]


def _run(check: Check, candidate: Candidate) -> Finding:
    """Run one check; its finding in plain JSON."""
    try:
        finding = check(candidate)
        evidence = _plain(finding.evidence)
        if len(msgspec.json.encode(evidence)) > _EVIDENCE:
            evidence = {"left_out": f"evidence of more than {_EVIDENCE:,} bytes"}
        return replace(finding, said=_text(finding.said), evidence=evidence)
    except KeyboardInterrupt:
        raise  # somebody wants it all to end
    except Error as error:
        return failed(_text(str(error)), error=type(error).__name__)
    except BaseException as error:  # noqa: BLE001 - code of the user may raise anything, and that is a finding
        text = traceback.format_exception_only(error)[-1].strip()  # also of one that cannot say what it is
        trace = _text(_trace(error)[-_TRACE:])
        return failed(_text(f"raised {text}"), error=type(error).__name__, traceback=trace)


def _trace(error: BaseException) -> str:
    """The traceback from the first line on that is not ours."""
    frame = error.__traceback__
    while frame and frame.tb_next and str(frame.tb_frame.f_globals.get("__name__")).startswith(_OURS):
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(error), error, frame))


def _user_check(function: Function, candidate: Candidate) -> Finding:
    """Call a check of the user, which may return nothing, evidence or a finding."""
    result = function_of(function)(candidate)
    if isinstance(result, Finding) and result.outcome in get_args(Outcome):
        return result
    if result is None or isinstance(result, Mapping):
        evidence = {str(key): value for key, value in (result or {}).items()}
        texts = [f"{name} {value:.6g}" for name, value in evidence.items() if type(value) is float]
        texts += [f"{name} {value}"[:80] for name, value in evidence.items() if type(value) is int]
        return replace(passed(", ".join(["ok", *texts[:5]])), evidence=evidence)
    return failed(f"returned a {kind_of(result)}; a check returns nothing or a mapping, and raises to fail")


# --- plain JSON ---------------------------------------------------------------------------------------------------


def _text(value: str) -> str:
    return value.encode("utf-8", "backslashreplace").decode()


def _plain(value: Any, depth: int = 0) -> Any:
    """Anything as JSON: numbers, texts, lists and objects; NaN and infinities as texts, the rest as it prints."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -(1 << 63) <= value < 1 << 63 else str(value)
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else str(value)
    if isinstance(value, str):
        return _text(str(value))
    if depth < 8 and isinstance(value, Mapping):
        return {_text(str(key)): _plain(child, depth + 1) for key, child in value.items()}
    if depth < 8 and isinstance(value, list | tuple | set | frozenset):
        return [_plain(child, depth + 1) for child in value]
    if depth < 8 and isinstance(value, torch.Tensor | np.ndarray):
        return _plain(value.tolist(), depth + 1)
    return _text(repr(value)[:200])


def _environment() -> dict[str, str]:
    return {
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
        "threads": str(torch.get_num_threads()),
    }
