"""Checks that need a model: whether it loads, its outputs, and how they compare with the champion's."""

import torch

from peakpoint.errors import ConfigError, Error, MismatchError
from peakpoint.format.manifest import Manifest
from peakpoint.format.names import listing
from peakpoint.format.shards import stored_tensors
from peakpoint.production.checks.candidate import (
    Candidate,
    Outputs,
    classes_of,
    device_of,
    failed,
    function_of,
    outputs_of,
    passed,
    skipped,
)
from peakpoint.production.checks.memory import measure_peak
from peakpoint.production.checks.weights import not_finite_in
from peakpoint.repository.validations import Finding, Predictions
from peakpoint.state.shared_storage import DTYPES

_LISTED = 20  # examples and names that evidence lists

# --- loads --------------------------------------------------------------------------------------------------------


def loads(candidate: Candidate) -> Finding:
    """The model is made, and takes the weights, all of them and no others."""
    if candidate.build_model is None:
        return skipped("no function makes the model: give --model MODULE:FUNCTION")
    function_of(candidate.build_model)  # what is imported with it is not the model's memory
    maker, part = candidate.wanted.model, candidate.wanted.part
    measured = "memory_mb" in candidate.wanted.budgets
    restored = ""

    def work() -> torch.device:
        nonlocal restored
        model, candidate.example = candidate.new_model()
        restored = candidate.load_weights(model, candidate.manifest)
        candidate.model = model  # only now: what does not fit is no model
        device = device_of(model)
        candidate.facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        if measured:
            _run_once(candidate)
        return device

    try:
        if measured:
            candidate.memory = measure_peak(work)
        else:
            work()
    except MismatchError as error:
        if not error.differences:
            raise
        more = f"; and {len(error.differences) - 5} more differences" if len(error.differences) > 5 else ""
        summary = f"{maker} does not take the part {part}: {'; '.join(error.differences[:5])}{more}"
        return failed(summary, differences=error.differences)
    return passed(f"{maker} takes the part {part}: {restored}, names, shapes and dtypes", what=restored)


def _run_once(candidate: Candidate) -> None:
    try:
        inputs = one_input(candidate, 0)
        if inputs is not None:
            with torch.no_grad():
                candidate.model(*inputs)
    except Exception as error:  # noqa: BLE001 - of the user's model; that it loads is another question
        candidate.not_run = f"the model does not run: {type(error).__name__}: {error}"


def one_input(candidate: Candidate, number: int) -> tuple[torch.Tensor, ...] | None:
    """A single example of the model's inputs, on the model's device; None when there is none."""
    device = device_of(candidate.model)
    if candidate.golden is not None:
        inputs = candidate.golden.inputs
        row = number % len(inputs)
        return (inputs[row : row + 1].to(device),)
    if candidate.example is None:
        return None
    example = candidate.example if isinstance(candidate.example, tuple) else (candidate.example,)
    return tuple(tensor.to(device) for tensor in example)


# --- signature ----------------------------------------------------------------------------------------------------


def signature(candidate: Candidate) -> Finding:
    """Names, dtypes and shapes: of tensors beside the champion, of outputs beside the signature asked for."""
    summary, evidence = _tensors_beside_champion(candidate)
    if candidate.golden is None or candidate.model is None:
        reason = "no golden inputs (--golden FILE)" if candidate.golden is None else "the model could not be loaded"
        if candidate.wanted.signature:
            return failed(f"outputs cannot be checked: {reason}", **evidence)
        finding = skipped if candidate.champion is None else passed
        return finding(f"{summary}; outputs not checked: {reason}", **evidence)
    outputs = candidate.outputs
    evidence["outputs"] = texts = {name: described(output) for name, output in outputs.items()}
    problems = [
        f"{name} is {texts.get(name, 'missing')} instead of {text}"
        for name, text in candidate.wanted.signature.items()
        if name not in outputs or not _has_type(outputs[name], text)
    ]
    counts = {name: not_finite_in(output) for name, output in outputs.items()}
    problems += [f"{name} has {count:,} elements that are NaN or infinite" for name, count in counts.items() if count]
    if problems:
        return failed(f"outputs: {listing(problems)}", **evidence)
    return passed(f"{summary}; outputs: {listing([f'{name} {text}' for name, text in texts.items()])}", **evidence)


def _tensors_beside_champion(candidate: Candidate) -> tuple[str, dict[str, object]]:
    champion, alias, part = candidate.champion, candidate.alias, candidate.wanted.part
    if champion is None:
        return candidate.no_champion, {}
    new, old = _shapes(candidate.manifest, part), _shapes(champion, part)
    added = [name for name in new if name not in old]
    missing = [name for name in old if name not in new]
    different = [name for name in new if name in old and new[name] != old[name]]
    evidence: dict[str, object] = {"champion": champion.id, "added": added, "missing": missing, "different": different}
    if not (added or missing or different):
        return f"the {len(new)} tensors have the names, dtypes and shapes of {alias}", evidence
    counts = f"{len(added)} tensors added, {len(missing)} missing, {len(different)} of another dtype or shape"
    return f"other tensors than {alias}: {counts} ({listing([*added, *missing, *different])})", evidence


def _shapes(manifest: Manifest, part: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in stored_tensors(manifest, part).items()}


def described(output: torch.Tensor) -> str:
    """``"F32[*, 10]"``."""
    return f"{DTYPES.get(output.dtype, str(output.dtype))}[{', '.join(['*', *map(str, output.shape[1:])])}]"


