"""Evaluate a candidate again, and compare with what was recorded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peakpoint.errors import ConfigError
from peakpoint.format.metrics import metrics_to_json, number_in
from peakpoint.format.names import check_metric, listing
from peakpoint.format.sealed import digest
from peakpoint.production.checks.candidate import Candidate, failed, function_of, passed, skipped
from peakpoint.production.proposal import within
from peakpoint.repository.validations import Finding, Predictions
from peakpoint.state.json_scalars import kind_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Metrics of an evaluation, with the predictions that they come from.

    Attributes:
        metrics: name to number.
        predictions: of each example the class, integers [n], or a score of each class, floats [n, classes]; a tensor,
            an array or a list.
        labels: the right classes, integers [n].
        examples: what tells the examples from others, such as their names or the tensor of their inputs; a digest of it
            is kept, so that predictions are only compared with those on the same examples.

    Example:
        >>> import peakpoint as pp
        >>> evaluated = pp.Evaluated(metrics={"accuracy": 0.5}, predictions=[0, 1], labels=[0, 0])
        >>> evaluated.metrics
        {'accuracy': 0.5}
    """

    metrics: Mapping[str, float]
    predictions: Any = None
    labels: Any = None
    examples: Any = None


def metrics(candidate: Candidate) -> Finding:
    """The recorded metrics, evaluated again."""
    if candidate.evaluate is None:
        return skipped("no function evaluates: give --with MODULE:FUNCTION")
    result = function_of(candidate.evaluate)(candidate.state)
    evaluated = result if isinstance(result, Evaluated) else Evaluated(metrics=result)
    candidate.evaluated = _numbers(evaluated.metrics)
    if candidate.evaluated:
        candidate.facts["metrics"] = metrics_to_json(candidate.evaluated)
    predictions = _predictions(evaluated)
    if predictions is not None:
        candidate.keep_predictions(predictions)
    rows, problems, confirmed = _compare(candidate)
    evidence = {"tolerance": candidate.wanted.tolerance, "metrics": rows}
    if predictions is not None:
        evidence["predictions"] = len(predictions.labels)
    if problems:
        return failed("; ".join(problems), **evidence)
    names = listing(list(candidate.evaluated)) or "nothing"
    if not confirmed:
        recorded = listing(sorted(candidate.recorded)) or "none"
        return skipped(f"nothing to confirm: evaluated {names}; recorded {recorded}", **evidence)
    texts = [f"{name} {candidate.evaluated[name]:.6g} (recorded {candidate.recorded[name]:.6g})" for name in confirmed]
    return passed(f"confirmed within {candidate.wanted.tolerance:g}: {listing(texts)}", **evidence)


def _compare(candidate: Candidate) -> tuple[dict[str, Any], list[str], list[str]]:
    """Each metric, with both values; a sentence for each that is wrong; those that are confirmed."""
    rows: dict[str, Any] = {}
    problems: list[str] = []
    confirmed: list[str] = []
    required, evaluated = candidate.wanted.metrics, candidate.evaluated
    for name in dict.fromkeys((*required, *evaluated)):
        value, recorded = evaluated.get(name), candidate.recorded.get(name)
        rows[name] = {"recorded": recorded, "evaluated": value}
        if value is None:
            problems.append(f"{name} was not evaluated. Evaluated: {listing(list(evaluated)) or 'nothing'}")
        elif not math.isfinite(value):
            problems.append(f"{name} is {value}")
        elif recorded is None and name in required:
            problems.append(f"{name} is not recorded. Recorded: {listing(sorted(candidate.recorded)) or 'no metrics'}")
        elif recorded is not None and (name in required or not required):
            rows[name]["difference"] = value - recorded
            if within(value, recorded, candidate.wanted.tolerance):
                confirmed.append(name)
            else:
                distance = abs(value - recorded)
                problems.append(f"{name} is {value:.6g} now and was recorded as {recorded:.6g}: {distance:.3g} apart")
    return rows, problems, confirmed


def _numbers(result: Any) -> dict[str, float]:
    if not isinstance(result, Mapping):
        raise ConfigError(f"the evaluation returned a {kind_of(result)}; return metrics by name, or an Evaluated")
    numbers: dict[str, float] = {}
    for name, value in result.items():
        number = number_in(value)
        if number is None:
            text = str(value)[:80]
            raise ConfigError(f"the evaluation returned {name} = {text}, a {kind_of(value)}; return a number")
        numbers[check_metric(name)] = number
    return numbers


# --- predictions --------------------------------------------------------------------------------------------------


def _predictions(evaluated: Evaluated) -> Predictions | None:
    if evaluated.predictions is None and evaluated.labels is None:
        return None
    if evaluated.predictions is None or evaluated.labels is None:
        raise ConfigError("the evaluation returned predictions or labels alone; return both, or neither")
    predicted, labels = _classes("predictions", evaluated.predictions), _classes("labels", evaluated.labels)
    if len(predicted) != len(labels):
        raise ConfigError(f"the evaluation returned {len(predicted)} predictions and {len(labels)} labels")
    if not labels:
        raise ConfigError("the evaluation returned predictions for no examples; return none at all instead")
    return Predictions(predicted, labels, None if evaluated.examples is None else _digest(evaluated.examples))


def _digest(examples: Any) -> str:
    if isinstance(examples, torch.Tensor):
        examples = examples.detach().cpu().contiguous()
        data = examples.reshape(-1).view(torch.uint8).numpy().tobytes() if examples.numel() else b""
        return digest(f"{examples.dtype} {tuple(examples.shape)} ".encode() + data)
    array = _array("examples", examples)
    if array.dtype.kind == "O":
        raise ConfigError("the evaluation returned examples that are not names, numbers or tensors")
    return digest(f"{array.dtype.str} {array.shape} ".encode() + array.tobytes())


def _classes(name: str, values: Any) -> list[int]:
    """Whole numbers [n] as they are; of the scores in predictions, floats [n, classes], the highest."""
    array = _array(name, values)
    scored = name == "predictions" and array.ndim == 2 and array.dtype.kind == "f" and array.shape[1] >= 2
    if scored and not np.isfinite(array).all():
        raise ConfigError("the evaluation returned scores that are NaN or infinite")
    classes = array.argmax(1) if scored else array
    if classes.ndim != 1 or classes.dtype.kind not in "iu":
        scores = ", or scores: floats [n, classes]" if name == "predictions" else ""
        raise ConfigError(
            f"the evaluation returned {name} of {array.dtype} {list(array.shape)}; return integers [n]{scores}"
        )
    if classes.dtype.kind == "u" and classes.size and int(classes.max()) >= 1 << 63:
        raise ConfigError(f"the evaluation returned {name} of 2**63 and more")
    return [int(number) for number in classes]


def _array(name: str, values: Any) -> np.ndarray[Any, Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ConfigError(f"the evaluation returned {name} that are not an array: {error}") from error
