"""Checks that need a model: whether it loads, what it gives out, and how that compares with the champion's."""

import torch

from peakpoint.errors import ConfigError, Error, MismatchError
from peakpoint.format.manifest import Manifest
from peakpoint.format.names import listing
from peakpoint.production.checks.candidate import (
    Exam,
    Outputs,
    Said,
    classes_of,
    device_of,
    failed,
    outputs_of,
    passed,
    skipped,
)
from peakpoint.production.checks.memory import measure_peak
from peakpoint.reports.diff import tensors_of
from peakpoint.repository.validations import Predictions
from peakpoint.state.shared_storage import DTYPES

_LISTED = 20  # examples and names that evidence lists

# --- loads --------------------------------------------------------------------------------------------------------


def loads(exam: Exam) -> Said:
    """The model is made, and takes the weights, all of them and no others."""
    if exam.make is None:
        return skipped("no function makes the model: give --model MODULE:FUNCTION")
    exam.make()  # what is imported with it is not the model's memory
    what = ""

    def work() -> torch.device:
        nonlocal what
        model, exam.example = exam.made()
        what = exam.fill(model, exam.manifest)
        exam.model = model  # only now: what does not fit is no model
        if "memory_mb" in exam.wanted.budgets:
            _run_once(exam)
        return device_of(model)

    try:
        if "memory_mb" in exam.wanted.budgets:
            exam.memory = measure_peak(work)
        else:
            work()
    except MismatchError as error:
        if not error.differences:
            raise
        return failed(
            f"{exam.wanted.model} does not take the part {exam.wanted.part}: {'; '.join(error.differences[:5])}"
            + (f"; and {len(error.differences) - 5} more differences" if len(error.differences) > 5 else ""),
            differences=error.differences,
        )
    return passed(f"{exam.wanted.model} takes the part {exam.wanted.part}: {what}, names, shapes and dtypes", what=what)


def _run_once(exam: Exam) -> None:
    try:
        example = one_input(exam, 0)
        if example is not None:
            with torch.no_grad():
                exam.model(*example)
    except Exception as error:  # noqa: BLE001 - of the user's model; that it loads is another question
        exam.unrun = f"the model does not run: {type(error).__name__}: {error}"


def one_input(exam: Exam, number: int) -> tuple[torch.Tensor, ...] | None:
    """A single example of the model's inputs, where the model is; None when nobody has given any."""
    device = device_of(exam.model)
    if exam.golden is not None:
        inputs = exam.golden.inputs
        at = number % len(inputs)
        return (inputs[at : at + 1].to(device),)
    if exam.example is None:
        return None
    given = exam.example if isinstance(exam.example, tuple) else (exam.example,)
    return tuple(one.to(device) for one in given)


# --- signature ----------------------------------------------------------------------------------------------------


def signature(exam: Exam) -> Said:
    """Names, types and shapes of tensors beside the champion's, and of outputs beside those that are wanted."""
    said, evidence = _beside_the_champion(exam)
    if exam.golden is None or exam.model is None:
        why = "no golden inputs were given" if exam.golden is None else "the model could not be loaded"
        if exam.wanted.signature:
            return failed(f"the outputs cannot be seen: {why}", **evidence)
        return (skipped if exam.champion is None else passed)(f"{said}; outputs were not looked at: {why}", **evidence)
    evidence["outputs"] = found = {name: described(one) for name, one in exam.outputs.items()}
    wrong = [
        f"{name} is {found.get(name, 'not there')} instead of {text}"
        for name, text in exam.wanted.signature.items()
        if name not in exam.outputs or not _is(exam.outputs[name], text)
    ]
    wrong += [
        f"{name} has {count:,} elements that are NaN or infinite" for name, count in _odd(exam.outputs).items() if count
    ]
    if wrong:
        return failed(f"of the outputs, {listing(wrong)}", **evidence)
    return passed(f"{said}; outputs: {listing([f'{name} {text}' for name, text in found.items()])}", **evidence)


def _beside_the_champion(exam: Exam) -> tuple[str, dict[str, object]]:
    if exam.champion is None:
        return exam.without, {}
    part = exam.wanted.part
    ours, theirs = _shapes(exam.manifest, part), _shapes(exam.champion, part)
    added = [name for name in ours if name not in theirs]
    missing = [name for name in theirs if name not in ours]
    other = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    evidence: dict[str, object] = {"champion": exam.champion.id, "added": added, "missing": missing, "different": other}
    if not (added or missing or other):
        return f"the {len(ours)} tensors have the names, dtypes and shapes of {exam.alias}'s", evidence
    counts = f"{len(added)} tensors more, {len(missing)} less and {len(other)} of other dtype or shape"
    return f"it is built otherwise than {exam.alias}: {counts} ({listing([*added, *missing, *other])})", evidence


