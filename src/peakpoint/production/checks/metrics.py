"""What an evaluation answers, and whether it confirms what was recorded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peakpoint.errors import ConfigError
from peakpoint.format.names import check_metric, listing
from peakpoint.format.sealed import digest
from peakpoint.production.checks.candidate import Exam, Said, failed, passed, skipped
from peakpoint.production.proposal import within
from peakpoint.repository.validations import Predictions
from peakpoint.state.json_scalars import kind_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """What an evaluation found, when it is more than metrics.

    Attributes:
        metrics: name to number.
        predictions: of each example the class, integers [n], or a score of each class, floats [n, classes]; a tensor,
            an array or a list.
        labels: the right classes, integers [n].
        examples: what tells the examples from others, such as their names or the tensor of their inputs; a digest of it
            is kept, so that predictions are only compared with those on the same examples.

    Example:
        >>> import peakpoint as pp
        >>> found = pp.Evaluated(metrics={"accuracy": 0.5}, predictions=[0, 1], labels=[0, 0])
        >>> found.metrics
        {'accuracy': 0.5}
    """

    metrics: Mapping[str, float]
    predictions: Any = None
    labels: Any = None
    examples: Any = None


def metrics(exam: Exam) -> Said:
    """The metrics that are recorded, evaluated again."""
    if exam.evaluate is None:
        return skipped("no function evaluates: give --with MODULE:FUNCTION")
    evaluate = exam.evaluate()
    answer = evaluate(exam.state)
    found = answer if isinstance(answer, Evaluated) else Evaluated(metrics=answer)
    exam.evaluated = _numbers(found.metrics)
    kept = _kept(found)
    if kept is not None:
        exam.predictions = kept
    rows, wrong, confirmed = _rows(exam)
    evidence = {"tolerance": exam.wanted.tolerance, "metrics": rows}
    if kept is not None:
        evidence["predictions"] = len(kept.labels)
    if wrong:
        return failed("; ".join(wrong), **evidence)
    if not confirmed:
        have = listing(sorted(exam.recorded)) or "none"
        return skipped(
            f"nothing to confirm: evaluated {listing(list(exam.evaluated)) or 'nothing'}; recorded {have}", **evidence
        )
    texts = [f"{name} {exam.evaluated[name]:.6g} (recorded {exam.recorded[name]:.6g})" for name in confirmed]
    return passed(f"confirmed within {exam.wanted.tolerance:g}: {listing(texts)}", **evidence)


def _rows(exam: Exam) -> tuple[dict[str, Any], list[str], list[str]]:
    """Each metric, with both values; a sentence for each that is wrong; those that are confirmed."""
    rows: dict[str, Any] = {}
    wrong: list[str] = []
    confirmed: list[str] = []
    for name in dict.fromkeys((*exam.wanted.metrics, *exam.evaluated)):
        now, before = exam.evaluated.get(name), exam.recorded.get(name)
        rows[name] = {"recorded": before, "evaluated": now}
        asked = not exam.wanted.metrics or name in exam.wanted.metrics
        if now is None:
            wrong.append(f"{name} was not evaluated; the evaluation gave {listing(list(exam.evaluated)) or 'nothing'}")
        elif not math.isfinite(now):
            wrong.append(f"{name} is {now}")
        elif before is None and name in exam.wanted.metrics:
            wrong.append(f"{name} is not recorded; recorded are {listing(sorted(exam.recorded)) or 'no metrics'}")
        elif before is not None and asked:
            apart = abs(now - before)
            rows[name]["difference"] = now - before
            if within(now, before, exam.wanted.tolerance):
                confirmed.append(name)
            else:
                wrong.append(f"{name} is {now:.6g} now and was recorded as {before:.6g}: {apart:.3g} apart")
    return rows, wrong, confirmed


def _numbers(given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"the evaluation returned a {kind_of(given)}; return metrics by name, or an Evaluated")
    return {check_metric(name): _number(name, value) for name, value in given.items()}


def _number(name: str, value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.detach().reshape(()).item()
    elif isinstance(value, np.ndarray | np.generic) and value.size == 1:
        value = value.reshape(()).item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"the evaluation gave {name} = {str(value)[:80]}, a {kind_of(value)}; give a number")
    return float(value)


# --- predictions --------------------------------------------------------------------------------------------------


def _kept(found: Evaluated) -> Predictions | None:
    if found.predictions is None and found.labels is None:
        return None
    if found.predictions is None or found.labels is None:
        raise ConfigError("the evaluation gave predictions or labels alone; give both, or neither")
    predicted, labels = _classes(found.predictions), _integers("labels", found.labels)
    if len(predicted) != len(labels):
        raise ConfigError(f"the evaluation gave {len(predicted)} predictions and {len(labels)} labels")
    if not labels:
        raise ConfigError("the evaluation gave predictions for no examples; give none at all instead")
    return Predictions(predicted, labels, None if found.examples is None else _digest(found.examples))


def _digest(examples: Any) -> str:
    if isinstance(examples, torch.Tensor):
        examples = examples.detach().cpu().contiguous()
        data = examples.reshape(-1).view(torch.uint8).numpy().tobytes() if examples.numel() else b""
        return digest(f"{examples.dtype} {tuple(examples.shape)} ".encode() + data)
    array = _array("examples", examples)
    if array.dtype.kind == "O":
        raise ConfigError("the evaluation gave examples that are no names, numbers or tensors; give one of these")
    return digest(f"{array.dtype.str} {array.shape} ".encode() + array.tobytes())


def _classes(given: Any) -> Sequence[int]:
    array = _array("predictions", given)
    if array.ndim == 2 and array.dtype.kind == "f" and array.shape[1] >= 2:
        if not np.isfinite(array).all():
            raise ConfigError("the evaluation gave scores that are NaN or infinite")
        return [int(one) for one in array.argmax(1)]
    return _integers("predictions", given)


def _integers(what: str, given: Any) -> Sequence[int]:
    array = _array(what, given)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        scores = ", or scores: floats [n, classes]" if what == "predictions" else ""
        raise ConfigError(f"the evaluation gave {what} of {array.dtype} {list(array.shape)}; give integers [n]{scores}")
    if array.dtype.kind == "u" and array.size and int(array.max()) >= 1 << 63:
        raise ConfigError(f"the evaluation gave {what} of 2**63 and more")
    return [int(one) for one in array]


def _array(what: str, given: Any) -> np.ndarray[Any, Any]:
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() else given).numpy()
    try:
        return np.asarray(given)
    except ValueError as error:
        raise ConfigError(f"the evaluation gave {what} that are no array: {error}") from error
