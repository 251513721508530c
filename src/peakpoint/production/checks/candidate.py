"""What the checks of one validation share, and what a check may say."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from peakpoint.errors import ConfigError, FormatError, MismatchError
from peakpoint.format.manifest import Manifest
from peakpoint.production.checks.memory import MemoryPeak
from peakpoint.production.validation import file_digest
from peakpoint.repository.annotations import annotations_of, with_annotations
from peakpoint.repository.root import Repository
from peakpoint.repository.validations import Outcome, Predictions, ValidationSpec
from peakpoint.state.json_scalars import kind_of
from peakpoint.state.restore import restore_into
from peakpoint.state.saved import Loaded, read_state, read_trees
from peakpoint.state.tensor_files import read_safetensors

Outputs = dict[str, torch.Tensor]
_BATCH = 256  # golden inputs in one forward pass


class Said(NamedTuple):
    """What a check came to."""

    outcome: Outcome
    said: str
    evidence: Mapping[str, Any] = {}


def passed(said: str, **evidence: Any) -> Said:
    """The check passed."""
    return Said("passed", said, evidence)


def failed(said: str, **evidence: Any) -> Said:
    """The check failed."""
    return Said("failed", said, evidence)


def skipped(said: str, **evidence: Any) -> Said:
    """There was nothing to check."""
    return Said("skipped", said, evidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A checkpoint that is being validated: what a further check gets.

    A check is a function of one ``Candidate``. It passes when it returns nothing, or a mapping of evidence; whatever
    it raises fails it.

    Attributes:
        state: what the checkpoint holds, as ``peakpoint.load`` gives it.
        model: the model with its weights, in ``eval`` mode; None when no function was given that makes it.
        manifest: of the checkpoint.
        recorded: all metrics that are known of it.
        evaluated: the metrics that were evaluated by this validation.
        repository: where it is.
    """

    state: Loaded
    model: Any
    manifest: Manifest
    recorded: Mapping[str, float]
    evaluated: Mapping[str, float]
    repository: Repository


@dataclass(frozen=True, slots=True)
class Golden:
    """Inputs whose outputs are compared.

    Attributes:
        inputs: any numbers, [n, ...].
        labels: int64 [n], the right classes; None when nobody has said.
    """

    inputs: torch.Tensor
    labels: torch.Tensor | None


@dataclass(slots=True, kw_only=True)
class Exam:
    """One examination.

    Attributes:
        repository: where.
        manifest: of the checkpoint.
        wanted: what is asked.
        alias: whose holder is the champion.
        champion: its manifest, None when there is none.
        without: then why.
        evaluate: finds the function that evaluates.
        make: finds the function that makes the model.
        further: find the further checks.
        state: what the checkpoint holds.
        recorded: all metrics that are known of it.
        model: with its weights; None until it could be loaded.
        example: an example of its inputs, when the function that makes the model gave one.
        memory: what loading and running it took; None when that was not asked for, or it could not be done.
        unrun: then why.
        evaluated: metrics.
        predictions: of the evaluation, or on golden inputs.
        compared: whether the champion was compared with.
    """

    repository: Repository
    manifest: Manifest
    wanted: ValidationSpec
    alias: str
    champion: Manifest | None
    without: str
    evaluate: Callable[[], Callable[..., Any]] | None
    make: Callable[[], Callable[..., Any]] | None
    further: Sequence[Callable[[], Callable[..., Any]]]
    recorded: Mapping[str, float] = field(default_factory=dict)
    model: Any = None
    example: Any = None
    memory: MemoryPeak | None = None
    unrun: str = ""
    evaluated: dict[str, float] = field(default_factory=dict)
    predictions: Predictions | None = None
    compared: bool = False
    _state: Loaded | None = None
    _golden: Golden | None = None
    _outputs: Outputs | None = None

    def __post_init__(self) -> None:
        run = self.repository.run(self.manifest.run)
        self.recorded = with_annotations(self.manifest, annotations_of(run.events()), {}).metrics

    @property
    def state(self) -> Loaded:
        """What the checkpoint holds; each part is read when it is used."""
        if self._state is None:
            store = self.repository.store
            self._state = Loaded(self.manifest, store, read_trees(store, self.manifest), True)  # noqa: FBT003 - verify
        return self._state

    @property
    def golden(self) -> Golden | None:
        """The golden inputs.

        Raises:
            FormatError: the file is no safetensors file with inputs.
        """
        if self._golden is None and self.wanted.golden is not None:
            self._golden = read_golden(Path(self.wanted.golden), self.wanted.golden_digest)
        return self._golden

    @property
    def outputs(self) -> Outputs:
        """What the model makes of the golden inputs."""
        if self._outputs is None:
            assert self.golden is not None
            self._outputs = outputs_of(self.model, self.golden.inputs)
        return self._outputs

    def made(self) -> tuple[Any, Any]:
        """A model as the function of the user makes it, and an example of its inputs, or None.

        Raises:
            ConfigError: it makes no model.
        """
        assert self.make is not None
        found = self.make()()
        model, example = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        if isinstance(model, type) or not callable(model) or not hasattr(model, "load_state_dict"):
            raise ConfigError(
                f"{self.wanted.model} returned a {kind_of(model)}; return the model, which has load_state_dict() and "
                "can be called, or the model and an example of its inputs"
            )
        return model, example

    def fill(self, model: Any, manifest: Manifest) -> str:
        """Load a checkpoint's weights into a model, strictly; says how much.

        Raises:
            MismatchError: names, shapes or dtypes differ; lists them.
        """
        part = self.wanted.part
        saved = read_state(self.repository.store, manifest, [part])
        restored, _ = restore_into(saved, {part: model}, strict=True, exhaustive=False)
        if isinstance(model, torch.nn.Module):
            model.eval()
        return restored[0].what