def _shapes(manifest: Manifest, part: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {key[1]: (one.dtype, tuple(one.shape)) for key, (_, one) in tensors_of(manifest) if key[0] == part}


def described(output: torch.Tensor) -> str:
    """``"F32[*, 10]"``."""
    return f"{DTYPES.get(output.dtype, str(output.dtype))}[{', '.join(['*', *map(str, output.shape[1:])])}]"


def _is(output: torch.Tensor, text: str) -> bool:
    dtype, _, rest = text.partition("[")
    sizes = [size.strip() for size in rest[:-1].split(",")] if rest[:-1] else []
    fits = len(sizes) == output.dim() and all(
        size in {"*", str(have)} for size, have in zip(sizes, output.shape, strict=True)
    )
    return fits and DTYPES.get(output.dtype) == dtype


def _odd(outputs: Outputs) -> dict[str, int]:
    return {
        name: int((~torch.isfinite(one.float() if one.dtype.itemsize == 1 else one)).sum())
        for name, one in outputs.items()
        if one.is_floating_point() or one.is_complex()
    }


# --- golden -------------------------------------------------------------------------------------------------------


def golden(exam: Exam) -> Said:
    """What the model says of golden inputs, beside what is right and what the champion says."""
    if exam.golden is None:
        return skipped("no golden inputs were given: --golden FILE.safetensors")
    if exam.model is None:
        return skipped("the model could not be loaded")
    ours, labels = exam.outputs, exam.golden.labels
    mine = classes_of(ours)
    evidence: dict[str, object] = {"examples": len(exam.golden.inputs), "agreement_wanted": exam.wanted.agreement}
    said = f"{len(exam.golden.inputs):,} golden inputs"
    if labels is not None and mine is None:
        return failed(f"there are labels, and {_first(ours)} says no classes: give integers [n] or scores [n, classes]")
    if labels is not None and mine is not None:
        right = int((mine == labels).sum())
        evidence["right"] = right
        said += f", {right:,} right ({right / len(labels):.2%})"
        if exam.predictions is None and (exam.evaluate is None or exam.evaluated):
            exam.predictions = Predictions(mine.tolist(), labels.tolist())
    if exam.champion is None:
        unread = exam.wanted.agreement and "cannot be read" in exam.without
        return (failed if unread else passed)(f"{said}; {exam.without}: nothing to compare with", **evidence)
    try:
        theirs = _champion_outputs(exam, exam.champion)
    except Error as error:
        text = f"{said}; {exam.alias} cannot be compared with: {str(error).splitlines()[0]}"
        return (failed if exam.wanted.agreement else passed)(text, **evidence)
    return _compared(exam, theirs, said, evidence)


def _first(outputs: Outputs) -> str:
    name = next(iter(outputs))
    return f"the output {name} {described(outputs[name])}"


def _champion_outputs(exam: Exam, champion: Manifest) -> Outputs:
    assert exam.golden is not None
    if champion.id == exam.manifest.id:
        return exam.outputs
    model, _ = exam.made()
    if model is exam.model or _tensors(model) & _tensors(exam.model):
        raise ConfigError(
            f"{exam.wanted.model} returns the same object, or parts of it, twice; make a new model with each call"
        )
    exam.fill(model, champion)
    return outputs_of(model, exam.golden.inputs)


def _tensors(model: object) -> set[int]:
    """The identities of what a model has learnt."""
    return {id(one) for one in model.parameters()} if isinstance(model, torch.nn.Module) else set()


def _compared(exam: Exam, theirs: Outputs, said: str, evidence: dict[str, object]) -> Said:
    ours = exam.outputs
    shapes = [name for name in {**ours, **theirs} if not _alike(ours.get(name), theirs.get(name))]
    if shapes:
        text = f"{said}; {exam.alias} gives other outputs: {listing(shapes)} differ in shape"
        return (failed if exam.wanted.agreement else passed)(text, **evidence)
    distances = {name: _distances(ours[name], theirs[name]) for name in ours}
    largest = max(float(one.max()) for one in distances.values())
    mine, champions = classes_of(ours), classes_of(theirs)
    if mine is None or champions is None:
        equal = torch.stack([one <= exam.wanted.tolerance for one in distances.values()]).all(0)
        what = f"outputs are within {exam.wanted.tolerance:g} of {exam.alias}'s"
    else:
        equal = mine == champions
        what = f"predictions are those of {exam.alias}"
    exam.compared = True
    count, same = len(equal), int(equal.sum())
    evidence |= {"champion": getattr(exam.champion, "id", None), "equal": same, "largest_difference": largest}
    evidence["different"] = (~equal).nonzero().flatten()[:_LISTED].tolist()
    said += f"; {same:,} {what} ({same / count:.2%})"
    labels = exam.golden.labels if exam.golden is not None else None
    if labels is not None and mine is not None and champions is not None:
        worse, better = (champions == labels) & (mine != labels), (champions != labels) & (mine == labels)
        evidence |= {"right_to_wrong": int(worse.sum()), "wrong_to_right": int(better.sum())}
        evidence["flips"] = worse.nonzero().flatten()[:_LISTED].tolist()
        said += f", {int(worse.sum()):,} right before and wrong now, {int(better.sum()):,} the other way"
    said += f"; outputs differ by {largest:.3g} at most"
    if same < exam.wanted.agreement * count - 1e-9 * count:
        return failed(f"{said}; {exam.wanted.agreement:.2%} were asked for", **evidence)
    return passed(said, **evidence)


def _alike(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape


def _distances(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The largest distance within each row, float64 [n]; infinite where one of them is NaN."""
    wide = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
    a, b = one.to(wide).reshape(len(one), -1), other.to(wide).reshape(len(other), -1)
    apart = torch.where(a == b, torch.zeros((), dtype=torch.float64), (a - b).abs())
    apart = apart.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return apart.amax(1) if apart.shape[1] else torch.zeros(len(one), dtype=torch.float64)
