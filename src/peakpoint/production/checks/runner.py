"""The checks of a validation, one after the other: whatever one of them raises fails it, and stops nothing."""

import platform
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import torch

from peakpoint.errors import Error
from peakpoint.format.metrics import metrics_to_json
from peakpoint.production.checks import budgets, metrics, model, weights
from peakpoint.production.checks.candidate import Candidate, Exam, Said, device_of, failed, skipped
from peakpoint.production.validation import order
from peakpoint.state.functions import MisnamedError
from peakpoint.state.json_scalars import kind_of

Event = dict[str, Any]
_SAID = 1000  # characters of a sentence
_EVIDENCE = 100_000  # bytes of a check's evidence
_OURS = "peakpoint."
_TRACE = 2000  # characters of a traceback


def examine(exam: Exam) -> Iterator[Event]:
    """Make all checks, in their order.

    Yields:
        ``environment``; for each check ``begin``, what it found out beside, and ``finding``; ``done``. See
        ``validation.Collected.take``.
    """
    yield {"environment": _environment()}
    told: Event = {}
    reached = True
    for name, check in zip(order(exam.wanted), _checks(exam), strict=True):
        yield {"begin": name}
        begin = time.perf_counter()
        found = _tried(exam, check) if reached else skipped("not reached: the bytes are not those that were saved")
        seconds = time.perf_counter() - begin
        yield from _news(exam, told)
        yield {"finding": _finding(name, found, seconds)}
        reached = reached and not (name == "integrity" and found.outcome == "failed")
    yield {"done": True}


def _checks(exam: Exam) -> list[Callable[[Exam], Said]]:
    always = [weights.integrity, weights.finite, weights.sparsity, model.loads, model.signature]
    always += [metrics.metrics, model.golden]
    limits = [budgets.budget(name) for name in exam.wanted.budgets] or [budgets.no_budgets]
    return [*always, *limits, *(_further(number) for number in range(len(exam.wanted.checks)))]


def _tried(exam: Exam, check: Callable[[Exam], Said]) -> Said:
    """What a check came to, in plain JSON."""
    try:
        found = check(exam)
        return found._replace(said=_text(found.said), evidence=_kept(found.evidence))
    except KeyboardInterrupt:
        raise  # somebody wants it all to end
    except MisnamedError as error:
        return failed(_text(str(error)), error=type(error).__name__, misnamed=True)
    except Error as error:
        return failed(_text(str(error)), error=type(error).__name__)
    except BaseException as error:  # noqa: BLE001 - code of the user may raise anything, and that is a finding
        text = traceback.format_exception_only(error)[-1].strip()  # also of one that cannot say what it is
        return failed(_text(f"raised {text}"), error=type(error).__name__, traceback=_text(_trace(error)[-_TRACE:]))


def _trace(error: BaseException) -> str:
    """The traceback from the first line on that is not ours."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None and str(at.tb_frame.f_globals.get("__name__")).startswith(_OURS):
        at = at.tb_next
    return "".join(traceback.format_exception(type(error), error, at))


def _news(exam: Exam, told: Event) -> Iterator[Event]:
    """What has been found out since the last time."""
    if exam.evaluated and "metrics" not in told:
        told["metrics"] = True
        yield {"metrics": metrics_to_json(exam.evaluated)}
    if exam.predictions is not None and "predictions" not in told:
        told["predictions"] = True
        kept = exam.predictions
        yield {"predicted": list(kept.predicted), "labels": list(kept.labels), "examples": kept.examples}
    if exam.model is not None and "device" not in told:
        told["device"] = device = device_of(exam.model)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        yield {"environment": {"device": name}}
    if exam.compared and "compared" not in told:
        told["compared"] = True
        yield {"compared": True}


def _further(number: int) -> Callable[[Exam], Said]:
    def check(exam: Exam) -> Said:
        function = exam.further[number]()
        candidate = Candidate(
            state=exam.state,
            model=exam.model,
            manifest=exam.manifest,
            recorded=exam.recorded,
            evaluated=exam.evaluated,
            repository=exam.repository,
        )
        found = function(candidate)
        if found is None or isinstance(found, Mapping):
            evidence = {} if found is None else {str(key): value for key, value in found.items()}
            texts = [f"{name} {value:.6g}" for name, value in evidence.items() if type(value) is float]
            texts += [f"{name} {value}"[:80] for name, value in evidence.items() if type(value) is int]
            return Said("passed", ", ".join(["it raised nothing", *texts[:5]]), evidence)
        return failed(f"returned a {kind_of(found)}; a check returns nothing or a mapping, and raises to fail")

    return check


# --- plain JSON ---------------------------------------------------------------------------------------------------


def _finding(name: str, found: Said, seconds: float) -> Event:
    said = found.said if len(found.said) <= _SAID else f"{found.said[:_SAID]} ..."
    return {
        "check": name,
        "outcome": found.outcome,
        "said": said,
        "evidence": dict(found.evidence),
        "seconds": round(seconds, 6),
    }


def _kept(evidence: Mapping[str, Any]) -> Mapping[str, Any]:
    plain: Mapping[str, Any] = _plain(evidence)
    if len(msgspec.json.encode(plain)) <= _EVIDENCE:
        return plain
    return {"left_out": f"evidence of more than {_EVIDENCE:,} bytes"}


def _text(value: str) -> str:
    return value.encode("utf-8", "backslashreplace").decode()


def _plain(value: Any, depth: int = 0) -> Any:
    """Anything as JSON: numbers, texts, lists and objects; NaN and infinities as texts, the rest as it prints."""
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, np.generic):
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
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
        "threads": str(torch.get_num_threads()),
    }