def read_golden(path: Path, wanted: str | None) -> Golden:
    """Read golden inputs.

    Args:
        path: a safetensors file with ``inputs`` [n, ...] and maybe ``labels`` [n].
        wanted: BLAKE3 of the file.

    Raises:
        FormatError: it is not such a file, or has changed meanwhile.
    """
    if wanted is not None and file_digest(path) != wanted:
        raise FormatError(f"{path} has changed since the validation began")
    tensors = read_safetensors(path)[0]
    inputs, labels = tensors.get("inputs"), tensors.get("labels")
    if inputs is None:
        raise FormatError(f"{path} holds no tensor 'inputs', but {', '.join(sorted(tensors)) or 'nothing'}")
    if inputs.dim() == 0 or not len(inputs):
        raise FormatError(f"{path}: inputs has the shape {list(inputs.shape)}; give [n, ...] with n of at least 1")
    if labels is not None and (labels.shape != inputs.shape[:1] or labels.is_floating_point() or labels.is_complex()):
        raise FormatError(
            f"{path}: labels is {labels.dtype} {list(labels.shape)}; give integers of the shape {[len(inputs)]}"
        )
    return Golden(inputs, None if labels is None else labels.long())


# --- running a model ----------------------------------------------------------------------------------------------


def device_of(model: Any) -> torch.device:
    """Where a model is."""
    if isinstance(model, torch.nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")


def outputs_of(model: Any, inputs: torch.Tensor) -> Outputs:
    """What a model makes of inputs, batch by batch: every tensor that has a row for each input, by name, on the CPU.

    Raises:
        MismatchError: it gives no such tensor.
    """
    device = device_of(model)
    batches = []
    for batch in torch.split(inputs, _BATCH):
        with torch.no_grad():
            given = named(model(batch.to(device)))
        rows = {name: one.detach().cpu() for name, one in given.items() if one.dim() and len(one) == len(batch)}
        if not rows:
            shapes = ", ".join(f"{name} {list(one.shape)}" for name, one in given.items()) or "no tensor"
            raise MismatchError(f"the model gives {shapes} for {len(batch)} inputs: no tensor with a row for each")
        batches.append(rows)
    # one that is as long as this batch by chance is not as long as the next
    names = [name for name in batches[0] if all(name in rows for rows in batches)]
    if not names:
        raise MismatchError(f"the model gives no tensor with a row for each of {len(inputs)} inputs")
    return {name: torch.cat([rows[name] for rows in batches]) for name in names}


def named(output: Any, name: str = "") -> Outputs:
    """The tensors in what a model returns: ``output`` when it is one, else by their keys or numbers."""
    if isinstance(output, torch.Tensor):
        return {name or "output": output}
    pairs: Any = ()
    if isinstance(output, Mapping):
        pairs = output.items()
    elif isinstance(output, list | tuple):
        pairs = enumerate(output)
    found: Outputs = {}
    for key, value in pairs:
        found |= named(value, f"{name}.{key}" if name else str(key))
    return found


def classes_of(outputs: Outputs) -> torch.Tensor | None:
    """The classes that the first output says, int64 [n]; None when it says none.

    Integers [n] are classes; of floating-point scores [n, classes] with two classes or more, the highest wins.
    """
    first = next(iter(outputs.values()))
    if first.dim() == 1 and not first.is_floating_point() and not first.is_complex():
        return first.long()
    if first.dim() == 2 and first.shape[1] >= 2 and first.is_floating_point():
        return first.float().argmax(1) if first.dtype.itemsize < 4 else first.argmax(1)
    return None