def _has_type(output: torch.Tensor, text: str) -> bool:
    dtype, _, shape = text.partition("[")
    sizes = [size.strip() for size in shape[:-1].split(",")] if shape[:-1] else []
    fits = len(sizes) == output.dim() and all(
        text in {"*", str(size)} for text, size in zip(sizes, output.shape, strict=True)
    )
    return fits and DTYPES.get(output.dtype) == dtype


# --- golden -------------------------------------------------------------------------------------------------------


def golden(candidate: Candidate) -> Finding:
    """The predictions for golden inputs beside their labels and the champion's predictions."""
    inputs = candidate.golden
    if inputs is None:
        return skipped("no golden inputs: give --golden FILE.safetensors")
    if candidate.model is None:
        return skipped("the model could not be loaded")
    count, agreement = len(inputs.inputs), candidate.wanted.agreement
    labels, predicted = inputs.labels, classes_of(candidate.outputs)
    evidence: dict[str, object] = {"examples": count, "agreement_wanted": agreement}
    summary = f"{count:,} golden inputs"
    if labels is not None and predicted is None:
        name, output = next(iter(candidate.outputs.items()))
        text = f"the output {name} {described(output)} predicts no classes"
        return failed(f"there are labels, but {text}: return integers [n] or scores [n, classes]")
    if labels is not None and predicted is not None:
        right = int((predicted == labels).sum())
        evidence["right"] = right
        summary += f", {right:,} right ({right / count:.2%})"
        if candidate.predictions is None and (candidate.evaluate is None or candidate.evaluated):
            candidate.keep_predictions(Predictions(predicted.tolist(), labels.tolist()))
    if candidate.champion is None:
        unread = agreement and "cannot be read" in candidate.no_champion
        return (failed if unread else passed)(f"{summary}; not compared: {candidate.no_champion}", **evidence)
    try:
        champion_outputs = _champion_outputs(candidate, candidate.champion)
    except Error as error:
        text = f"{summary}; {candidate.alias} cannot be compared with: {str(error).splitlines()[0]}"
        return (failed if agreement else passed)(text, **evidence)
    return _compare(candidate, champion_outputs, summary, evidence)


def _champion_outputs(candidate: Candidate, champion: Manifest) -> Outputs:
    assert candidate.golden is not None
    if champion.id == candidate.manifest.id:
        return candidate.outputs
    model, _ = candidate.new_model()
    if model is candidate.model or _parameter_ids(model) & _parameter_ids(candidate.model):
        raise ConfigError(
            f"{candidate.wanted.model} returns the same object, or parts of it, twice; make a new model with each call"
        )
    candidate.load_weights(model, champion)
    return outputs_of(model, candidate.golden.inputs)


def _parameter_ids(model: object) -> set[int]:
    return {id(parameter) for parameter in model.parameters()} if isinstance(model, torch.nn.Module) else set()


def _compare(candidate: Candidate, champion_outputs: Outputs, summary: str, evidence: dict[str, object]) -> Finding:
    outputs, alias, spec = candidate.outputs, candidate.alias, candidate.wanted
    shapes = {name: output.shape for name, output in outputs.items()}
    champion_shapes = {name: output.shape for name, output in champion_outputs.items()}
    if shapes != champion_shapes:
        names = [name for name in shapes | champion_shapes if shapes.get(name) != champion_shapes.get(name)]
        text = f"{summary}; the shapes of outputs differ from {alias}: {listing(names)}"
        return (failed if spec.agreement else passed)(text, **evidence)
    distances = {name: _row_distances(outputs[name], champion_outputs[name]) for name in outputs}
    largest = max(float(distance.max()) for distance in distances.values())
    new, old = classes_of(outputs), classes_of(champion_outputs)
    near = torch.stack([distance <= spec.tolerance for distance in distances.values()]).all(0)
    equal = near if new is None or old is None else new == old
    candidate.facts["compared"] = True
    count, equal_count = len(equal), int(equal.sum())
    evidence |= {
        "champion": getattr(candidate.champion, "id", None),
        "equal": equal_count,
        "largest_difference": largest,
        "different": (~equal).nonzero().flatten()[:_LISTED].tolist(),
    }
    how = f", within {spec.tolerance:g}" if new is None or old is None else _flips(candidate, old, new, evidence)
    summary += f"; agrees with {alias} on {equal_count:,} of {count:,} ({equal_count / count:.2%}){how}"
    summary += f"; outputs differ by {largest:.3g} at most"
    if equal_count < spec.agreement * count - 1e-9 * count:
        return failed(f"{summary}; at least {spec.agreement:.2%} required", **evidence)
    return passed(summary, **evidence)


def _flips(candidate: Candidate, old: torch.Tensor, new: torch.Tensor, evidence: dict[str, object]) -> str:
    """Count the examples that were right and are wrong, and the other way; with labels only."""
    labels = candidate.golden.labels if candidate.golden is not None else None
    if labels is None:
        return ""
    regressed, fixed = (old == labels) & (new != labels), (old != labels) & (new == labels)
    evidence |= {"right_to_wrong": int(regressed.sum()), "wrong_to_right": int(fixed.sum())}
    evidence["flips"] = regressed.nonzero().flatten()[:_LISTED].tolist()
    return f", {int(regressed.sum()):,} regressions, {int(fixed.sum()):,} fixes"


def _row_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The largest distance within each row, float64 [n]; infinite where one of the two is NaN."""
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    rows_a, rows_b = a.to(wide).reshape(len(a), -1), b.to(wide).reshape(len(b), -1)
    distances = torch.where(rows_a == rows_b, torch.zeros((), dtype=torch.float64), (rows_a - rows_b).abs())
    distances = distances.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return distances.amax(1) if distances.shape[1] else torch.zeros(len(a), dtype=torch.float64)
