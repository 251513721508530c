"""Validations of checkpoints at rest: what was to be checked, and what was found.

A validation is a record beside the checkpoints of a run, in a directory named after the checkpoint's id. It never
changes, and outlives the checkpoint, so that what an alias rested on can be read for as long as the repository exists.
"""

import base64
import re
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal

import msgspec

from peakpoint.errors import CorruptError, FormatError
from peakpoint.format import layout
from peakpoint.format.members import Count, Name, Time
from peakpoint.format.sealed import decode_record, digest, encode_record
from peakpoint.repository.run_names import is_name_of
from peakpoint.store import LARGE, Store, create_numbered, establish

Outcome = Literal["passed", "failed", "skipped"]
MAX_AGE = timedelta(days=7)  # of a validation that a promotion rests on, where no policy says another


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationSpec:
    """The checks that a validation is to make, beyond those of every validation.

    Attributes:
        evaluate: ``module:function`` that gets the loaded state and returns metrics or an ``Evaluated``.
        model: ``module:function`` that makes the model, without arguments.
        part: the part of the checkpoint that is the model.
        metrics: which metrics must be confirmed; all that are both recorded and evaluated when empty.
        tolerance: how far an evaluated metric may be from the recorded one, in the metric's unit.
        golden: path of a safetensors file with ``inputs``, and maybe ``labels``.
        golden_digest: BLAKE3 of that file's bytes, so that other inputs are another validation.
        agreement: share of golden predictions that must be those of the present champion; 0 only reports it.
        budgets: what must not be exceeded, such as ``{"latency_ms": 20, "memory_mb": 500, "size_mb": 100}``.
        checks: ``module:function`` of further checks.
        signature: the shapes and types of outputs that the model must have, such as ``{"output": "F32[*, 10]"}``.
        sparsity: the metric that holds the sparsity, which is counted again in the weights.
    """

    evaluate: str | None = None
    model: str | None = None
    part: str = "model"
    metrics: tuple[str, ...] = ()
    tolerance: float = 1e-3
    golden: str | None = None
    golden_digest: str | None = None
    agreement: float = 0.0
    budgets: Mapping[str, float] = field(default_factory=dict)
    checks: tuple[str, ...] = ()
    signature: Mapping[str, str] = field(default_factory=dict)
    sparsity: str = "sparsity"

    def alike(self, other: "ValidationSpec") -> bool:
        """Return whether the results of two validations can be compared."""
        names = ("evaluate", "model", "part", "golden_digest")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    @property
    def digest(self) -> str:
        """The same for two specs of the same checks, however numbers were written: 20 milliseconds are 20.0."""
        members = asdict(msgspec.convert(asdict(self), ValidationSpec))
        members["golden"] = None  # golden_digest says which inputs they are, wherever the file is
        return digest(msgspec.json.encode(members, order="deterministic"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check.

    Attributes:
        check: its name.
        outcome: ``"skipped"`` when there was nothing to check; that is no failure.
        said: one sentence for people, with the figures.
        evidence: the figures for programs; plain JSON.
        seconds: how long it took.
    """

    check: str
    outcome: Outcome
    said: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """One validation of one checkpoint.

    Attributes:
        run: the run's name.
        checkpoint: the id.
        name: the directory, for people.
        number: 1, 2, 3, ... of this checkpoint.
        manifest: digest of the bytes of the manifest that was validated.
        parts: the parts that the checkpoint had then.
        at: when it ended.
        by: who started it.
        wanted: what was to be checked.
        findings: the results, in the order of the checks.
        metrics: as evaluated now.
        against: id of the champion that its predictions were compared with; None when there was none.
        alias: the alias whose holder that was.
        predictions: digest of the file with predictions; None when none were given.
        environment: versions, machine and device that it ran on.
        digest: of this record's bytes; not part of them.
    """

    run: Name
    checkpoint: Name
    name: Name
    number: Count
    manifest: str
    parts: tuple[str, ...]
    at: Time
    by: str
    wanted: ValidationSpec
    findings: tuple[Finding, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    against: str | None = None
    alias: str | None = None
    predictions: Name | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    digest: str = field(default="", compare=False)

    @property
    def passed(self) -> bool:
        """True when no check failed."""
        return all(finding.outcome != "failed" for finding in self.findings)

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The checks that failed."""
        return tuple(finding for finding in self.findings if finding.outcome == "failed")


@dataclass(frozen=True, slots=True)
class Predictions:
    """The classes that a model predicted for examples, and the right ones.

    Attributes:
        predicted: int, one an example.
        labels: int, one an example.
        examples: digest of the names of the examples, or of their inputs; None when it was not told.
    """

    predicted: Sequence[int]
    labels: Sequence[int]
    examples: str | None = None

    @property
    def of(self) -> str:
        """The same for predictions on the same examples, as far as their labels and names can tell."""
        return digest(f"{self.examples or ''} {_packed(self.labels)}".encode())


_PREDICTIONS = re.compile(r"[0-9a-f]{16}\.predictions")
_NUMBERED = re.compile(r"([0-9]{6,18})\.json")
_LAST_NUMBER = 10**18 - 1


def _numbers(store: Store, run: str, checkpoint: str) -> list[int]:
    matches = map(_NUMBERED.fullmatch, store.children(layout.validations_prefix(run, checkpoint)))
    return sorted(int(match[1]) for match in matches if match)


def record(store: Store, validation: Validation) -> Validation:
    """Write a validation, durably, under the next free number.

    Returns:
        The validation with its number and digest.

    Raises:
        StoreError: the store refused.
        CorruptError: somebody has put a record of the last number there is.
    """
    prefix = layout.validations_prefix(validation.run, validation.checkpoint)
    highest = max((layout.number(child, "", ".json") for child in store.children(prefix)), default=0)
    if highest >= _LAST_NUMBER:
        where = layout.validation_key(validation.run, validation.checkpoint, highest)
        raise CorruptError(f"{where} leaves no number for another validation; Peakpoint did not write it: remove it")
    return create_numbered(highest + 1, lambda number: _create(store, replace(validation, number=number)))


def _create(store: Store, validation: Validation) -> Validation:
    data = encode_record(validation, omit=["digest"])
    establish(store, layout.validation_key(validation.run, validation.checkpoint, validation.number), data)
    return replace(validation, digest=digest(data))


def read(store: Store, run: str, checkpoint: str, number: int) -> Validation:
    """Read one validation.

    Raises:
        NotFoundError: no validation has that number.
        CorruptError: it is damaged, or that of another checkpoint.
        FormatError: a newer release wrote it.
    """
    where = layout.validation_key(run, checkpoint, number)
    data = store.get(where)
    validation = decode_record(Validation, data, where=where)
    is_of_run = is_name_of(store, run, validation.run)
    if not is_of_run or (validation.checkpoint, validation.number) != (checkpoint, number):
        raise CorruptError(
            f"{where} is a validation of {validation.run}/{validation.checkpoint}: it was moved or copied"
        )
    return replace(validation, run=run, digest=digest(data))


def readable(store: Store, run: str, checkpoint: str) -> tuple[list[Validation], dict[int, str]]:
    """Read the validations of a checkpoint, earliest first, and say why those of other numbers cannot be read."""
    validations: list[Validation] = []
    errors: dict[int, str] = {}
    for number in _numbers(store, run, checkpoint):
        try:
            validations.append(read(store, run, checkpoint, number))
        except (CorruptError, FormatError) as error:
            errors[number] = str(error)
    return validations, errors


def newest(store: Store, run: str, checkpoint: str) -> Validation | None:
    """Read the last validation of a checkpoint; None when it was never validated.

    Raises:
        CorruptError: it is damaged.
    """
    numbers = _numbers(store, run, checkpoint)
    return read(store, run, checkpoint, numbers[-1]) if numbers else None


@dataclass(frozen=True, slots=True)
class ValidationSurvey:
    """The directory of a checkpoint's validations.

    Attributes:
        validations: those that can be read, earliest first.
        damage: keys of records and predictions that are not as they were written, and what is wrong.
        orphans: keys of predictions that no record names: of a validation that was cut short.
        foreign: keys of what Peakpoint has not written.
        busy: whether somebody may be validating the checkpoint at present; then nothing is an orphan.
    """

    validations: tuple[Validation, ...]
    damage: tuple[tuple[str, str], ...]
    orphans: tuple[str, ...]
    foreign: tuple[str, ...]
    busy: bool


def survey(
    store: Store, run: str, checkpoint: str, busy: Callable[[], object] = lambda: None, *, deep: bool = False
) -> ValidationSurvey:
    """Look at all validations of a checkpoint, damaged ones too.

    Args:
        store: any store.
        run: the run's name.
        checkpoint: the id.
        busy: whether somebody may be validating the checkpoint. It is called after predictions were listed and before
            records are: whoever has written the one and not yet the other is busy at that moment.
        deep: compare predictions with their digests, too.
    """
    prefix = layout.validations_prefix(run, checkpoint)
    children = store.children(prefix)
    unnamed = {f"{prefix}/{child}" for child in children if _PREDICTIONS.fullmatch(child)}
    foreign = [child for child in children if not _PREDICTIONS.fullmatch(child) and not _NUMBERED.fullmatch(child)]
    in_use = bool(busy())
    validations, errors = readable(store, run, checkpoint)
    damage = [(layout.validation_key(run, checkpoint, number), error) for number, error in errors.items()]
    for validation in validations:
        key = layout.predictions_key(run, checkpoint, validation.predictions or "")
        unnamed.discard(key)
        error = _predictions_error(store, validation, deep=deep)
        if error:
            damage.append((key, error))
    return ValidationSurvey(
        validations=tuple(validations),
        damage=tuple(damage),
        # a record that cannot be read may name any of the predictions
        orphans=() if in_use or errors else tuple(sorted(unnamed)),
        foreign=tuple(f"{prefix}/{child}" for child in foreign),
        busy=in_use,
    )


def _predictions_error(store: Store, validation: Validation, *, deep: bool) -> str:
    """Return what is wrong with the predictions of a validation."""
    if validation.predictions is None:
        return ""
    size = store.size(layout.predictions_key(validation.run, validation.checkpoint, validation.predictions))
    if size is None or size > LARGE:
        problem = "are missing" if size is None else f"have {size} bytes, more than Peakpoint writes"
        return f"the predictions of validation {validation.number} of {validation.name} {problem}"
    try:
        if deep:
            predictions_of(store, validation)
    except (CorruptError, FormatError) as error:
        return str(error)
    return ""


def checkpoints_with(store: Store, run: str) -> list[str]:
    """Return the ids of the checkpoints of a run, removed ones too, that have validations."""
    return [child[:-1] for child in store.children(layout.validations_of(run)) if child.endswith("/")]


# --- predictions --------------------------------------------------------------------------------------------------


def keep_predictions(store: Store, run: str, checkpoint: str, predictions: Predictions) -> str:
    """Keep predictions, durably, before the record that names them.

    Returns:
        The digest of the file.
    """
    record = PredictionsRecord(
        len(predictions.labels), _packed(predictions.predicted), _packed(predictions.labels), predictions.examples
    )
    data = encode_record(record, omit=["of"] if record.of is None else [])
    file_digest = digest(data)
    store.put(layout.predictions_key(run, checkpoint, file_digest), [data])
    return file_digest


@dataclass(frozen=True, slots=True)
class PredictionsRecord:
    """Predictions at rest, in base64; ``of`` names the examples."""

    examples: Count
    predicted: str
    labels: str
    of: str | None = None


def predictions_of(store: Store, validation: Validation) -> Predictions | None:
    """Read the predictions of a validation; None when it has kept none.

    Raises:
        CorruptError: they are damaged.
        NotFoundError: they do not exist any more.
    """
    if validation.predictions is None:
        return None
    key = layout.predictions_key(validation.run, validation.checkpoint, validation.predictions)
    data = store.get(key, max_size=LARGE)
    if digest(data) != validation.predictions:
        raise CorruptError(f"{key} is corrupt: its digest is not the one that the validation has")
    record = decode_record(PredictionsRecord, data, where=key)
    try:
        predictions = Predictions(_unpacked(record.predicted), _unpacked(record.labels), record.of)
    except ValueError as error:  # of base64 and array
        raise FormatError(f"{key} cannot be read by this release of Peakpoint: {error}; update it") from error
    if len(predictions.predicted) != len(predictions.labels):
        raise FormatError(f"{key} has {len(predictions.predicted)} predictions and {len(predictions.labels)} labels")
    return predictions


def _packed(values: Sequence[int]) -> str:
    """Encode integers as base64 of 8 little-endian bytes each."""
    return base64.b64encode(_little_endian(array("q", values)).tobytes()).decode()


def _unpacked(text: str) -> Sequence[int]:
    return _little_endian(array("q", base64.b64decode(text)))


def _little_endian(numbers: "array[int]") -> "array[int]":
    """Swap the bytes of integers where the machine has them in the other order."""
    if sys.byteorder != "little":
        numbers.byteswap()
    return numbers


Progress = Callable[[str], None]
"""Called with the name of each check before it begins."""
